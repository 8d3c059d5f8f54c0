"""How far the sampler's and the learner's logprobs of the same tokens differ."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from drpo_jax.errors import TrainingStopped
from drpo_jax.loop.learn import score
from drpo_jax.metrics import reduce_pairs
from drpo_jax.models import Transformer
from drpo_jax.objectives import by_token
from drpo_jax.run import NOISE, Run
from drpo_jax.sampler import Rollouts

# Bounds on mean |Δ log p|, in nats, within which sampler and learner count as one model: the values
# that `python -m benchmarks.mismatch` measures, with headroom for larger models. FP8 on both sides
# has a bound of its own, because operands that differ in the last bit of bfloat16 may be rounded to
# different codes.
PARITY_BOUND = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.3}


def check_parity(run: Run, rollouts: Rollouts, synced_logp: np.ndarray) -> None:
    """Compares the sampler's logprobs of a rollout with the learner's, and warns about a difference.

    Args:
      synced_logp: float32 [N, R], the learner's score with the weights that the sampler had.

    Raises:
      TrainingStopped: the mean difference exceeds the bound and sampler.parity is "stop".
    """
    config = run.config
    rounded = config.precision.recipe != "none" or config.precision.kv_cache != "none"
    bound = config.sampler.parity_bound
    bound = bound or PARITY_BOUND["fp8" if rounded else config.compute.dtype]
    gap = np.abs(rollouts.full_logp - synced_logp)[rollouts.mask()]
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


def score_synced(run: Run, model: Transformer, rollouts: Rollouts, old_logp: Any, step: int) -> Any:
    """Returns the learner's score with the weights that the sampler had, float32 [N, R].

    These weights differ from the learner's only under precision.noise. Without noise this is `old_logp`
    itself, which is None if the rollout was not scored.
    """
    if not run.config.precision.noise or old_logp is None:
        return old_logp
    noisy = run.programs.perturbed(model, run.key(step, NOISE))
    return score(run, noisy, rollouts, step, {}).logp


def mismatch(
    run: Run,
    rollouts: Rollouts,
    old_logp: np.ndarray,
    synced_logp: np.ndarray,
    logp: np.ndarray,
    inputs: Mapping[str, np.ndarray],
    loss_mask: np.ndarray,
) -> dict[str, float]:
    """Measures how far the sampler's logprobs are from the learner's own.

    With precision.noise, the real part (between sampler and learner with the same weights) and the
    injected part (the effect of the noise) are logged as well.

    Args:
      old_logp, synced_logp, logp: float32 [N, R].
      inputs: `Inputs.arrays`.
      loss_mask: bool [N, R], the tokens that count, which have a `logp`.
    """
    advantage, mask = by_token(inputs["advantage"]), loss_mask
    compare = run.programs.mismatch
    pairs, extremes = compare(rollouts.full_logp, old_logp, logp, advantage, mask)
    metrics = reduce_pairs(pairs) | jax.device_get(extremes)
    if synced_logp is old_logp:
        return metrics
    parts = {"real": (rollouts.full_logp, synced_logp), "injected": (synced_logp, old_logp)}
    for part, gap in parts.items():
        means = reduce_pairs(compare(*gap, logp, advantage, mask)[0])
        for name in ("shift", "kl", "logp"):
            metrics[f"mismatch/{name}_{part}"] = means[f"mismatch/{name}"]
    return metrics
