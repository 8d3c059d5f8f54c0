import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from drpo_jax.parallel import make_mesh
from drpo_jax.sampler import SamplingParams
from drpo_jax.sampler.token import draw, filter_logits, sample_token

PROBABILITIES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 4000


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({}, 6),
        ({"top_k": 3}, 3),
        ({"top_k": 99}, 6),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.66}, 3),
        ({"top_p": 0.01}, 1),
        ({"top_k": 4, "top_p": 0.85}, 3),  # top-p applies after top-k: 0.8 / 0.9 ≥ 0.85
        ({"temperature": 2.0}, 6),
        ({"temperature": 0.5, "top_p": 0.6}, 1),  # 0.4² / Σp² = 0.61
    ],
    ids=str,
)
def test_frequencies_and_logprobs_are_those_of_the_filtered_distribution(filters, kept):
    params = SamplingParams(max_tokens=1, **filters)
    order = np.array([3, 0, 5, 1, 4, 2])  # unsorted
    full = PROBABILITIES[order] ** (1 / params.temperature)
    full /= full.sum()
    filtered = np.where(full >= np.sort(full)[-kept], full, 0.0)
    filtered /= filtered.sum()

    uniform = jax.random.uniform(jax.random.key(0), DRAWS)
    logits = jnp.tile(LOGITS[order], (DRAWS, 1))
    sampled = jax.jit(sample_token, static_argnums=2)(logits, uniform, params)
    token, logp, full_logp, entropy = map(np.asarray, sampled[:4])
    np.testing.assert_allclose(entropy, -np.sum(full * np.log(full)), rtol=1e-5)
    np.testing.assert_allclose(logp, np.log(filtered[token]), atol=2e-6)
    np.testing.assert_allclose(full_logp, np.log(full[token]), atol=2e-6)
    counts, expected = np.bincount(token, minlength=6), DRAWS * filtered
    assert not np.any(counts[expected == 0])
    held = expected > 0
    chi_square = np.sum((counts - expected)[held] ** 2 / expected[held])
    assert chi_square < 25  # exceeded once in 10,000 runs with 5 degrees of freedom


def test_filters_keep_ties_at_the_border():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(filter_logits(logits, top_k=2, top_p=1.0)).tolist() == [[1, 1, 1, 0]]
    assert np.isfinite(filter_logits(logits, top_k=0, top_p=0.6)).tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_sorted_probabilities(top_p):
    logits = np.random.default_rng(0).normal(size=(16, 300)).astype(np.float32) * 5
    logits[:, ::7] = -np.inf
    kept = np.isfinite(filter_logits(jnp.array(logits), top_k=0, top_p=top_p))
    for row, ours in zip(logits.astype(np.float64), kept):
        order = np.argsort(-row)
        probs = np.exp(row[order] - row.max())
        count = 1 + np.searchsorted(np.cumsum(probs) / probs.sum(), top_p)
        assert set(np.flatnonzero(ours)) == set(order[:count])


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.6, 0.95), (0.7, 0.9), (0.9, 0.5), (1.0, 0.95)]
)
def test_the_compiled_nucleus_keeps_its_border(temperature, top_p):
    """Compiled behind a matmul, where XLA divides by the temperature in several fusions."""
    rng, params = np.random.default_rng(0), SamplingParams(1, temperature=temperature, top_p=top_p)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 32), (32, 512)))
    uniform = rng.random(256, dtype=np.float32)
    sampled = jax.jit(lambda h, w, u: sample_token(h @ w, u, params))(hidden, head, uniform)
    kept = np.exp(np.asarray(sampled.full_logp, np.float64) - np.asarray(sampled.sampled_logp))
    assert kept.min() > top_p - 1e-4


@pytest.mark.parametrize("scaled", [lambda x: 0.37 * x, lambda x: 30 * jnp.tanh(x / 30)])
def test_filters_keep_the_token_at_the_threshold_after_any_computation(scaled):
    """XLA may compute the logits in several fusions, with different last bits."""
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 32), (32, 512)))

    @jax.jit
    def filtered(hidden, head):
        logits = scaled(hidden @ head)
        kept = filter_logits(logits, 0, 0.9), filter_logits(logits, 7, 1.0)
        return jax.nn.softmax(logits), *(mask > -jnp.inf for mask in kept)

    probabilities, nucleus, top = map(np.asarray, filtered(hidden, head))
    assert np.sum(probabilities * nucleus, axis=1).min() > 0.9 - 1e-4
    least = np.min(np.where(nucleus, probabilities, 1), axis=1)
    assert np.max(np.sum(probabilities * nucleus, axis=1) - least) < 0.9 + 1e-4
    assert np.all(np.sum(top, axis=1) == 7)


def test_greedy_takes_the_most_likely_token():
    params = SamplingParams(max_tokens=1, temperature=0.0, top_k=2, top_logprobs=3)
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 0.0, -1.0]])
    token, logp, full_logp, _, ids, top_logp = sample_token(logits, np.array([0.9, 0.1]), params)
    assert token.tolist() == [1, 0]
    expected = jax.nn.log_softmax(logits)[jnp.arange(2), token]
    np.testing.assert_allclose(logp, expected, atol=1e-6)
    np.testing.assert_allclose(full_logp, expected, atol=1e-6)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    np.testing.assert_allclose(np.exp(top_logp).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(top_logp[:, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_top_logprobs_are_those_of_the_unfiltered_distribution():
    params = SamplingParams(max_tokens=1, temperature=0.5, top_k=1, top_logprobs=2)
    ids, logp = sample_token(LOGITS[None], np.array([0.5]), params)[4:]
    full = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(logp[0], np.log(full[ids[0]]), atol=1e-6)
    assert full[ids[0]].tolist() == sorted(full)[:-3:-1]


@pytest.mark.parametrize(
    "field, value",
    [("max_tokens", 0), ("samples", 0), ("temperature", -0.5), ("top_k", -1), ("top_p", 0.0)]
    + [("top_logprobs", -1), ("top_p", 1.5), ("max_tokens", 8.0), ("samples", "2"), ("top_k", True)]
    + [("temperature", "1"), ("routes", "yes"), ("stop", ("</s>",)), ("stop", (-1,))]
    + [("stop", (None,)), ("stop", (2.0,))],
)
def test_params_out_of_range_raise(field, value):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{"max_tokens": 4, field: value})
    assert str(error.value).startswith(f"SamplingParams.{field} must be ")
    assert str(error.value).endswith(f", got {value!r}")


def test_stop_takes_any_sequence_or_a_single_token():
    for stop in ([5, 6], np.array([5, 6]), (5, 6)):
        assert SamplingParams(4, stop=stop) == SamplingParams(4, stop=(5, 6))
        assert hash(SamplingParams(4, stop=stop)) == hash(SamplingParams(4, stop=(5, 6)))
    assert SamplingParams(4, stop=5).stop == (5,)


def test_top_tokens_and_filters_on_a_mesh_are_those_of_one_device():
    logits = jax.random.normal(jax.random.key(1), (8, 24))
    uniform = jax.random.uniform(jax.random.key(2), 8)
    # A shard holds 6 tokens, fewer than top_k and top_logprobs.
    params = SamplingParams(max_tokens=1, top_k=7, top_p=0.8, top_logprobs=9)
    expected = jax.jit(sample_token, static_argnums=2)(logits, uniform, params)
    mesh = make_mesh(data=2, tensor=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", "tensor")))
        ours = jax.jit(sample_token, static_argnums=2)(placed, uniform, params)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_draws_from_a_large_vocabulary():
    """Also across blocks and shards of a mesh; tokens without mass are never drawn."""
    vocabulary, rows = 4 * 700, 8
    rng = np.random.default_rng(0)
    mass = rng.exponential(size=(rows, vocabulary)).astype(np.float32)
    mass[rng.random(mass.shape) < 0.7] = 0
    mass[0, :2000] = 0  # empty blocks and shards
    mass[1] = np.eye(vocabulary)[2799]
    mesh = make_mesh(data=2, tensor=4)
    total = np.cumsum(mass.astype(np.float64), axis=1)
    for uniform in (0.0, 1e-7, 0.3, 0.77777, 1 - 2**-23):
        at = np.full(rows, uniform, np.float32)
        index = np.asarray(jax.jit(draw)(mass, at))
        with jax.set_mesh(mesh):
            placed = jax.device_put(mass, NamedSharding(mesh, PartitionSpec("data", "tensor")))
            np.testing.assert_array_equal(jax.jit(draw)(placed, at), index)
        picked = np.arange(rows), index
        assert np.all(mass[picked] > 0)
        target = uniform * total[:, -1]
        slack = 3e-7 * total[:, -1]
        assert np.all(total[picked] >= target - slack)
        assert np.all(total[picked] - mass[picked] <= target + slack)


@pytest.mark.parametrize("vocabulary", [100, 40_000])
def test_the_tail_is_not_drawn_where_partial_sums_are_rounded(vocabulary):
    """The largest random number selects the last token with a non-negligible probability."""
    rng, rows = np.random.default_rng(0), 64
    mass = np.exp(2 * rng.normal(size=(rows, vocabulary))).astype(np.float32)
    mass[:, -vocabulary // 8 :] = 1e-30
    mass[:, ::3] = 1e-30
    for uniform in (1 - 2**-23, 1 - 2**-24):  # jax.random.uniform has 23 bits.
        token = np.asarray(jax.jit(draw)(mass, np.full(rows, uniform, np.float32)))
        assert np.min(mass[np.arange(rows), token]) > 1e-6
