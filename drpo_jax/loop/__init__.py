"""The RL loop: sample, verify, advantages, updates, metrics, checkpoint.

Axis letters: N responses (prompts · samples, the samples of a prompt next to each other), R response
tokens, T prompt and response tokens. One step, `loop.rl_step`, as the host sees it:

    sync         the policy's weights, quantized by the precision recipe -> the sampler
    sample       train.prompts problems -> `sampler.Rollouts`: tokens [N, T]; sampled_logp and
                 full_logp [N, R]
    verify       prompt, response and answer as text -> reward [N]
    score        the learner's own logprobs of the rollout, where they are needed -> old_logp [N, R]
    advantages   reward [N] -> advantage [N] or [N, R], each response against its group
    inputs       the objective's inputs for each token besides logp: behavior_logp [N, R],
                 advantage, … (`learner.Batch.inputs`); and which tokens carry a loss
    updates      one optimizer update per mini-batch of whole groups, all against the same µ
    metrics      one record per step -> metrics.jsonl, TensorBoard, console
    checkpoint   model, optimizer state, step number and the collector's state, every
                 checkpoint.every steps

The modules, in reading order, after `drpo_jax.run`, which holds what the phases share:

    loop        `train` and `rl_step`
    collector   the rollout that a step learns from, and what is sampled for later steps
    choice      the groups of a rollout: dynamic sampling, partial rollouts
    draws       the groups that are carried over to later steps
    rollout     sample and verify: `Rollout`, the record of one rollout
    verdicts    the verifier's rewards, gathered from all processes
    learn       inputs of the objective, scoring, mini-batches, updates
    parity      how far the sampler's and the learner's logprobs of the same tokens differ
    warm_start  the model that RL starts from
    guard       stops a run whose updates are no longer finite
    console     what `train` prints besides the metrics
    timer       seconds per phase
    profile     profiler traces of some steps

All randomness is a function of (config.seed, step, purpose), so a run that is killed and restarted
computes what it would have computed without the interruption.
"""

from drpo_jax.loop import collector, console, guard, learn, parity, rollout, verdicts, warm_start
from drpo_jax.loop.collector import Collector
from drpo_jax.loop.loop import rl_step, train
from drpo_jax.loop.warm_start import initial_model, make_warm_start
from drpo_jax.run import Run, claim, keep_report

__all__ = [
    "Collector",
    "Run",
    "claim",
    "collector",
    "console",
    "guard",
    "initial_model",
    "keep_report",
    "learn",
    "make_warm_start",
    "parity",
    "rl_step",
    "rollout",
    "train",
    "verdicts",
    "warm_start",
]
