"""From a verified rollout to a new policy: inputs of the objective, scoring, updates.

Axis letters: N responses, R response tokens, P rows of a mini-batch, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.calls import needs_old_logp
from drpo_jax.learner import TokenTrace, TrainState
from drpo_jax.metrics import reduce_pairs, reduce_values
from drpo_jax.models import Transformer
from drpo_jax.objectives import (
    add_to_responses,
    advantages,
    mismatch_weight,
    optimal_token_baseline,
    reward_penalty,
    token_advantages,
    with_spread,
)
from drpo_jax.parallel import multihost
from drpo_jax.run import SHUFFLE, Run
from drpo_jax.sampler import Rollouts


class Inputs(NamedTuple):
    """What the updates need from a rollout besides its tokens.

    Attributes:
      arrays: `learner.Batch.inputs`: [N] or [N, R, …] arrays by name.
      old_logp: float32 [N, R], log π_old, the learner's own score of the rollout before the first
        update; None if nothing needs it.
      metrics: the KL penalty that was subtracted from the reward, if any.
    """

    arrays: dict[str, Any]
    old_logp: Any
    metrics: dict[str, float]


def make_loss_mask(
    config: FrozenConfigDict, rollouts: Rollouts, among: np.ndarray | None = None
) -> np.ndarray:
    """Returns bool [N, R], True for response tokens that carry a loss.

    These are the tokens that the model sampled, except in truncated responses under
    train.overlong_filtering.

    Args:
      among: bool [N, R], restricts these tokens further; None: no restriction.
    """
    mask = rollouts.mask() if among is None else rollouts.mask() & among
    return mask & rollouts.finished[:, None] if config.train.overlong_filtering else mask


def objective_inputs(
    run: Run,
    model: Transformer,
    rollouts: Rollouts,
    reward: np.ndarray,
    step: int,
    rescore: bool,
    advantage: np.ndarray | None = None,
) -> Inputs:
    """Returns the objective's inputs for one rollout.

    Args:
      model: the policy before its updates.
      reward: the training reward, float32 [N], or [N, R] with NaN where a token has none.
      rescore: score the rollout with `model` even if the objective does not need it.
      advantage: Â, float32 [N, R]; None: from the reward.
    """
    objective, arrays = run.config.objective, run.programs.objective.arrays
    rescored = objective.behavior == "rescored"
    topk = {"topk_ids": rollouts.top_ids} if "topk_logp" in arrays else {}
    old: Any = None
    if rescore or needs_old_logp(run.programs):
        old = score(run, model, rollouts, step, topk)
    # π is the full softmax at the sampling temperature, and so is the default µ.
    recorded = {"sampler": rollouts.full_logp, "sampler_filtered": rollouts.sampled_logp}
    inputs: dict[str, Any] = {
        "behavior_logp": old.logp if rescored else recorded[objective.behavior]
    }
    if topk:
        inputs |= topk | {"behavior_topk_logp": old.topk_logp if rescored else rollouts.top_logp}
    if "old_logp" in arrays:
        inputs["old_logp"] = old.logp
    metrics = {}
    if objective.kl != "none":
        reference = score(run, cast(Transformer, run.reference), rollouts, step, {}, replay=False)
        ref_logp = reference.logp
        if objective.kl == "k1":
            # µ before top-k and top-p, because π_ref is never filtered.
            start = old.logp if rescored else rollouts.full_logp
            penalty = np.asarray(reward_penalty(start, ref_logp, rollouts.mask()))
            penalty = objective.kl_coefficient * penalty
            metrics = {"reward/kl_penalty": penalty.mean()}
            if reward.ndim == 1:
                reward = reward - penalty
            else:
                reward = add_to_responses(reward, -penalty, rollouts.response_lengths)
        else:
            inputs["ref_logp"] = ref_logp
    if objective.correction != "none":
        inputs["correction"] = _correction(objective, old.logp, rollouts)
    if advantage is None:
        correction = inputs.get("correction", 1.0)
        advantage = _advantage(run.config, reward, old, rollouts.mask(), correction)
    inputs["advantage"] = advantage
    for name, value in run.programs.hyper.items():
        inputs[name] = np.full(len(rollouts.tokens), value, np.float32)
    return Inputs(inputs, old.logp if old else None, metrics)


def _advantage(config, reward, old, mask, correction):
    """Returns Â, float32 [N], or [N, R] with a baseline per token."""
    objective, samples = config.objective, config.train.samples
    if objective.baseline == "otb":
        squares = old.sum_squares[..., 0]
        return optimal_token_baseline(reward, old.logp, squares, mask, samples, correction)
    compare = advantages if reward.ndim == 1 else token_advantages
    return np.asarray(compare(objective.advantage, reward, samples))


def _correction(objective, old_logp, rollouts):
    """Returns the importance weights of π_old over the sampler's µ, float32 [N, R]."""
    weight = mismatch_weight(
        objective.correction,
        old_logp,
        rollouts.full_logp,
        rollouts.mask(),
        level=objective.correction_level,
        cap=objective.correction_cap,
        floor=objective.correction_floor,
    )
    return np.asarray(weight)


def score(
    run: Run,
    model: Transformer,
    rollouts: Rollouts,
    step: int,
    inputs: Mapping[str, np.ndarray],
    replay: bool = True,
) -> TokenTrace:
    """Scores the response tokens of a rollout with `model`.

    Args:
      inputs: `topk_ids` [N, R, K], or nothing.
      replay: route the tokens as the sampler did if train.routing_replay is set.

    Returns:
      TokenTrace of [N, R] arrays on the host.
    """
    pieces, order = [], mini_batches(run.config, step, 0)
    for rows in order:
        batch, layout = run.programs.rollout_batch(rollouts, rows, inputs, replay)
        pieces.append((run.programs.rescore(model, batch), layout))
    return _by_response(pieces, order, rollouts)


def _by_response(pieces, order, rollouts):
    """Joins the traces of mini-batches.

    Args:
      pieces: a pytree of [P, T, …] device arrays and its Layout, per mini-batch.
      order: the row indices of each mini-batch.

    Returns:
      One pytree of [N, R, …] arrays on the host, in the order of the rollout.
    """
    length = rollouts.sampled_logp.shape[1]
    arrays = [
        jax.tree.map(lambda a: layout.take(a, length), multihost.fetch(tree))  # noqa: B023
        for tree, layout in pieces
    ]
    back = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *a: np.concatenate(a)[back], *arrays)


def make_updates(
    run: Run,
    state: TrainState,
    rollouts: Rollouts,
    inputs: Mapping[str, np.ndarray],
    loss_mask: np.ndarray,
    step: int,
    keep: bool,
) -> tuple[TrainState, dict[str, np.ndarray], dict[str, float]]:
    """Makes all updates on one rollout. Later ones are off-policy, because µ does not change.

    Args:
      state: donated.
      inputs: `Inputs.arrays`.
      loss_mask: bool [N, R], see `make_loss_mask`.
      keep: fetch the learner's view of the rollout.

    Returns:
      The new state; the learner's view of the rollout in the first epoch (logp, coefficient, entropy
      and weight, float32 [N, R] by name, 0 for tokens without a loss), or {} unless `keep`; the metrics
      over all updates.
    """
    programs = run.programs
    reports, traces, order = [], [], []
    for epoch in range(run.config.train.epochs):
        for rows in mini_batches(run.config, step, epoch):
            batch, layout = programs.rollout_batch(rollouts, rows, inputs, loss_mask=loss_mask)
            state, report = programs.policy_update(state, batch)
            pairs, extremes = programs.summarize(report.trace, batch)
            pairs = pairs | {"batch/padding": layout.padding}
            reports.append((pairs, extremes, report.metrics, report.skipped))
            if keep and epoch == 0:
                trace = report.trace._asdict()
                del trace["topk_logp"], trace["sum_squares"]
                traces.append((trace, layout))
                order.append(rows)
    metrics = _reduced(jax.device_get(reports))
    return state, _by_response(traces, order, rollouts) if keep else {}, metrics


def _reduced(reports: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    """Reduces (pairs, extremes, metrics, skipped) of each update to the metrics of a rollout."""
    pairs, extremes, updates, skipped = zip(*reports)
    sums = jax.tree.map(lambda *a: np.sum(a, dtype=np.float64), *pairs)
    metrics = with_spread(reduce_pairs(sums))
    for values in (extremes, updates):
        metrics |= {name: reduce_values(name, [v[name] for v in values]) for name in values[0]}
    metrics["grad_norm_max"] = max(u["grad_norm"] for u in updates)
    metrics["updates/skipped"] = sum(count > 0 for count in skipped)
    metrics["updates/skipped_in_a_row"] = max(skipped)
    return metrics


def mini_batches(config: FrozenConfigDict, step: int, epoch: int) -> list[np.ndarray]:
    """Row indices of each mini-batch: whole groups, in an order drawn from (seed, step, epoch)."""
    prompts, samples = config.train.prompts, config.train.samples
    order = np.random.default_rng([config.seed, step, SHUFFLE, 2 + epoch]).permutation(prompts)
    rows = (order[:, None] * samples + np.arange(samples)).reshape(-1)
    return np.split(rows, prompts // config.train.mini_batch_prompts)
