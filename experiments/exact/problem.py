"""The problem of level 1: a small language with a rare word that causes the outcome, and exact rewards.

A response has T tokens. Its first token is the method: a few *keys*, rare words of a Zipf vocabulary,
select method 1, and all others select method 0. Each of the following T − 1 steps has one right token,
which depends on the prompt, the step and the method. The reward is 0 unless all steps are right. It is
then 1 under method 1, and under method 0 with the probability `luck`: a common word never gets further.

The warm start gets most steps right under method 1 and fewer under method 0, and it knows the keys as
the rare words they are. A token of the tail therefore causes the outcome. Whoever suppresses it ends at
`luck`, and whoever amplifies the tail at random destroys the steps. The reward belongs to the whole
response: the advantage of a token is mostly the noise of the other T − 1 tokens, and errors compound
with the length.

The policy is a softmax over V tokens in each of P·R contexts, R = 1 + 2·(T − 1) per prompt. The logits
are a product of features, so that an update of one context moves all others, as in a network:

    logits_PxRxV = contexts_PxRxD · tokens_DxV + bias_V

Axis letters: P prompts, R contexts of a prompt, V tokens, D features, M = 2 methods, S = T − 1 steps.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]  # contexts [P, R, D], tokens [D, V], bias [V]; float32


@dataclass(frozen=True)
class Shape:
    """Sizes of the problem and of its warm start.

    Attributes:
      prompts: P, each with its own right tokens.
      length: T, the method and T − 1 steps.
      vocabulary: V.
      width: D. Below the number of contexts, an update of one context moves the others.
      luck: probability of a reward for right steps under method 0.
      keys: rare words that select method 1.
      common: so many of the most frequent words are no keys.
      log_odds: mean log-odds of a right step in the warm start, under methods 0 and 1.
      spread: standard deviation of the log-odds over contexts.
      fit: Adam steps of the warm start.
    """

    prompts: int = 24
    length: int = 6
    vocabulary: int = 128
    width: int = 24
    luck: float = 0.5
    keys: int = 8
    common: int = 32
    log_odds: tuple[float, float] = (1.0, 3.0)
    spread: float = 0.7
    fit: int = 300

    @property
    def steps(self) -> int:
        """S = T − 1, the steps that follow the method."""
        return self.length - 1

    @property
    def rows(self) -> int:
        """R, the contexts of a prompt."""
        return 1 + 2 * self.steps


class Task(NamedTuple):
    """What is rewarded."""

    key_V: jax.Array  # bool, the words that select method 1
    right_PxMxS: jax.Array  # int32, the right tokens
    luck_M: jax.Array  # float32, the probability of a reward if all steps are right


def logits(params: Params, prompts: jax.Array | None = None) -> jax.Array:
    """Returns float32 [P, R, V]; for the prompts with the indices `prompts` only, if there are any."""
    contexts = params["contexts"] if prompts is None else params["contexts"][prompts]
    return jnp.einsum("prd,dv->prv", contexts, params["tokens"]) + params["bias"]


def rows_of(method: jax.Array, steps: int) -> jax.Array:
    """Returns the contexts int32 [..., T] of responses with the method [...] (0 or 1)."""
    follow = 1 + method[..., None] * steps + jnp.arange(steps)
    return jnp.concatenate([jnp.zeros_like(follow[..., :1]), follow], axis=-1)


def reward_probability(task: Task, prompt: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the probability of a reward, float32 [...].

    Args:
      task: what is rewarded.
      prompt: int32 [...].
      token: int32 [..., T], the responses.
    """
    method = task.key_V[token[..., 0]].astype(jnp.int32)
    right = (token[..., 1:] == task.right_PxMxS[prompt, method]).all(axis=-1)
    return jnp.where(right, task.luck_M[method], 0.0)


def solved(task: Task, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns the probability of a reward after the method, float32 [P, M]."""
    return task.luck_M * jnp.exp(step_logp(task, logp_PxRxV).sum(axis=-1))


def step_logp(task: Task, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns the log-probability of each right step, float32 [P, M, S]."""
    steps = logp_PxRxV[:, 1:].reshape(*task.right_PxMxS.shape, -1)
    return jnp.take_along_axis(steps, task.right_PxMxS[..., None], axis=-1)[..., 0]


def key_probability(task: Task, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns the probability of method 1, float32 [P]."""
    return jnp.where(task.key_V, jnp.exp(logp_PxRxV[:, 0]), 0.0).sum(axis=-1)


def expected_reward(task: Task, logp_PxRxV: jax.Array) -> jax.Array:
    """Returns the exact expected reward of each prompt, float32 [P]: no sample is drawn."""
    solved_PxM = solved(task, logp_PxRxV)
    key_P = key_probability(task, logp_PxRxV)
    return (1 - key_P) * solved_PxM[:, 0] + key_P * solved_PxM[:, 1]


def warm_start(key: jax.Array, shape: Shape) -> tuple[Task, Params]:
    """Returns a task and the policy that training starts from.

    The target of the fit is exact: Zipf's law for the method, and for each step the right token with
    its probability and Zipf's law for the rest. The fit minimizes the mean KL(target‖policy).

    Args:
      key: decides the task, the targets and the initial parameters.
      shape: the sizes.
    """
    keys = iter(jax.random.split(key, 5))
    size = shape.prompts, 2, shape.steps
    zipf_V = -jnp.log1p(jnp.arange(shape.vocabulary, dtype=jnp.float32))
    rare = jax.random.permutation(next(keys), jnp.arange(shape.common, shape.vocabulary))
    key_V = jnp.zeros(shape.vocabulary, bool).at[rare[: shape.keys]].set(True)
    right_PxMxS = jax.random.categorical(next(keys), zipf_V, shape=size)
    task = Task(key_V, right_PxMxS, jnp.array([shape.luck, 1.0], jnp.float32))

    odds_M = jnp.asarray(shape.log_odds)[:, None]
    odds_PxMxS = odds_M + shape.spread * jax.random.normal(next(keys), size)
    one_hot = jax.nn.one_hot(right_PxMxS, shape.vocabulary, dtype=bool)
    rest = jax.nn.log_softmax(jnp.where(one_hot, -jnp.inf, zipf_V))
    right, wrong = (jax.nn.log_sigmoid(x)[..., None] for x in (odds_PxMxS, -odds_PxMxS))
    steps = jnp.where(one_hot, right, wrong + rest)
    steps = steps.reshape(shape.prompts, -1, shape.vocabulary)
    method = jnp.broadcast_to(jax.nn.log_softmax(zipf_V), (shape.prompts, 1, shape.vocabulary))
    target = jnp.exp(jnp.concatenate([method, steps], axis=1))

    scale = shape.width**-0.25  # The products of two features then have the variance 1.
    contexts = shape.prompts, shape.rows, shape.width
    params = {
        "contexts": scale * jax.random.normal(next(keys), contexts),
        "tokens": scale * jax.random.normal(next(keys), (shape.width, shape.vocabulary)),
        "bias": zipf_V,
    }
    return task, _fit(params, target, shape.fit)


def _fit(params: Params, target: jax.Array, steps: int) -> Params:
    """Minimizes the mean cross-entropy against `target` [P, R, V] by Adam with a decaying rate."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def loss(params):
        return -(target * jax.nn.log_softmax(logits(params))).sum(axis=-1).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]
