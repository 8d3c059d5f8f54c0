import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.learner import UpdateSettings, lay_out, likelihood, make_batch, response_trace
from drpo_jax.models import Compute, ModelConfig, Ring, Transformer, router_metrics
from drpo_jax.parallel import SAMPLER_RULES, make_mesh, shardings
from drpo_jax.sampler import Rollouts, Sampler, SamplingParams
from drpo_jax.sampler.sizes import ring_sizes
from drpo_jax.sampler.slots import decode, empty_slots

SIZES = dict(vocab_size=64, hidden_size=32, layers=2, heads=6, kv_heads=2, head_dim=8)
CONFIG = ModelConfig(**SIZES, experts=5, experts_per_token=2, expert_size=24, rope_theta=1e4)
DENSE = ModelConfig(**SIZES, mlp_size=48, rope_theta=1e4)
KEY = jax.random.key(5)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
PROMPTS = [[3, 9, 27, 1], [5], [8, 8, 60, 2, 40, 41, 7], [11, 12], [63, 0, 0, 1, 2]]
PARAMS = SamplingParams(max_tokens=9, samples=3, temperature=0.7, top_k=20, stop=(4, 17, 30))
GREEDY = SamplingParams(max_tokens=5, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    model = jax.jit(lambda key: Transformer(CONFIG, key))(jax.random.key(1))
    model.lm_head[...] = 2 * model.lm_head[...]  # sharper, so that tokens differ in probability
    return model


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, slots=6, decode_steps=5, prompt_length=8)


@pytest.fixture(scope="module")
def rollouts(sampler):
    assert sampler.compilations() == 0
    rollouts = sampler.generate(PROMPTS, PARAMS, KEY)
    assert 0 < sampler.compilations() <= sampler.most_compilations(PARAMS)
    return rollouts


def learner_trace(model, rollouts, temperature):
    """Returns the learner's TokenTrace of sampled responses."""
    settings = UpdateSettings(likelihood, "token-mean", 1, temperature=temperature)
    lengths = rollouts.prompt_lengths, rollouts.response_lengths
    layout = lay_out(*lengths, width=rollouts.tokens.shape[1])
    batch = make_batch(layout, rollouts.tokens, {"topk_ids": rollouts.top_ids})
    trace = jax.jit(lambda m, b: response_trace(m, b, settings))(model, batch)
    return jax.tree.map(lambda a: layout.take(a, rollouts.sampled_logp.shape[1]), trace)


def test_logprobs_equal_the_learners(model, rollouts):
    mask = rollouts.mask()
    logp = np.asarray(learner_trace(model, rollouts, PARAMS.temperature).logp)
    assert mask.sum() > 40
    assert np.max(np.abs(rollouts.full_logp - logp)[mask]) <= 2e-5
    # The filters remove mass, so the remaining tokens become more likely.
    gap = (rollouts.sampled_logp - rollouts.full_logp)[mask]
    assert np.all(gap >= -1e-6) and np.max(gap) > 1e-3
    assert not np.any(rollouts.sampled_logp[~mask]) and not np.any(rollouts.full_logp[~mask])


def test_top_logprobs_are_recorded(model, rollouts):
    params = dataclasses.replace(PARAMS, top_logprobs=3)
    more = Sampler(model, slots=6, decode_steps=5, prompt_length=8).generate(PROMPTS, params, KEY)
    np.testing.assert_array_equal(more.tokens, rollouts.tokens)
    assert rollouts.top_ids.shape == (*rollouts.sampled_logp.shape, 0)
    mask = more.mask()
    assert np.all(np.diff(more.top_logp[mask][:, :2], axis=-1) <= 0)
    assert not np.any(more.top_logp[~mask])
    trace = learner_trace(model, more, params.temperature)
    np.testing.assert_allclose(trace.topk_logp[mask], more.top_logp[mask], atol=2e-5)
    rows = more.tokens[np.arange(len(more))[:, None], more.prompt_lengths[:, None] + np.arange(9)]
    among = more.top_ids == rows[..., None]
    # The sampled token is recorded, in the last place if it is unlikely.
    assert np.all(among.sum(-1)[mask] == 1)
    assert np.any(np.diff(more.top_logp[mask][:, 1:]) < -0.5)
    sampled = np.where(among, more.top_logp, 0).sum(-1)
    np.testing.assert_allclose(sampled[mask], more.full_logp[mask], atol=1e-6)


def test_rows_are_prompt_then_response_in_the_order_of_the_prompts(rollouts):
    n, width = len(PROMPTS) * PARAMS.samples, 8 + PARAMS.max_tokens
    assert len(rollouts) == n and rollouts.tokens.shape == (n, width)
    assert rollouts.tokens.dtype == np.int32 and rollouts.sampled_logp.dtype == np.float32
    distinct = set()
    for row in range(n):
        prompt, response = PROMPTS[row // PARAMS.samples], rollouts.response(row)
        start = rollouts.prompt_lengths[row]
        length = rollouts.response_lengths[row]
        assert start == len(prompt) and rollouts.tokens[row, :start].tolist() == prompt
        sampled = rollouts.tokens[row, start : start + length].tolist()
        assert not np.any(rollouts.tokens[row, start + length :])
        assert not set(sampled[:-1]) & set(PARAMS.stop)
        assert rollouts.finished[row] == (sampled[-1] in PARAMS.stop)
        assert rollouts.finished[row] or length == PARAMS.max_tokens
        assert response == (sampled[:-1] if rollouts.finished[row] else sampled)
        distinct.add((row // PARAMS.samples, *sampled))
    assert len(distinct) >= n - 1  # the samples of a group differ, but two may both end at once
    assert 0 < rollouts.finished.sum() < n


def test_tokens_depend_only_on_the_seed(model, sampler, rollouts):
    other = Sampler(model, slots=12, decode_steps=9, prompt_length=8)
    assert_same(other.generate(PROMPTS, PARAMS, KEY), rollouts)
    assert_same(sampler.generate(PROMPTS, PARAMS, KEY), rollouts)
    again = sampler.generate(PROMPTS, PARAMS, jax.random.key(6))
    assert np.any(again.tokens != rollouts.tokens)


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.response_lengths, b.response_lengths)
    np.testing.assert_array_equal(a.finished, b.finished)
    np.testing.assert_allclose(a.sampled_logp, b.sampled_logp, atol=2e-5)


def test_a_second_call_compiles_nothing(sampler, rollouts):
    sampler.generate(PROMPTS[::-1] * 2, PARAMS, jax.random.key(9))
    first = sampler.compilations()
    sampler.generate(PROMPTS[::-1] * 2, PARAMS, jax.random.key(9))
    assert sampler.compilations() == first <= sampler.most_compilations(PARAMS)


def test_greedy_is_the_argmax_of_the_full_forward(model, sampler):
    rollouts = sampler.generate(PROMPTS, GREEDY, KEY)
    tokens = rollouts.tokens
    segments = np.arange(tokens.shape[1]) < (rollouts.prompt_lengths + 5)[:, None]
    forward = jax.jit(lambda m, t, s: m(t, segment_ids=s))
    logits = np.asarray(forward(model, tokens, segments.astype(np.int32)))
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row, start in enumerate(rollouts.prompt_lengths):
        for t in range(5):
            token = tokens[row, start + t]
            assert token == np.argmax(logits[row, start + t - 1])
            np.testing.assert_allclose(
                rollouts.sampled_logp[row, t], logp[row, start + t - 1, token], atol=2e-5
            )
    assert np.all(rollouts.response_lengths == 5) and not np.any(rollouts.finished)


def test_a_stop_token_first_and_a_single_token(model, sampler):
    first = sampler.generate(PROMPTS, GREEDY, KEY).tokens[0, len(PROMPTS[0])].item()
    params = SamplingParams(max_tokens=1, temperature=0.0, stop=(first,))
    rollouts = sampler.generate(PROMPTS[:1], params, KEY)
    assert rollouts.response_lengths.tolist() == [1] and rollouts.finished.tolist() == [True]
    assert rollouts.response(0) == [] and rollouts.tokens[0, len(PROMPTS[0])] == first
    assert rollouts.tokens.shape == (1, 9)


def test_a_float8_cache_rounds_only_keys_and_values(model, rollouts):
    new = partial(Sampler, model, slots=6, decode_steps=5, prompt_length=8, float8_cache=True)
    ours = new().generate(PROMPTS, PARAMS, KEY)
    first = ours.sampled_logp[:, 0]
    # Prefill does not use the float8 cache.
    np.testing.assert_allclose(first, rollouts.sampled_logp[:, 0], atol=2e-5)
    same = np.all(ours.tokens == rollouts.tokens, axis=1)
    gap = np.abs(ours.full_logp - rollouts.full_logp)[same & (rollouts.response_lengths > 2)]
    assert same.sum() >= 3 and 1e-3 < gap[gap > 0].mean() < 0.1
    other = Sampler(model, slots=3, decode_steps=2, prompt_length=8, float8_cache=True)
    np.testing.assert_array_equal(other.generate(PROMPTS, PARAMS, KEY).tokens, ours.tokens)
    caches = model.empty_caches(6, 16, float8=True)
    assert {a.dtype for c in caches for a in c[:2]} == {jnp.dtype("float8_e4m3fn")}


def test_every_response_may_have_its_own_limit(model, sampler, rollouts):
    limits = np.random.default_rng(0).integers(1, 10, size=(5, 3))
    cut = sampler.generate(PROMPTS, PARAMS, KEY, limits)
    lengths = np.minimum(rollouts.response_lengths, limits.reshape(-1))
    np.testing.assert_array_equal(cut.response_lengths, lengths)
    mask = cut.mask()
    np.testing.assert_allclose(cut.sampled_logp[mask], rollouts.sampled_logp[mask], atol=2e-5)
    for wrong in (limits[:4], limits + 9, limits * 0):
        with pytest.raises(ValueError, match=r"integers \[prompts, samples\] = \[5, 3\] between 1"):
            sampler.generate(PROMPTS, PARAMS, KEY, wrong)


def test_bad_prompts_raise(sampler):
    for prompts, message in (
        ([], "no prompts"),
        ([[1], []], "prompt 1 has 0 tokens; it must have between 1 and 8"),
        ([[1] * 9], "prompt 0 has 9 tokens; it must have between 1 and 8"),
        ([[1, 2], [1, 64]], "prompt 1 has token ids from 1 to 64, the model's are 0 to 63"),
        ([[-1]], "prompt 0 has token ids from -1 to -1"),
        ([[1, 1.5]], r"prompt 0 must be a list of token ids, got \[1, 1.5\]"),
        (["What is 1 + 1?"], "prompt 0 must be a list of token ids, got 'What is 1"),
        ([[[1], [1, 2]]], "prompt 0 must be a list of token ids, got "),
        ([1, 2], "prompt 0 must be a list of token ids, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.generate(prompts, PARAMS, KEY)
    open_ended = Sampler(sampler.model, slots=2)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens; it must have between 1 and 16"):
        open_ended.generate([[]], PARAMS, KEY)
    with pytest.raises(ValueError, match="only a Sampler with a prompt_length has a bound"):
        open_ended.most_compilations(PARAMS)


def test_prompts_may_be_an_array(sampler):
    prompts = np.array([[3, 9], [5, 1]])
    ours, theirs = (sampler.generate(p, PARAMS, KEY) for p in (prompts, prompts.tolist()))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"top_logprobs": 65}, "top_logprobs = 65: the vocabulary has 64 tokens"),
        ({"stop": (3, 64)}, r"stop = \[64\]: the model's token ids are 0 to 63"),
        ({"routes": True}, "routes: the model is dense, there are no experts to record"),
    ],
)
def test_params_that_do_not_fit_the_model_raise(params, message):
    sampler = Sampler(jax.eval_shape(lambda: Transformer(DENSE, KEY)), slots=2)
    with pytest.raises(ValueError, match=message):
        sampler.generate([[1]], SamplingParams(4, **params), KEY)


@pytest.mark.parametrize("name", ["slots", "decode_steps", "prompt_length", "prefill_chunk"])
def test_sizes_of_a_sampler_are_checked(model, name):
    for value in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            Sampler(model, **{"slots": 2, name: value})


def test_wrong_types_of_model_and_compute_raise(model):
    with pytest.raises(ValueError, match="takes a Transformer .* got tuple"):
        Sampler((model, CONFIG), slots=2)
    with pytest.raises(ValueError, match="compute must be a models.Compute, .* got 'bfloat16'"):
        Sampler(model, slots=2, compute="bfloat16")


def test_places_are_checked(sampler):
    for places in ([1], [0, -1], [0.0, 1.0]):
        with pytest.raises(ValueError, match="places must be one integer per prompt, 0 or more"):
            sampler.stream([[1], [2]], PARAMS, KEY, places=places)


def test_meshes_that_do_not_divide_raise(model):
    prompts = [[1, 2]]
    for sizes, message in (
        (
            dict(data=4, tensor=2),
            r"slots = 6 .*sampler.slots. must be a multiple of data·fsdp·expert = 4",
        ),
        (
            dict(data=2, tensor=4),
            "tensor = 4 of the sampler's mesh must divide the model's 2 kv_heads .config field model.kv",
        ),
    ):
        with jax.set_mesh(make_mesh(**sizes)), pytest.raises(ValueError, match=message):
            Sampler(model, slots=6).generate(prompts, PARAMS, KEY)
    explicit = jax.make_mesh((8, 1, 1, 1), ("data", "fsdp", "expert", "tensor"))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="drpo_jax.parallel.make_mesh"):
        Sampler(model, slots=8).generate(prompts, PARAMS, KEY)
    with pytest.raises(ValueError, match="drpo_jax.parallel.make_mesh"):
        shardings(jax.make_mesh((4, 2), ("data", "tensor")), model)


LONG = SamplingParams(max_tokens=40, samples=4, stop=tuple(range(6)))


@pytest.mark.parametrize("slots, steps, chunk", [(2, 16, 8), (24, 7, 3)])
def test_refilled_slots_change_no_response(model, slots, steps, chunk):
    """Responses equal those sampled without refilling, for lengths from 1 to 40.

    Slots are refilled at any time, rings grow and shrink, and chunks begin at any column.
    """
    prompts = [[i + 7] * (1 + i % 8) for i in range(9)]
    ours = Sampler(model, slots=slots, decode_steps=steps, prompt_length=8, prefill_chunk=chunk)
    rollouts = ours.generate(prompts, LONG, KEY)
    assert rollouts.response_lengths.min() < 4 and rollouts.response_lengths.max() > 25
    alone = Sampler(model, slots=36, decode_steps=40, prompt_length=8)
    assert_same(rollouts, alone.generate(prompts, LONG, KEY))
    counted = ours.read_statistics()
    assert counted["response_tokens"] == rollouts.response_lengths.sum()
    # Prefill samples the first token of each of the 36 responses.
    assert counted["live_rows"] == counted["response_tokens"] - 36
    assert counted["busy_live_rows"] >= 0.85 * slots * counted["busy_steps"]
    assert ours.compilations() <= ours.most_compilations(LONG)


def test_order_of_completion_and_abandoned_streams(model):
    prompts, sampler = [[i + 7] * 3 for i in range(9)], Sampler(model, slots=8, prompt_length=8)
    whole = sampler.generate(prompts, LONG, KEY)
    order = [i for i, _ in sampler.stream(prompts, LONG, KEY)]
    assert sorted(order) == list(range(9)) != order
    stream = sampler.stream(prompts, LONG, KEY)
    first, group = next(stream)
    del stream  # as an interrupt would
    rows = slice(first * LONG.samples, (first + 1) * LONG.samples)
    np.testing.assert_array_equal(group.tokens, whole.tokens[rows])
    assert_same(sampler.generate(prompts, LONG, KEY), whole)
    some = [7, 2]  # places in a longer list
    for i, group in sampler.stream([prompts[p] for p in some], LONG, KEY, places=some):
        rows = slice(some[i] * LONG.samples, (some[i] + 1) * LONG.samples)
        assert_same(group, Rollouts(*(getattr(whole, f)[rows] for f in FIELDS)))
    assert list(sampler.stream([], LONG, KEY)) == []


FIELDS = [field.name for field in dataclasses.fields(Rollouts)]


def test_loading_weights_ends_calls_in_progress(model):
    sampler = Sampler(model, slots=4, prompt_length=8)
    stream = sampler.stream([[9]] * 5, LONG, KEY)
    next(stream)
    sampler.load(model, version=17)
    with pytest.raises(RuntimeError, match="weights were replaced while responses were in flight"):
        list(stream)
    rollouts = sampler.generate([[9]], LONG, KEY)
    assert rollouts.version.dtype == np.int32
    np.testing.assert_array_equal(rollouts.version, np.where(rollouts.mask(), 17, -1))
    assert set(rollouts.finish_reasons()) <= {"stop", "length"}
    sampler.load(None)
    assert sampler.version == 18


def test_permuted_rows_change_no_bit_of_a_program(model):
    """In one compiled function, what a row samples does not depend on its index."""
    slots, columns = 6, 12
    state = empty_slots(model, slots, columns, compute=Compute())
    rng = np.random.default_rng(0)
    order = rng.permutation(slots)

    def filled(order):
        caches = [
            Ring(*(rng_of(i).normal(size=x.shape).astype(np.float32)[order] for x in cache))
            for i, cache in enumerate(state.caches)
        ]
        ints = rng_of(9).integers(1, 7, size=(4, slots)).astype(np.int32)[:, order]
        fields = dict(zip(("last", "lengths", "prompt", "sample"), ints))
        fields |= dict(live=np.ones(slots, bool), limits=np.full(slots, 40, np.int32))
        return dataclasses.replace(state, caches=caches, **fields)

    rng_of = np.random.default_rng
    run = jax.jit(partial(decode, room=5, params=LONG, compute=Compute()))
    rounds = [
        run(model, filled(o), KEY, np.int32(5), np.int32(0))[1] for o in (np.arange(slots), order)
    ]
    assert rounds[0].live.sum() > 12
    for a, b in zip(*map(jax.tree.leaves, rounds), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, order], b)


def test_routes_are_those_of_the_model_and_can_be_replayed(model, rollouts):
    params = dataclasses.replace(PARAMS, routes=True)
    sampler = Sampler(model, slots=6, decode_steps=5, prompt_length=8, prefill_chunk=3)
    ours = sampler.generate(PROMPTS, params, KEY)
    assert_same(ours, rollouts)
    assert rollouts.routes.shape[-1] == 0 and ours.routes.dtype == np.int16
    lengths = ours.prompt_lengths + ours.response_lengths
    # The model never reads the last token.
    read = np.arange(ours.tokens.shape[1]) < lengths[:, None] - 1
    assert np.all((ours.routes >= 0) == read[..., None, None])
    segments = (np.arange(ours.tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    visit = jax.jit(lambda *a: model.hidden(a[0], segment_ids=a[1], routes=a[2], record=True))
    free = visit(ours.tokens, segments, np.full_like(ours.routes, -1))
    own = np.moveaxis(np.asarray(free.experts), 0, 2)
    np.testing.assert_array_equal(np.sort(own[read]), np.sort(ours.routes[read]))
    assert free.router["replayed"].sum() == 0
    held = visit(ours.tokens, segments, ours.routes)
    np.testing.assert_allclose(held.hidden[read], free.hidden[read], atol=1e-5)
    assert held.router["replayed"].sum() == 2 * 2 * read.sum()
    assert held.router["changed"].sum() == 0
    turned = np.where(ours.routes >= 0, (ours.routes + 1) % CONFIG.experts, -1)
    other = visit(ours.tokens, segments, turned)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(other.experts), 0, 2)[read], turned[read])
    assert other.router["changed"].sum() > 0.3 * other.router["replayed"].sum()
    metrics = router_metrics(other.router)
    assert 0.3 < metrics["router/changed"] <= 1


def test_repr_is_a_summary(rollouts):
    tokens, finished = rollouts.response_lengths.mean(), rollouts.finished.sum()
    assert repr(rollouts) == (
        f"Rollouts(15 responses to 5 prompts, {tokens:.1f} tokens on average, {finished} finished)"
    )

    def rows(*index):
        return Rollouts(*(getattr(rollouts, f)[list(index)] for f in FIELDS))

    assert repr(rows(4)).startswith("Rollouts(1 response to 1 prompt, ")
    assert repr(rows(0, 3, 1, 6)).startswith("Rollouts(4 responses to 3 prompts, ")
    assert repr(rows()) == "Rollouts(no responses)"


def test_ring_sizes():
    assert ring_sizes(1, 16) == [1] and ring_sizes(9, 4) == [4, 8, 9]
    long = ring_sizes(8192, 32)
    assert long[-1] == 8192 and len(long) < 30 and all(a < b for a, b in zip(long, long[1:]))
    # The kernel of `models.live` needs blocks of 128 columns or more.
    assert ring_sizes(4000, 32)[-1] == 4096 and ring_sizes(4100, 32)[-1] == 4608
    assert all(size % 128 == 0 for size in ring_sizes(4000, 32) if size > 512)


def test_a_mesh_samples_the_same_without_more_compilations(rollouts):
    """Slots are split over two devices; heads and vocabulary over two more."""
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    params = dataclasses.replace(LONG, samples=3)
    prompts = [[i + 7] * (1 + i % 8) for i in range(6)]
    model = jax.jit(lambda key: Transformer(DENSE, key))(jax.random.key(1))
    alone = Sampler(model, slots=18, prompt_length=8).generate(prompts, params, KEY)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(mesh, model, SAMPLER_RULES))
        sampler = Sampler(placed, slots=4, decode_steps=16, prompt_length=8, prefill_chunk=5)
        assert_same(sampler.generate(prompts, params, KEY), alone)
        first = sampler.compilations()
        assert_same(sampler.generate(prompts, params, KEY), alone)
        assert sampler.compilations() == first <= sampler.most_compilations(params)
