"""The update step: one mini-batch of rollouts, accumulated over micro-batches, one optimizer update.

Axis letters: B sequences of the mini-batch, T tokens, R response tokens, D model width.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from drpo_jax.learner.head import TokenTrace, head_loss
from drpo_jax.models import Compute, router_metrics
from drpo_jax.objectives import token_weights


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What an update does, static.

    Attributes:
      objective: (logp, behavior_logp, advantage) → (J, c); see `head.policy` and `head.likelihood`.
      aggregation, horizon: how tokens become a loss, see `objectives.aggregation`.
      micro_batches: pieces the mini-batch is computed in.
      temperature: of the sampling distribution.
      load_balance: coefficient of the load-balancing loss (per micro-batch).
      compute: how the learner computes.
      head_chunk: tokens per piece of the head.
    """

    objective: object
    aggregation: str
    horizon: int
    micro_batches: int = 1
    temperature: float = 1.0
    load_balance: float = 0.0
    compute: Compute = Compute()
    head_chunk: int = 1024


class Report(NamedTuple):
    """What an update tells.

    Attributes:
      trace: TokenTrace of [B, R] arrays, as the objective saw them.
      metrics: name → float32 scalar: loss, gradient norm, router metrics.
      skipped: int32 scalar, non-finite updates in a row, this one included.
    """

    trace: TokenTrace
    metrics: dict
    skipped: jax.Array


def response_logp(model, batch, settings):
    """TokenTrace of the response tokens, float32 [B, R], in micro-batches and without gradients."""
    none = jnp.zeros_like(batch.behavior_logp)
    pieces = jax.tree.map(lambda a: _split(a, settings.micro_batches), (batch, none))
    trace = jax.lax.map(lambda piece: _micro_loss(model, *piece, settings)[1][0], pieces)
    return jax.tree.map(lambda a: _merge(a, settings.micro_batches), trace)


def update(state, batch, *, settings, optimizer):
    """One optimizer update on one mini-batch.

    The weight of every token and the denominator are fixed on the whole mini-batch before it is cut
    into micro-batches, so their number never changes the loss. A non-finite loss or gradient leaves
    model and optimizer as they were and is counted in `state.skipped`.

    Args:
      state: TrainState (donate it).
      batch: Batch; micro-batch i takes the rows i, i + n, i + 2n, …, so that no row leaves its device.
      settings: UpdateSettings.
      optimizer: optax optimizer.

    Returns:
      (new state, Report).
    """
    weight, denominator = token_weights(
        settings.aggregation, batch.response_mask(), settings.horizon
    )
    n = settings.micro_batches
    pieces = jax.tree.map(lambda a: _split(a, n), (batch, weight / denominator))

    def micro_step(piece):
        (_, (trace, loss, router)), grads = jax.value_and_grad(_micro_loss, has_aux=True)(
            state.model, *piece, settings
        )
        return (grads, loss, router), trace

    def accumulate(total, piece):
        sums, trace = micro_step(piece)
        return jax.tree.map(jnp.add, total, sums), trace

    first = jax.tree.map(lambda a: a[0], pieces)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(micro_step, first)[0])
    (grads, loss, router), trace = jax.lax.scan(accumulate, zero, pieces)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, changes)
    model, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (model, opt_state),
        (state.model, state.opt_state),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics = {"loss": loss, "grad_norm": grad_norm} | (router_metrics(router) if router else {})
    state = dataclasses.replace(
        state, model=model, opt_state=opt_state, updates=state.updates + finite, skipped=skipped
    )
    return state, Report(jax.tree.map(lambda a: _merge(a, n), trace), metrics, skipped)


def _micro_loss(model, batch, weight_BxR, settings):
    """The micro-batch's share of what is minimised, and (trace [B, R], its share of the
    objective's loss alone, router sums)."""
    out = model.hidden(batch.tokens, segment_ids=batch.segment_ids(), compute=settings.compute)
    positions = batch.response_positions()
    hidden_BxRxD = jnp.take_along_axis(out.hidden, positions[..., None] - 1, axis=1)
    loss, trace = head_loss(
        hidden_BxRxD.reshape(-1, hidden_BxRxD.shape[-1]),
        model.head_weight(),
        jnp.take_along_axis(batch.tokens, positions, axis=1).reshape(-1),
        batch.behavior_logp.reshape(-1),
        jnp.repeat(batch.advantage, positions.shape[1]),
        weight_BxR.reshape(-1),
        objective=settings.objective,
        temperature=settings.temperature,
        chunk=settings.head_chunk,
    )
    total = loss
    if settings.load_balance:
        balance = router_metrics(out.router)["router/balance_loss"]
        total += settings.load_balance * balance / settings.micro_batches
    trace = jax.tree.map(lambda a: a.reshape(positions.shape), trace)
    return total, (trace, loss, out.router)


def _split(x, n):
    """[B, …] → [n, B / n, …], piece i holding the rows i, i + n, …"""
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def _merge(x, n):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
