"""The update step: gradients of a mini-batch, accumulated over micro-batches, and an optimizer update.

Axis letters: P rows of the mini-batch, T tokens of a row, D model width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from drpo_jax.learner.head import TokenTrace, chunk_tokens, head_loss, likelihood, precomputed
from drpo_jax.learner.state import Batch, TrainState
from drpo_jax.models import Compute, Transformer, router_metrics
from drpo_jax.objectives import token_weights
from drpo_jax.parallel import flatten_tokens, unflatten_tokens


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """Static settings of the learner's programs. Hashable, so they can be static arguments.

    Attributes:
      objective: (logp, **Batch.inputs) → (J, c, w), arrays of the shape of logp, float32. See
        `head.policy` and `head.likelihood`.
      aggregation, horizon: how tokens add up to a loss, see `objectives.token_weights`. The horizon is
        in tokens.
      micro_batches: number of parts of a mini-batch; divides its rows P.
      temperature: temperature of the sampling distribution, which divides the logits.
      entropy_bonus: coefficient of the entropy that is added to J.
      load_balance: coefficient of the load-balancing loss of each micro-batch; dense models have none.
      pack: rows may be empty. Micro-batches of empty rows are skipped.
      parts: possible numbers of equal parts into which the rows of a micro-batch are cut before
        computation. The first is 1, each divides the next, and the last divides T. A micro-batch is cut
        into the largest number of parts for which no cut splits a sequence. More than one number
        requires `pack`.
      compute: how the learner computes the forward pass.
      head_chunk: tokens per chunk of the head; None: see `head.chunk_tokens`.
      sum_squares: whether the trace includes Σπ² of each token.
    """

    objective: Callable
    aggregation: str
    horizon: int
    micro_batches: int = 1
    temperature: float = 1.0
    entropy_bonus: float = 0.0
    load_balance: float = 0.0
    pack: bool = False
    parts: tuple[int, ...] = (1,)
    compute: Compute = Compute()
    head_chunk: int | None = None
    sum_squares: bool = False


class Report(NamedTuple):
    """What an update returns besides the state.

    Attributes:
      trace: TokenTrace of [P, T] arrays, at the positions that predict a response token; 0 elsewhere.
      metrics: name → float32 scalar: loss, learning_rate, router metrics, and three L2 norms over all
        parameters: grad_norm before the clip, update_norm of the change that was applied (0 for a
        skipped update), and param_norm of the new parameters.
      skipped: int32 scalar, consecutive non-finite updates up to this one.
    """

    trace: TokenTrace
    metrics: dict[str, jax.Array]
    skipped: jax.Array


def response_trace(model: Transformer, batch: Batch, settings: UpdateSettings) -> TokenTrace:
    """Scores the response tokens of a batch, without an objective and without gradients.

    Returns:
      TokenTrace of [P, T] arrays, at the positions that predict a response token; 0 elsewhere.
    """
    settings = dataclasses.replace(settings, objective=likelihood)
    weight = (batch.mask > 0).astype(jnp.float32)
    pieces = jax.tree.map(lambda a: _split(a, settings.micro_batches), (batch, weight))

    def score(piece):
        _, (trace, _, _) = _micro_loss(model, *piece, 1.0, settings)
        return (), trace

    _, trace = jax.lax.map(_computed(score, settings), pieces)
    return jax.tree.map(lambda a: _merge(a, settings.micro_batches), trace)


def update(
    state: TrainState,
    batch: Batch,
    *,
    settings: UpdateSettings,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Report]:
    """One optimizer update on one mini-batch.

    A non-finite loss or gradient leaves model and optimizer state unchanged and is counted in
    `state.skipped`.

    Args:
      state: the state to replace; donate it.
      batch: the mini-batch. Micro-batch i takes the rows i, i + n, i + 2n, …, so no row moves to another
        device.
      settings: see `UpdateSettings`.
      optimizer: the optimizer of `state.opt_state`.
      schedule: its learning rate as a function of the updates applied before, for the metrics.

    Returns:
      The new state, and the Report.
    """
    grads, trace, metrics = gradients(state.model, batch, settings=settings)
    metrics["grad_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    changes, opt_state = optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, changes)
    model, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (model, opt_state),
        (state.model, state.opt_state),
    )
    metrics["learning_rate"] = jnp.asarray(schedule(state.updates), jnp.float32)
    metrics["update_norm"] = jnp.where(finite, optax.tree.norm(changes), 0.0)
    metrics["param_norm"] = optax.tree.norm(model)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    state = dataclasses.replace(
        state, model=model, opt_state=opt_state, updates=state.updates + finite, skipped=skipped
    )
    return state, Report(trace, metrics, skipped)


def gradients(
    model: Transformer, batch: Batch, *, settings: UpdateSettings
) -> tuple[Transformer, TokenTrace, dict[str, jax.Array]]:
    """The gradient of the loss of one mini-batch, which the optimizer descends.

    Token weights and the denominator are computed over the whole mini-batch, so neither the number of
    micro-batches nor their widths change the loss. Load balancing is the exception: its loss is a mean
    over micro-batches of a function that is not linear in their tokens. Micro-batches have equal
    weight, or weights proportional to their tokens if rows are cut (`settings.parts`).

    Returns:
      A pytree like `model`, float32; the TokenTrace [P, T]; the loss and the router metrics by name.
    """
    weight, denominator = token_weights(settings.aggregation, batch.mask, settings.horizon)
    n = settings.micro_batches
    pieces = jax.tree.map(lambda a: _split(a, n), (batch, weight / denominator))
    filled = jnp.any(pieces[0].segment_ids > 0, axis=(1, 2))
    equal = 1 / jnp.maximum(jnp.sum(filled), 1)
    tokens = jnp.maximum(jnp.sum(batch.segment_ids > 0), 1)

    def micro_step(piece):
        share = equal
        if len(settings.parts) > 1:
            share = jnp.sum(piece[0].segment_ids > 0) / tokens
        (_, (trace, loss, router)), grads = jax.value_and_grad(_micro_loss, has_aux=True)(
            model, *piece, share, settings
        )
        return (grads, loss, router), trace

    def accumulate(total, piece):
        sums, trace = _computed(micro_step, settings)(piece)
        return jax.tree.map(jnp.add, total, sums), trace

    zero = _zeros_of(micro_step, jax.tree.map(lambda a: a[0], pieces))[0]
    (grads, loss, router), trace = jax.lax.scan(accumulate, zero, pieces)
    metrics = {"loss": loss} | (router_metrics(router) if router else {})
    return grads, jax.tree.map(lambda a: _merge(a, n), trace), metrics


def _micro_loss(model, batch, weight_PxT, share, settings):
    """The part of the loss that one micro-batch contributes.

    Args:
      weight_PxT: token weights over the denominator.
      share: the micro-batch's share of the load-balancing loss.

    Returns:
      The part of the total loss, and (TokenTrace [P, T], the part of the objective's loss without load
      balancing, router sums).
    """
    out = model.hidden(
        batch.tokens, batch.positions, batch.segment_ids, settings.compute, routes=batch.routes
    )
    operands = flatten_tokens(out.hidden), model.head_weight()
    targets = jnp.roll(batch.tokens, -1, axis=1)  # position t predicts token t + 1
    mesh = jax.sharding.get_abstract_mesh()
    columns = operands[1].shape[1] // (1 if mesh.empty else mesh.shape["tensor"])
    chunk = settings.head_chunk or chunk_tokens(columns, settings.compute.device())

    def loss_of(objective, operands, weight_PxT, inputs):
        loss, trace = head_loss(
            *operands, *jax.tree.map(flatten_tokens, (targets, weight_PxT, inputs)),
            objective=objective, temperature=settings.temperature, chunk=chunk,
            entropy_bonus=settings.entropy_bonus, sum_squares=settings.sum_squares,
        )  # fmt: skip
        return loss, jax.tree.map(lambda a: unflatten_tokens(a, weight_PxT.shape), trace)

    objective, inputs = settings.objective, batch.inputs
    if getattr(objective, "needs_sequences", False):
        # c of a token depends on its whole response: one pass for the logprobs, one for the gradient.
        every = (batch.mask > 0).astype(jnp.float32)
        _, first = loss_of(likelihood, jax.lax.stop_gradient(operands), every, {})
        J, c, w = objective(first.logp, **inputs, mask=batch.mask)
        objective, inputs = precomputed, {"J": J, "coefficient": c, "weight": w}
    loss, trace = loss_of(objective, operands, weight_PxT, inputs)
    total = loss
    if settings.load_balance and out.router:
        balance = router_metrics(out.router)["router/balance_loss"]
        total += settings.load_balance * balance * share
    return total, (trace, loss, out.router)


def _computed(step, settings):
    """Applies `step` to the narrowest rows that a micro-batch allows; zeros if it is empty.

    Args:
      step: (Batch, weight [P, T]) → (sums over the micro-batch, TokenTrace [P, T]).
    """
    if not settings.pack:
        return step
    narrower = settings.parts[1:]
    steps = [step, *(partial(_in_parts, step, parts) for parts in narrower)]

    def narrow(piece):
        ids = piece[0].segment_ids
        # Every number of parts divides the next, so rows that allow one also allow the smaller ones.
        return jax.lax.switch(sum(_uncut(ids, parts) for parts in narrower), steps, piece)

    def run(piece):
        filled = jnp.any(piece[0].segment_ids > 0)
        compute = narrow if narrower else step
        return jax.lax.cond(filled, compute, partial(_zeros_of, step), piece)

    return run


def _uncut(ids_PxT, parts):
    """Returns 1 if no cut of the rows into equal parts splits a sequence, otherwise 0."""
    cuts = ids_PxT.reshape(ids_PxT.shape[0], parts, -1)
    last, first = cuts[:, :-1, -1], cuts[:, 1:, 0]
    return jnp.all((last != first) | (last == 0)).astype(jnp.int32)


def _in_parts(step, parts, piece):
    """Applies `step` to rows [P · parts, T / parts]. The returned trace is [P, T] again."""
    rows, width = piece[1].shape
    cut = rows * parts, width // parts
    batch, weight = jax.tree.map(lambda a: a.reshape(*cut, *a.shape[2:]), piece)
    ids = batch.segment_ids
    # The sequences of a row are numbered from left to right. Numbers restart at 1 in each part.
    before = jnp.min(jnp.where(ids > 0, ids, width), axis=1, keepdims=True) - 1
    batch = dataclasses.replace(
        batch,
        segment_ids=jnp.where(ids > 0, ids - before, 0),
        mask=jnp.where(batch.mask > 0, batch.mask - before, 0),
    )
    sums, trace = step((batch, weight))
    return sums, jax.tree.map(lambda a: a.reshape(rows, width, *a.shape[2:]), trace)


def _zeros_of(step, piece):
    """Zeros like the results of step(piece)."""
    shapes = jax.eval_shape(step, piece)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _split(x, n):
    """[P, …] → [n, P / n, …], part i with the rows i, i + n, …"""
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def _merge(x, n):
    """The inverse of `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(n * x.shape[1], *x.shape[2:])
