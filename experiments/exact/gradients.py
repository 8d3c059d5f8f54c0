"""The exact gradient of an objective: what an infinite number of sampled groups would give.

The reward is 0 or 1, so that the advantage of a sample of a group of G takes 2·G values: with reward R
and k other successes, Â = R − (R + k)/G, where k is binomial. The expected coefficient of a token `a`
in the context `s` of a prompt, and with it the expected gradient, are finite sums:

    c̄(s, a) = Σ_R P(R | s, a) Σ_k Binomial(k; G − 1, ρ)·c(π, µ, Â)
    ∂/∂z(s, a) = n(s, a)·c̄(s, a) − π(a|s)·Σ_b n(s, b)·c̄(s, b)         n(s, a) = P(s visited)·µ(a|s)

z are logits, ρ is the expected reward of the prompt under µ. This covers every arm in which c depends
on the token alone, not on its whole response. The policy gradient itself, ∂E_π[R]/∂z, is the same sum
with π for µ and Q(s, a) − V(s) for c̄. Axis letters as in `problem`; K = G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import binom
from jax.typing import ArrayLike

from experiments.exact import problem
from experiments.exact.arms import Arm, Sampled, coefficients
from experiments.exact.problem import Params, Task

# Upper edges of the bins of µ.
EDGES = (1e-3, 1e-2, 1e-1, 0.5, 0.9, 1.0)


class Expected(NamedTuple):
    """Expectations for each prompt, context and token, float32 [P, R, V]."""

    visits: jax.Array  # n, how often a response has the token
    coefficient: jax.Array  # c̄
    size: jax.Array  # E|c|
    square: jax.Array  # E[c²]


def outcome(task: Task, logp_PxRxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the probability of each context [P, R] and of a reward given a token there [P, R, V]."""
    solved_PxM = problem.solved(task, logp_PxRxV)
    key_P = problem.key_probability(task, logp_PxRxV)
    prompts, rows, vocabulary = logp_PxRxV.shape
    steps = (rows - 1) // 2
    reach_PxM = jnp.stack([1 - key_P, key_P], axis=-1)
    reach_PxR = jnp.concatenate([jnp.ones((prompts, 1)), jnp.repeat(reach_PxM, steps, axis=1)], 1)
    method = jnp.where(task.key_V, solved_PxM[:, 1:], solved_PxM[:, :1])
    others = solved_PxM[..., None] / jnp.exp(problem.step_logp(task, logp_PxRxV))
    follow = jax.nn.one_hot(task.right_PxMxS, vocabulary) * others[..., None]
    reward = jnp.concatenate([method[:, None], follow.reshape(prompts, rows - 1, -1)], axis=1)
    return reach_PxR, reward


def expected(
    arm: Arm,
    task: Task,
    tables: tuple[jax.Array, jax.Array, jax.Array],
    samples: int,
    threshold: ArrayLike,
    scale: ArrayLike = 1.0,
) -> Expected:
    """Returns the expectations of an arm.

    Args:
      arm: not `by_sequence`.
      task: what is right.
      tables: log π, log µ and log π_old, float32 [P, R, V], nats.
      samples: G.
      threshold: of the arm.
      scale: factor of the advantages.

    Raises:
      ValueError: the arm has no exact gradient here.
    """
    if arm.by_sequence:
        raise ValueError(
            f"{arm.label}: c of a token depends on its whole response; an exact gradient needs an arm "
            "whose objective takes no mask"
        )
    logp, behavior_logp, old_logp = tables
    reach, reward = outcome(task, behavior_logp)
    success_P = problem.expected_reward(task, behavior_logp)
    R_2x1, k_K = jnp.arange(2.0)[:, None], jnp.arange(float(samples))
    others_PxK = binom.pmf(k_K, samples - 1, success_P[:, None])
    advantage_2xK = scale * (R_2x1 - (R_2x1 + k_K) / samples)
    share = jnp.stack([1 - reward, reward])[:, None] * others_PxK.T[:, :, None, None]

    shape = share.shape  # [2, K, P, R, V]
    tokens = Sampled(
        *(jnp.broadcast_to(table, shape) for table in tables),
        jnp.broadcast_to(advantage_2xK[..., None, None, None], shape),
        lambda: tuple(
            jnp.broadcast_to(table[:, :, None], (*shape, shape[-1]))
            for table in (logp, behavior_logp)
        ),
    )
    c, _ = coefficients(arm, tokens, threshold)
    visits = reach[..., None] * jnp.exp(behavior_logp)
    means = (jnp.sum(share * x, axis=(0, 1)) for x in (c, abs(c), c**2))
    return Expected(visits, *means)


def logit_gradient(weighted_PxRxV: jax.Array, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns ∂/∂z of Σ weighted·log π with constant weights, float32 [P, R, V]."""
    total = weighted_PxRxV.sum(axis=-1, keepdims=True)
    return weighted_PxRxV - jnp.exp(logp_PxRxV) * total


def parameter_gradient(params: Params, terms: Expected) -> Params:
    """Returns the gradient of the mean over prompts and tokens of a response, as `run.loss` has it."""

    def total(params):
        logp = jax.nn.log_softmax(problem.logits(params))
        return (terms.visits * terms.coefficient * logp).sum()

    prompts, rows, _ = terms.visits.shape
    length = 1 + (rows - 1) // 2
    return jax.tree.map(lambda g: g / (prompts * length), jax.grad(total)(params))


def policy_gradient(task: Task, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns ∂E_π[R]/∂z of each prompt by autodiff of the exact expected reward, float32 [P, R, V]."""

    def reward(z):
        return problem.expected_reward(task, jax.nn.log_softmax(z)).sum()

    return jax.grad(reward)(logp_PxRxV)


def by_bin(values: jax.Array, behavior_logp: jax.Array) -> jax.Array:
    """Sums values [P, R, V] over the tokens of each bin of µ; returns [len(EDGES)]."""
    index = jnp.searchsorted(jnp.asarray(EDGES[:-1]), jnp.exp(behavior_logp))
    return jnp.zeros(len(EDGES)).at[index].add(values)


def summary(
    arm: Arm,
    task: Task,
    tables: tuple[jax.Array, jax.Array, jax.Array],
    samples: int,
    threshold: ArrayLike,
) -> dict[str, jax.Array]:
    """Compares the gradient of an arm with the policy gradient, in logits, by bins of µ.

    Returns:
      By bin, float32 [len(EDGES)]: `tokens`, the share of sampled tokens; `coefficient`, that of Σ|c|;
      `second_moment`, that of E‖c·∂log π/∂z‖², the noise of a single token; `energy`, that of the
      squared exact gradient; `bias`, the squared distance to (1 − 1/G)·∂E_π[R]/∂z, in units of its
      squared norm. Over all: `cosine` with the policy gradient, and `noise`, E‖c·∂log π/∂z‖² per
      response in units of the squared norm of the policy gradient. 1 − 1/G is the factor of a group mean
      that contains the sample itself.
    """
    logp, behavior_logp, _ = tables
    terms = expected(arm, task, tables, samples, threshold)
    gradient = logit_gradient(terms.visits * terms.coefficient, logp)
    true = (1 - 1 / samples) * policy_gradient(task, logp)
    pi = jnp.exp(logp)
    norm = 1 - 2 * pi + (pi**2).sum(axis=-1, keepdims=True)  # ‖∂log π/∂z‖²
    second = terms.visits * terms.square * norm
    squared = (true**2).sum()
    sums = {
        "tokens": terms.visits,
        "coefficient": terms.visits * terms.size,
        "second_moment": second,
        "energy": gradient**2,
    }
    shares = {name: by_bin(x, behavior_logp) / x.sum() for name, x in sums.items()}
    return shares | {
        "bias": by_bin((gradient - true) ** 2, behavior_logp) / squared,
        "cosine": (gradient * true).sum() / jnp.sqrt((gradient**2).sum() * squared),
        "noise": second.sum() / squared,
    }
