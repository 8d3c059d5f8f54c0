"""The state of the learner, its batches, and its optimizer.

Axis letters: N sequences, R response tokens, P rows, T tokens per row, K top tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from drpo_jax.learner.packing import Layout
from drpo_jax.models import Transformer
from drpo_jax.parallel import is_param

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update replaces.

    Attributes:
      model: the model with float32 master weights.
      opt_state: the state of the optax optimizer.
      updates: int32 scalar, optimizer updates applied so far.
      skipped: int32 scalar, consecutive non-finite updates up to now.
    """

    model: Transformer
    opt_state: optax.OptState
    updates: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, each with one sequence or several packed ones, and the inputs of the objective.

    Attributes:
      tokens: int32 [P, T]. A sequence is a prompt and its response without a gap.
      segment_ids: int32 [P, T], the number of the sequence in its row, from 1; 0 is padding.
      positions: int32 [P, T], counted from 0 in every sequence.
      mask: int32 [P, T], the segment id at positions that predict a response token with a loss; 0
        elsewhere. The position before a token predicts it. Tokens without a loss are context only.
      inputs: name → float32 [P, T, …], the objective's inputs for each response token besides logp, at
        the position that predicts the token: behavior_logp, advantage, and others by name (topk_ids
        int32 [P, T, K], correction, …).
      routes: int16 [P, T, L, k], the experts that the sampler visited and the learner visits too
        (rollout routing replay). −1 leaves the choice to the router, and None leaves all of them to it.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    mask: Array
    inputs: dict[str, Array]
    routes: Array | None = None


def make_batch(
    layout: Layout,
    tokens: np.ndarray,
    inputs: Mapping[str, np.ndarray],
    routes: np.ndarray | None = None,
    loss_mask: np.ndarray | None = None,
) -> Batch:
    """Returns the Batch of N sequences as NumPy arrays.

    Args:
      layout: the places of the sequences.
      tokens: int32 [N, T'], prompt and response without a gap; what follows them is ignored.
      inputs: name → [N] or [N, R, …], see `Batch`.
      routes: int16 [N, T', L, k], see `Batch`.
      loss_mask: bool [N, R], the response tokens that carry a loss; None: all of them.
    """
    mask = layout.place(layout.numbers)
    if loss_mask is not None:
        mask = np.where(layout.place(loss_mask), mask, 0)
    steps = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(
        layout.place(tokens, "sequence"),
        layout.place(layout.numbers, "sequence"),
        layout.place(steps, "sequence"),
        mask,
        {name: layout.place(values) for name, values in inputs.items()},
        None if routes is None else layout.place(routes, "sequence"),
    )


def make_schedule(
    optimizer: ConfigDict, total_updates: int, peak: ArrayLike | None = None
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates applied so far.

    Args:
      optimizer: the config's section of this name.
      total_updates: length of the linear and cosine schedules, warmup included.
      peak: the peak learning rate, for instance as a tracer; None: that of `optimizer`.
    """
    peak = optimizer.learning_rate if peak is None else peak
    warmup = optimizer.warmup_steps
    decay = max(total_updates - warmup, 1)
    final = peak * optimizer.final_fraction
    schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, optimizer.final_fraction),
    }[optimizer.schedule]()
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return schedule


def make_optimizer(
    optimizer: ConfigDict, total_updates: int, peak: ArrayLike | None = None
) -> optax.GradientTransformation:
    """Returns AdamW after clipping by global norm, with the learning rate of `make_schedule`.

    Weight decay exempts the parameters with decay=False (see `models.layers.param`), unless
    optimizer.decay_norms is set.

    Args:
      optimizer: the config's section of this name.
      total_updates, peak: see `make_schedule`.
    """
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(optimizer, total_updates, peak),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            mu_dtype=optimizer.mu_dtype,
            weight_decay=optimizer.weight_decay,
            mask=None if optimizer.decay_norms else _decays,
        ),
    )


def _decays(params):
    """Returns whether weight decay applies to each parameter of a pytree; bare arrays decay."""
    return jax.tree.map(
        lambda leaf: leaf.get_metadata()["decay"] if is_param(leaf) else True,
        params,
        is_leaf=is_param,
    )


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run that begins with `model`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(model, optimizer.init(model), zero, zero)
