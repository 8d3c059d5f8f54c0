"""What the learner holds: model, optimizer state, counters; and a batch of rollouts.

Axis letters: B sequences, T tokens of prompt and response, R response tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update replaces.

    Attributes:
      model: a `Transformer`, float32 master weights.
      opt_state: optax state.
      updates: int32 scalar, optimizer updates applied.
      skipped: int32 scalar, non-finite updates in a row up to now.
    """

    model: object
    opt_state: object
    updates: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with what the objective needs of them. Masks follow from the lengths.

    Attributes:
      tokens: int32 [B, T], prompt and response without a gap, anything behind.
      prompt_lengths, response_lengths: int32 [B]; a row of response length 0 is padding.
      behavior_logp: float32 [B, R], log µ of the response tokens.
      advantage: float32 [B].
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    response_lengths: jax.Array
    behavior_logp: jax.Array
    advantage: jax.Array

    def response_mask(self):
        """bool [B, R]: the response tokens."""
        return jnp.arange(self.behavior_logp.shape[1]) < self.response_lengths[:, None]

    def segment_ids(self):
        """int32 [B, T]: 1 for the prompt and the response, 0 for padding."""
        lengths = self.prompt_lengths + self.response_lengths
        return (jnp.arange(self.tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)

    def response_positions(self):
        """int32 [B, R]: where in the sequence each response token stands (clipped to T − 1)."""
        positions = self.prompt_lengths[:, None] + jnp.arange(self.behavior_logp.shape[1])
        return jnp.minimum(positions, self.tokens.shape[1] - 1)


def make_optimizer(config, total_updates):
    """AdamW behind a global-norm clip, with the config's schedule.

    Args:
      config: with the fields of `config.optimizer`.
      total_updates: length of the linear and cosine schedules, in optimizer updates.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(total_updates - warmup, 1)
    final = peak * config.final_fraction
    schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, config.final_fraction),
    }[config.schedule]()
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )


def init_state(model, optimizer):
    """The state of a run that begins with `model`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(model, optimizer.init(model), zero, zero)
