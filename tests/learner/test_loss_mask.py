"""Loss masks: masked tokens are excluded from all sums and denominators, but remain context."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.learner import (
    UpdateSettings,
    gradients,
    lay_out,
    make_batch,
    policy,
    response_trace,
    summarize,
)
from drpo_jax.loop.learn import make_loss_mask
from drpo_jax.metrics import reduce_pairs
from drpo_jax.models import Hidden
from drpo_jax.objectives import AGGREGATIONS

pytestmark = pytest.mark.usefixtures("compile_quickly")

N, PROMPT, R, V, D, HORIZON, DELTA = 8, 4, 6, 20, 8, 10, 0.02
PROMPTS = np.array([3, 1, 4, 2, 2, 4, 1, 3], np.int32)
RESPONSES = np.array([6, 1, 3, 6, 4, 2, 5, 4], np.int32)
WHOLE = np.arange(R) < RESPONSES[:, None]
KEPT = np.array([1, 1, 0, 0, 1, 1, 0, 1], bool)  # The others are filtered.
# The environment inserted tokens into three responses; one of them is filtered as well.
INSERTED = np.zeros((N, R), bool)
INSERTED[0, 2:4] = INSERTED[4, 0] = INSERTED[6, 1:3] = True
MASK = WHOLE & KEPT[:, None] & ~INSERTED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model whose hidden state is the cumulative sum of a sequence's embeddings."""

    embed: jax.Array
    head: jax.Array

    def hidden(self, tokens, positions, segment_ids, compute, routes=None):
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None]
        before = same & jnp.tri(tokens.shape[1], dtype=bool)
        return Hidden(jnp.tanh(before.astype(jnp.float32) @ self.embed[tokens]), None, {})

    def head_weight(self):
        return self.head


RNG = np.random.default_rng(0)
MODEL = Tiny(*(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((V, D), (D, V))))
TOKENS = RNG.integers(V, size=(N, PROMPT + R)).astype(np.int32)
MU = RNG.normal(-2.5, 0.4, size=(N, R)).astype(np.float32)
PER_RESPONSE = RNG.normal(size=N).astype(np.float32)
PER_TOKEN = RNG.normal(size=(N, R)).astype(np.float32)
EXTRA = {
    "old_logp": (MU + 0.1).astype(np.float32),
    "ref_logp": (MU - 0.3).astype(np.float32),
    "correction": RNG.choice([0.0, 0.5, 1.5], size=(N, R)).astype(np.float32),
}
SETTINGS = UpdateSettings(policy("drpo", delta=DELTA), "token-mean", horizon=HORIZON, head_chunk=16)


@partial(jax.jit, static_argnums=2)
def learn(model, batch, settings):
    grads, trace, metrics = gradients(model, batch, settings=settings)
    return grads, trace, metrics["loss"], summarize(trace, batch)


def run(rows, mask, advantage, pack=False, micro_batches=1, extra=(), **settings):
    """(gradient, trace [n, R], loss, summary) of some of the eight sequences."""
    settings = dataclasses.replace(SETTINGS, pack=pack, micro_batches=micro_batches, **settings)
    layout = lay_out(PROMPTS[rows], RESPONSES[rows], PROMPT + R, pack, micro_batches)
    inputs = {"behavior_logp": MU[rows], "advantage": advantage[rows]}
    inputs |= {name: EXTRA[name][rows] for name in extra}
    batch = make_batch(layout, TOKENS[rows], inputs, loss_mask=mask[rows])
    grads, trace, loss, summary = learn(MODEL, batch, settings)
    return grads, jax.tree.map(lambda a: layout.take(a, R), trace), loss, summary


def log_probabilities():
    """log π of the response tokens in NumPy, float64 [N, R]."""
    embed, head = (np.asarray(a, np.float64) for a in (MODEL.embed, MODEL.head))
    logp = np.zeros((N, R))
    for i, t in zip(*np.nonzero(WHOLE)):
        place = PROMPTS[i] + t
        logits = np.tanh(embed[TOKENS[i, :place]].sum(0)) @ head
        logp[i, t] = logits[TOKENS[i, place]] - np.log(np.exp(logits).sum())
    return logp


def loss_by_hand(aggregation, mask, advantage):
    """The loss of DRPO in plain loops over the responses and tokens that carry a loss."""
    logp, mu = log_probabilities(), MU.astype(np.float64)
    A = np.broadcast_to(advantage if advantage.ndim == 2 else advantage[:, None], mask.shape)
    r, shift = np.exp(logp - mu), np.exp(logp) - np.exp(mu)
    J = r * A - abs(A) * shift**2 / np.exp(mu) / (2 * DELTA)
    responses = [J[i][mask[i]] for i in range(N) if mask[i].any()]
    if aggregation == "token-mean":
        return -np.concatenate(responses).mean()
    by_response = {
        "seq-mean-token-mean": np.mean,
        "seq-mean-token-sum": np.sum,
        "seq-mean-token-sum-norm": lambda x: x.sum() / HORIZON,
    }[aggregation]
    return -np.mean([by_response(x) for x in responses])


def assert_same_gradients(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other))):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * abs(b).max())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_leave_numerator_and_denominator(aggregation):
    """Against NumPy, and against the batch without the filtered rows, packed and in micro-batches."""
    every, kept = np.arange(N), np.flatnonzero(KEPT)
    advantage = PER_TOKEN
    alone = run(kept, MASK, advantage, aggregation=aggregation)
    expected = loss_by_hand(aggregation, MASK, advantage)
    for pack, micro_batches in ((False, 1), (True, 4)):
        masked = run(every, MASK, advantage, pack, micro_batches, aggregation=aggregation)
        np.testing.assert_allclose(masked[2], expected, rtol=2e-5)
        np.testing.assert_allclose(masked[2], alone[2], rtol=2e-5)
        assert_same_gradients(masked[0], alone[0])
        for name in ("logp", "coefficient", "weight", "entropy"):
            ours, there = (getattr(x[1], name) for x in (masked, alone))
            np.testing.assert_allclose(ours[kept], there, rtol=1e-4, atol=1e-5)
            assert not ours[~MASK].any()
        (pairs, extremes), (other, other_extremes) = masked[3], alone[3]
        np.testing.assert_equal(np.asarray(pairs["entropy"][1]), MASK.sum())
        for name, mean in reduce_pairs(other).items():
            ours = reduce_pairs(pairs)[name]
            np.testing.assert_allclose(ours, mean, rtol=1e-4, atol=1e-6, err_msg=name)
        for name, value in other_extremes.items():
            np.testing.assert_allclose(extremes[name], value, rtol=1e-4, err_msg=name)


def test_penalties_and_corrections_leave_masked_tokens_out():
    """KL to the reference, distance to µ, entropy bonus and correction, with their metrics."""
    settings = dict(
        objective=policy("minirl", kl="k3", kl_coefficient=0.3, kl_behavior=0.1),
        aggregation="seq-mean-token-mean",
        entropy_bonus=0.2,
        extra=tuple(EXTRA),
    )
    kept = np.flatnonzero(KEPT)
    alone = run(kept, MASK, PER_RESPONSE, **settings)
    masked = run(np.arange(N), MASK, PER_RESPONSE, True, 2, **settings)
    np.testing.assert_allclose(masked[2], alone[2], rtol=2e-5)
    assert_same_gradients(masked[0], alone[0])
    ours, expected = (reduce_pairs(x[3][0]) for x in (masked, alone))
    for name in ("policy/kl_reference", "correction/mean", "correction/dropped", "entropy"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(ours["correction/mean"], EXTRA["correction"][MASK].mean(), rtol=1e-6)


def test_masked_tokens_stay_context():
    """The logprobs of the other tokens are those of the whole sequence."""
    layout = lay_out(PROMPTS, RESPONSES, PROMPT + R)
    batch = make_batch(layout, TOKENS, {}, loss_mask=MASK)
    trace = jax.jit(partial(response_trace, settings=SETTINGS))(MODEL, batch)
    expected = np.where(MASK, log_probabilities(), 0)
    np.testing.assert_allclose(layout.take(trace.logp, R), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["gspo", "trm", "drpo_prefix"])
def test_sequence_objectives_see_the_tokens_with_a_loss_only(name):
    """Arbitrary µ at masked tokens changes nothing; for GSPO, s is the mean over the other tokens."""
    settings = dict(objective=policy(name), aggregation="seq-mean-token-mean")
    before = run(np.arange(N), MASK, PER_RESPONSE, **settings)
    layout = lay_out(PROMPTS, RESPONSES, PROMPT + R)
    inputs = {"behavior_logp": np.where(MASK, MU, -20), "advantage": PER_RESPONSE}
    batch = make_batch(layout, TOKENS, inputs, loss_mask=MASK)
    after = learn(MODEL, batch, dataclasses.replace(SETTINGS, **settings))
    assert before[2] == after[2]
    jax.tree.map(np.testing.assert_array_equal, before[0], after[0])
    if name == "gspo":
        log_r = np.where(MASK, log_probabilities() - MU, 0).sum(1) / np.maximum(MASK.sum(1), 1)
        A, s = PER_RESPONSE, np.exp(log_r)
        clipped = np.where(A > 0, s > 1 + 4e-4, s < 1 - 3e-4)
        expected = np.where(MASK, np.where(clipped, 0, s * A)[:, None], 0)
        np.testing.assert_allclose(before[1].coefficient, expected, rtol=1e-4, atol=1e-5)


def test_an_advantage_per_token_is_that_of_the_response_where_they_are_equal():
    per_token = np.broadcast_to(PER_RESPONSE[:, None], (N, R))
    one, other = (run(np.arange(N), WHOLE, a, pack=True) for a in (PER_RESPONSE, per_token))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_nothing_to_learn_from_is_no_gradient():
    grads, trace, loss, _ = run(np.arange(N), np.zeros_like(MASK), PER_RESPONSE)
    assert loss == 0 and not any(np.any(a) for a in jax.tree.leaves((grads, trace)))


def test_overlong_filtering_masks_the_responses_without_an_end():
    rollouts = SimpleNamespace(mask=lambda: WHOLE & ~INSERTED, finished=KEPT)
    for filtering, expected in ((False, WHOLE & ~INSERTED), (True, MASK)):
        config = SimpleNamespace(train=SimpleNamespace(overlong_filtering=filtering))
        np.testing.assert_array_equal(make_loss_mask(config, rollouts), expected)
        among = np.arange(expected.shape[1]) > 0
        restricted = make_loss_mask(config, rollouts, np.broadcast_to(among, expected.shape))
        np.testing.assert_array_equal(restricted, expected & among)
