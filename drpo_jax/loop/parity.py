"""How far the sampler's and the learner's logprobs of the same tokens differ."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict

from drpo_jax.errors import TrainingStopped
from drpo_jax.loop.learn import score
from drpo_jax.loop.rollout import SamplingScores
from drpo_jax.metrics import reduce_pairs
from drpo_jax.models import Transformer
from drpo_jax.objectives import by_token
from drpo_jax.run import NOISE, Run, due
from drpo_jax.sampler import Rollouts

# Bounds on mean |Δ log p|, in nats, within which sampler and learner count as one model: the values
# that `python -m benchmarks.mismatch` measures, with headroom for larger models. FP8 on both sides
# has a bound of its own, because operands that differ in the last bit of bfloat16 may be rounded to
# different codes.
PARITY_BOUND = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.3}


def check_parity(run: Run, rollouts: Rollouts, scores: SamplingScores) -> None:
    """Compares the sampler's logprobs of a rollout with the learner's, and warns about a difference.

    Tokens that earlier weights sampled are excluded.

    Args:
      scores: scores under the sampling weights.

    Raises:
      TrainingStopped: the mean difference exceeds the bound and sampler.parity is "stop".
    """
    config = run.config
    rounded = config.precision.recipe != "none" or config.precision.kv_cache != "none"
    bound = config.sampler.parity_bound
    bound = bound or PARITY_BOUND["fp8" if rounded else config.compute.dtype]
    gap = np.abs(rollouts.full_logp - scores.synced_logp)[scores.own(rollouts)]
    if not len(gap):  # All groups are from earlier steps.
        return
    message = (
        f"sampler and learner on the first rollout: mean |difference of log p| {gap.mean():.2g}, "
        f"largest {gap.max():.2g}, over {len(gap)} tokens (bound of the mean: {bound:.2g})"
    )
    if gap.mean() <= bound:
        print(message)
        return
    message += (
        ". The objective's ratio then measures this difference rather than the change of the policy. "
        "Check compute.dtype, precision.recipe and, for mixtures of experts, train.routing_replay; "
        "with objective.behavior = 'rescored', µ is the learner's own score"
    )
    if config.sampler.parity == "stop":
        raise TrainingStopped(message + " (sampler.parity = 'stop')")
    logging.warning(message)


def is_measured(config: FrozenConfigDict, step: int) -> bool:
    """Returns whether the rollout of a step is compared with the learner's scores, or saved.

    Args:
      step: number of completed steps.
    """
    return due(step, config.train.save_rollout_every) or due(step, config.log.mismatch_every)


def score_at_sampling(
    run: Run,
    model: Transformer,
    rollouts: Rollouts,
    step: int,
    version: int,
    old_logp: Any = None,
) -> SamplingScores:
    """Scores a rollout under the weights that sampled it.

    Args:
      model: the policy that sampled the rollout, before later updates.
      step: the step that learns from the rollout.
      version: version of the policy, the number of completed steps.
      old_logp: float32 [N, R], the score under `model`, if already known.
    """
    if old_logp is None:
        old_logp = score(run, model, rollouts, step, {}).logp
    synced_logp = old_logp
    if run.config.precision.noise:
        noisy = run.programs.perturbed(model, run.key(step, NOISE))
        synced_logp = score(run, noisy, rollouts, step, {}).logp
    return SamplingScores(old_logp, synced_logp, version)


def mismatch(
    run: Run,
    rollouts: Rollouts,
    scores: SamplingScores | None,
    old_logp: np.ndarray,
    logp: np.ndarray,
    inputs: Mapping[str, np.ndarray],
    loss_mask: np.ndarray,
) -> dict[str, float]:
    """Measures the distance between the sampler's and the learner's logprobs, and its causes.

    Between µ and π, a token's logprob changes by the sum of up to four components:

        real      sampler -> learner, with the sampler's weights
        injected  the noise of precision.noise -> the weights without it
        age       the sampling weights -> those before the updates (train.staleness)
        drift     the weights before the updates -> those at the update that used the token

    Components that are 0 by construction are neither computed nor logged, and "real" is logged only if
    it differs from the total distance between µ and `old_logp`. If the rollout has groups from earlier
    steps, all components but the drift are measured over the tokens that its latest weights sampled.

    Args:
      scores: scores under the sampling weights. None: unknown, because the comparison of an older
        rollout became due only after sampling; then only the total and the drift are measured.
      old_logp, logp: float32 [N, R], the learner's scores before the updates and at the update.
      inputs: `Inputs.arrays`.
      loss_mask: bool [N, R], the tokens that count; only they have a `logp`.
    """
    advantage, mask = by_token(inputs["advantage"]), loss_mask
    compare = run.programs.mismatch
    pairs, extremes = compare(rollouts.full_logp, old_logp, logp, advantage, mask)
    metrics = reduce_pairs(pairs) | jax.device_get(extremes)
    own = mask & scores.own(rollouts) if scores else mask
    parts = {"drift": (old_logp, logp)}
    if scores and scores.synced_logp is not scores.logp:
        parts["injected"] = scores.synced_logp, scores.logp
    if scores and scores.logp is not old_logp:
        parts["age"] = scores.logp, old_logp
    if scores and (len(parts) > 1 or np.any(own != mask)):
        parts["real"] = rollouts.full_logp, scores.synced_logp
    if not np.any(own):
        parts = {"drift": parts["drift"]}
    for part, gap in parts.items():
        tokens = mask if part == "drift" else own
        means = reduce_pairs(compare(*gap, logp, advantage, tokens)[0])
        for name in ("shift", "kl", "logp"):
            metrics[f"mismatch/{name}_{part}"] = means[f"mismatch/{name}"]
    return metrics
