"""A training run of level 1: sample, score, update, with the exact expected reward after every rollout.

One rollout is what a step of `drpo train` is: groups of responses are sampled from µ, the learner
scores them once (π_old), advantages are rewards minus their group mean, and several epochs of mini-
batches update the policy. µ differs from π by three terms, which are measured separately:

    π − µ = (π − π_old) + (π_old − π_sync) + (π_sync − µ)
             drift         age                numerics

π_sync is the score under the sampler's weights, which are `staleness` rollouts old. The sampler's
numerics move its logits: `noise` times a normal variable per context and token, redrawn for every
rollout or fixed, and `rounding` times the error that float8_e4m3 makes when it rounds the inputs of the
logits' matmul.

All dials and the index of the arm are arguments of the compiled program, which runs all seeds of a cell
at once. Axis letters as in `problem`, and B prompts of a rollout, G samples of a prompt, N = B·G
responses.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drpo_jax.objectives import advantages
from drpo_jax.precision import fake_quantize
from experiments.exact import problem
from experiments.exact.arms import Sampled, any_coefficients
from experiments.exact.problem import Params, Shape, Task

# Tokens with µ at most this are the tail, as in the paper.
TAIL = 0.01
ADAM = optax.scale_by_adam()  # β = 0.9, 0.999 and ε = 1e-8, as in the paper


@dataclass(frozen=True)
class Schedule:
    """Sizes of a run, which are compiled in.

    Attributes:
      rollouts: number of rollouts.
      batch: B, prompts of a rollout, drawn without replacement.
      samples: G, responses to a prompt.
      mini_batch: prompts of an update, a divisor of `batch`.
      epochs: passes over a rollout.
      oldest: the largest staleness.
    """

    rollouts: int = 40
    batch: int = 12
    samples: int = 8
    mini_batch: int = 3
    epochs: int = 2
    oldest: int = 4

    @property
    def updates(self) -> int:
        """Updates per rollout."""
        return self.epochs * self.batch // self.mini_batch


class Dials(NamedTuple):
    """The settings of a run that are data: scalars, equal for all seeds of a cell."""

    arm: jax.Array  # int32, index in `ARMS`
    threshold: jax.Array
    learning_rate: jax.Array
    sgd: jax.Array  # bool: plain gradient steps instead of Adam
    scale: jax.Array  # factor of all advantages
    noise: jax.Array  # standard deviation of the sampler's logits, nats
    fixed: jax.Array  # bool: one draw of the noise for the whole run
    rounding: jax.Array  # of the inputs of the logits; 1 is float8_e4m3, 0 none
    staleness: jax.Array  # int32, rollouts between the sampler's weights and the learner's


class Rollout(NamedTuple):
    """A rollout, by prompt: [B, G, T], distributions [B, R, V], advantage [B, G]."""

    prompt: jax.Array  # int32 [B]
    rows: jax.Array  # int32, the context of each token
    tokens: jax.Array  # int32
    advantage: jax.Array
    old_logp_BxRxV: jax.Array
    behavior_logp_BxRxV: jax.Array


def pick(values_BxRxV: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the entries of the sampled tokens, [B, G, T]."""
    prompt = jnp.arange(len(rows))[:, None, None]
    return values_BxRxV[prompt, rows, tokens]


def sampler_logits(
    params: Params, prompts: jax.Array, dials: Dials, key: jax.Array, fixed_key: jax.Array
) -> jax.Array:
    """Returns the sampler's logits float32 [B, R, V]: those of `params` with the dialed numerics."""

    def rounded(exact):
        low = {name: fake_quantize(x) for name, x in params.items() if name != "bias"}
        error = problem.logits(low | {"bias": params["bias"]}, prompts) - exact
        return exact + dials.rounding * error

    def noisy(values):
        key_or_fixed = jax.lax.select(dials.fixed, fixed_key, key)
        keys = jax.vmap(lambda p: jax.random.fold_in(key_or_fixed, p))(prompts)
        draws = jax.vmap(lambda key: jax.random.normal(key, values.shape[1:]))(keys)
        return values + dials.noise * draws

    values = problem.logits(params, prompts)
    values = jax.lax.cond(dials.rounding > 0, rounded, lambda x: x, values)
    return jax.lax.cond(dials.noise > 0, noisy, lambda x: x, values)


def sample(
    task: Task, logp_BxRxV: jax.Array, samples: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws responses; returns contexts and tokens, int32 [B, G, T], by inversion of the CDF."""
    batch, rows, vocabulary = logp_BxRxV.shape
    steps = (rows - 1) // 2
    cdf = jnp.cumsum(jnp.exp(logp_BxRxV), axis=-1)
    uniform = jax.random.uniform(key, (batch, samples, 1 + steps)) * cdf[:, :1, -1:]

    def draw(cdf, uniform):
        return jnp.minimum((cdf <= uniform[..., None]).sum(axis=-1), vocabulary - 1)

    method = draw(cdf[:, :1], uniform[..., 0])
    row = problem.rows_of(task.key_V[method].astype(jnp.int32), steps)
    follow = draw(cdf[jnp.arange(batch)[:, None, None], row[..., 1:]], uniform[..., 1:])
    return row, jnp.concatenate([method[..., None], follow], axis=-1)


def collect(
    task: Task,
    params: Params,
    sampler: Params,
    dials: Dials,
    schedule: Schedule,
    key: jax.Array,
    fixed_key: jax.Array,
) -> tuple[Rollout, dict[str, jax.Array]]:
    """Samples a rollout from the weights `sampler` and scores it with `params`.

    Returns:
      The rollout, and what the tokens are like before any update.
    """
    order_key, token_key, noise_key, luck_key = jax.random.split(key, 4)
    prompts = jax.random.permutation(order_key, len(params["contexts"]))[: schedule.batch]
    mu = jax.nn.log_softmax(sampler_logits(sampler, prompts, dials, noise_key, fixed_key))
    old, synced = (jax.nn.log_softmax(problem.logits(p, prompts)) for p in (params, sampler))
    rows, tokens = sample(task, mu, schedule.samples, token_key)
    chance = problem.reward_probability(task, prompts[:, None], tokens)
    reward = (jax.random.uniform(luck_key, chance.shape) < chance).astype(jnp.float32)
    advantage = advantages("dr_grpo", reward.reshape(-1), schedule.samples).reshape(reward.shape)
    rollout = Rollout(prompts, rows, tokens, dials.scale * advantage, old, mu)
    mu, old, synced = (pick(table, rows, tokens) for table in (mu, old, synced))
    return rollout, {
        "sampled_reward": reward.mean(),
        "tail": (jnp.exp(mu) <= TAIL).mean(),
        "mismatch": abs(old - mu).mean(),
        "age": abs(jnp.exp(old) - jnp.exp(synced)).mean(),
        "numerics": abs(jnp.exp(synced) - jnp.exp(mu)).mean(),
    }


def loss(params: Params, part: Rollout, dials: Dials) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns −Σ c·log π/(N·T), whose gradient is that of the arm's objective, and metrics.

    c is a constant: the score coefficient ∂J/∂log π of the table at the present policy. Dividing by the
    number of responses and by the length is the aggregation of the DRPO paper, with T as its horizon.
    """
    logp_BxRxV = jax.nn.log_softmax(problem.logits(params, part.prompt))
    logp_BxGxT = pick(logp_BxRxV, part.rows, part.tokens)

    def terms(logp_BxRxV):
        tables = logp_BxRxV, part.behavior_logp_BxRxV, part.old_logp_BxRxV
        place = jnp.arange(len(part.rows))[:, None, None], part.rows
        advantage = jnp.broadcast_to(part.advantage[..., None], part.rows.shape)
        tokens = Sampled(
            *(pick(table, part.rows, part.tokens) for table in tables),
            advantage,
            lambda: (logp_BxRxV[place], part.behavior_logp_BxRxV[place]),
        )
        return tokens, *any_coefficients(dials.arm, tokens, dials.threshold)

    tokens, c, w = terms(jax.lax.stop_gradient(logp_BxRxV))
    w_before = terms(part.old_logp_BxRxV)[2]
    tail = jnp.exp(tokens.behavior_logp) <= TAIL
    metrics = {
        "drift": abs(jnp.exp(tokens.logp) - jnp.exp(tokens.old_logp)).mean(),
        "restrained": (w <= 0).mean(),
        "restrained_before": ((w <= 0) & (w_before <= 0)).mean(),
        "tail_coefficient": jnp.where(tail, abs(c), 0).sum() / jnp.maximum(abs(c).sum(), 1e-30),
        "largest_coefficient": abs(c).max(),
    }
    return -(c * logp_BxGxT).sum() / c.size, metrics


def learn(
    params: Params, optimizer_state: Any, rollout: Rollout, dials: Dials, schedule: Schedule
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Updates the policy with every mini-batch of a rollout, `epochs` times.

    Returns:
      The new parameters and state of the optimizer, and the metrics of `loss`, averaged over updates.
    """
    parts = jax.tree.map(lambda x: x.reshape(-1, schedule.mini_batch, *x.shape[1:]), rollout)

    def update(carry, index):
        params, state = carry
        part = jax.tree.map(lambda x: x[index % len(parts.prompt)], parts)
        gradient, metrics = jax.grad(loss, has_aux=True)(params, part, dials)
        direction, state = ADAM.update(gradient, state)
        direction = jax.tree.map(lambda a, g: jnp.where(dials.sgd, g, a), direction, gradient)
        params = jax.tree.map(lambda p, d: p - dials.learning_rate * d, params, direction)
        return (params, state), metrics

    carry, metrics = jax.lax.scan(update, (params, optimizer_state), jnp.arange(schedule.updates))
    return *carry, jax.tree.map(jnp.mean, metrics) | {
        "largest_coefficient": metrics["largest_coefficient"].max()
    }


def train(
    task: Task, params: Params, dials: Dials, schedule: Schedule, key: jax.Array
) -> dict[str, jax.Array]:
    """Trains one policy.

    Args:
      task, params: a warm start.
      dials, schedule: the settings.
      key: decides every draw. The draws of rollout k come from (key, k).

    Returns:
      `reward` float32 [rollouts + 1], the exact expected reward before the first and after each rollout;
      `key` float32 [rollouts + 1], the mean probability of the rare words that select method 1; and the
      mean over rollouts of every metric of `collect` and `loss` (of `largest_coefficient`, the maximum).
    """
    fixed_key = jax.random.fold_in(key, schedule.rollouts)

    def measure(params):
        logp = jax.nn.log_softmax(problem.logits(params))
        measures = problem.expected_reward, problem.key_probability
        return tuple(expectation(task, logp).mean() for expectation in measures)

    def step(carry, k):
        params, state, earlier = carry
        sampler = jax.tree.map(lambda x: x[dials.staleness], earlier)
        draws = jax.random.fold_in(key, k)
        rollout, before = collect(task, params, sampler, dials, schedule, draws, fixed_key)
        params, state, metrics = learn(params, state, rollout, dials, schedule)
        earlier = jax.tree.map(lambda x, new: jnp.concatenate([new[None], x[:-1]]), earlier, params)
        return (params, state, earlier), (measure(params), before | metrics)

    first = measure(params)
    earlier = jax.tree.map(lambda x: jnp.broadcast_to(x, (schedule.oldest + 1, *x.shape)), params)
    carry = params, ADAM.init(params), earlier
    _, (curves, metrics) = jax.lax.scan(step, carry, jnp.arange(schedule.rollouts))
    reward, keys = (jnp.append(a, b) for a, b in zip(first, curves))
    largest = metrics["largest_coefficient"].max()
    means = jax.tree.map(jnp.mean, metrics)
    return means | {"largest_coefficient": largest, "reward": reward, "key": keys}


@partial(jax.jit, static_argnames="shape")
def warm_starts(seeds: jax.Array, shape: Shape) -> tuple[Task, Params]:
    """Returns the warm start of each seed, int32 [seeds]."""
    return jax.vmap(lambda seed: problem.warm_start(_key(seed, 0), shape))(seeds)


@partial(jax.jit, static_argnames="schedule")
def runs(
    seeds: jax.Array, task: Task, params: Params, dials: Dials, schedule: Schedule
) -> dict[str, jax.Array]:
    """Runs `train` for each seed, int32 [seeds]; every result has a leading axis of seeds.

    A seed decides the task, the warm start and all draws. Arms with the same seed are therefore paired.
    """

    def run(seed, task, params):
        return train(task, params, dials, schedule, _key(seed, 1))

    return jax.vmap(run)(seeds, task, params)


def _key(seed: jax.Array, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)
