"""Metrics of one update over its response tokens, from the head's TokenTrace."""

import jax.numpy as jnp

from drpo_jax.learner.head import TokenTrace
from drpo_jax.learner.state import Batch
from drpo_jax.objectives import kl_penalty, weight_summary
from drpo_jax.objectives.diagnostics import Extremes, Sums


def summarize(trace: TokenTrace, batch: Batch) -> tuple[Sums, Extremes]:
    """Sums and extremes over the response tokens of a mini-batch.

    Args:
      trace: the trace of the update, [P, T] arrays.
      batch: the Batch of the update. Its `inputs` have behavior_logp and advantage.

    Returns:
      (name → (sum, count), name → extreme): those of `objectives.weight_summary`, and the sums
      entropy, correction/mean and correction/dropped (with a correction), and policy/kl_reference (with
      a KL penalty in the loss).
    """
    inputs, mask = batch.inputs, jnp.asarray(batch.mask) > 0
    behavior_logp, advantage = (jnp.asarray(inputs[k]) for k in ("behavior_logp", "advantage"))
    sums, extremes = weight_summary(
        trace.weight, trace.logp, behavior_logp, advantage, trace.coefficient, mask
    )
    count = jnp.sum(mask)
    sums = sums | {"entropy": (jnp.sum(trace.entropy * mask), count)}
    if "correction" in inputs:
        sums["correction/mean"] = jnp.sum(jnp.where(mask, inputs["correction"], 0.0)), count
        sums["correction/dropped"] = jnp.sum(mask & (inputs["correction"] == 0)), count
    if "ref_logp" in inputs:
        k3, _ = kl_penalty("k3", trace.logp, behavior_logp, inputs["ref_logp"])
        sums["policy/kl_reference"] = jnp.sum(jnp.where(mask, k3, 0.0)), count
    return sums, extremes
