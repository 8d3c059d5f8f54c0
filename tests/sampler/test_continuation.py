"""Responses that one call of the sampler begins and another continues."""

import dataclasses

import jax
import numpy as np
import pytest

from drpo_jax.learner import UpdateSettings, lay_out, likelihood, make_batch, response_trace
from drpo_jax.models import ModelConfig, Transformer
from drpo_jax.parallel import SAMPLER_RULES, make_mesh, shardings
from drpo_jax.sampler import Rollouts, Sampler, SamplingParams

SIZES = dict(vocab_size=64, hidden_size=32, heads=4, kv_heads=2, head_dim=8, rope_theta=1e4)
MODELS = {
    "dense": ModelConfig(**SIZES, layers=2, mlp_size=48),
    "mixture": ModelConfig(**SIZES, layers=2, experts=4, experts_per_token=2, expert_size=24),
    "hybrid": ModelConfig(
        **SIZES, layers=2, mlp_size=48, full_attention_every=2, linear_key_heads=2,
        linear_value_heads=4, linear_key_dim=8, linear_value_dim=8,
    ),
}  # fmt: skip
KEY = jax.random.key(5)
PROMPTS = [[3, 9, 27, 1], [5], [8, 8, 60, 2, 40, 41, 7], [11, 12], [63, 0, 0, 1, 2]]
PARAMS = SamplingParams(max_tokens=20, samples=3, temperature=0.7, top_k=20, stop=(4, 17, 30))
ROUTED = dataclasses.replace(PARAMS, routes=True)
# The bound of float32 rounding that the other tests of the sampler use.
ROUNDING = 2e-5
# Slow: compiles a sampler for each of three models, and one for eight devices.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


def new_model(name, seed=1):
    model = jax.jit(lambda key: Transformer(MODELS[name], key))(jax.random.key(seed))
    model.lm_head[...] = 2 * model.lm_head[...]  # sharper, so that tokens differ in probability
    return model


def new_sampler(model, **sizes):
    sizes = dict(slots=8, decode_steps=14, prompt_length=8, prefill_chunk=9) | sizes
    return Sampler(model, **sizes)


def params_of(name):
    return ROUTED if name == "mixture" else PARAMS


def cut(rollouts: Rollouts, lengths: np.ndarray) -> Rollouts:
    """Returns the rollouts as they were when their responses had at most `lengths` tokens."""
    lengths = np.minimum(lengths, rollouts.response_lengths)
    whole = lengths == rollouts.response_lengths
    kept = np.arange(rollouts.version.shape[1]) < lengths[:, None]
    ends = (rollouts.prompt_lengths + lengths)[:, None]
    columns = np.arange(rollouts.tokens.shape[1])
    # A response that has not begun was not prefilled.
    read = (columns < ends - 1) & (lengths > 0)[:, None]

    def where(mask, x, other=0):
        return np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, other)

    changes = {
        name: where(kept, getattr(rollouts, name))
        for name in ("sampled_logp", "full_logp", "entropy", "top_ids", "top_logp")
    }
    return dataclasses.replace(
        rollouts,
        **changes,
        tokens=where(columns < ends, rollouts.tokens),
        version=where(kept, rollouts.version, -1),
        routes=where(read, rollouts.routes, -1).astype(np.int16),
        response_lengths=lengths,
        finished=rollouts.finished & whole,
    )


def by_prompt(rollouts: Rollouts) -> dict[int, Rollouts]:
    samples = PARAMS.samples
    return {
        i: Rollouts(*(getattr(rollouts, f)[i * samples : (i + 1) * samples] for f in FIELDS))
        for i in range(len(rollouts) // samples)
    }


FIELDS = [field.name for field in dataclasses.fields(Rollouts)]


def assert_same(ours, whole, logp=ROUNDING):
    for name in ("tokens", "prompt_lengths", "response_lengths", "finished", "version"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(whole, name), err_msg=name)
    for name in ("sampled_logp", "full_logp", "entropy"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(whole, name), atol=logp, err_msg=name
        )
    np.testing.assert_array_equal(np.sort(ours.routes), np.sort(whole.routes))


def learner_logp(model, rollouts):
    """Returns the learner's logprobs of the response tokens, [N, R]."""
    lengths = rollouts.prompt_lengths, rollouts.response_lengths
    layout = lay_out(*lengths, width=rollouts.tokens.shape[1])
    batch = make_batch(layout, rollouts.tokens, {"topk_ids": rollouts.top_ids})
    return np.asarray(layout.take(score(model, batch), rollouts.version.shape[1]))


SETTINGS = UpdateSettings(likelihood, "token-mean", 1, temperature=PARAMS.temperature)
score = jax.jit(lambda model, batch: response_trace(model, batch, SETTINGS).logp)
visit = jax.jit(lambda m, tokens, s: m.hidden(tokens, segment_ids=s, record=True).experts)


@pytest.fixture(scope="module", params=MODELS)
def unbroken(request):
    """A model's name, its sampler, and responses sampled in one call."""
    sampler = new_sampler(new_model(request.param))
    whole = sampler.generate(PROMPTS, params_of(request.param), KEY)
    assert whole.response_lengths.min() < 8 and whole.response_lengths.max() == 20
    return request.param, sampler, whole


def test_a_response_broken_anywhere_equals_the_unbroken_one(unbroken):
    """Each response is cut at a different position; some have not begun, some are complete."""
    name, sampler, whole = unbroken
    lengths = np.random.default_rng(0).integers(0, 20, size=len(whole))
    lengths[:4] = 0, 1, 19, 20
    begun = by_prompt(cut(whole, lengths))
    del begun[3]  # All samples of this prompt are sampled again.
    ours = sampler.generate(PROMPTS, params_of(name), KEY, begun=begun)
    assert_same(ours, whole)
    assert sampler.compilations() <= sampler.most_compilations(params_of(name), begun=True)


def test_a_budget_of_tokens_per_call_changes_no_response(unbroken):
    name, sampler, whole = unbroken
    sampler.read_statistics()
    begun, limits = {}, np.zeros((len(PROMPTS), PARAMS.samples), int)
    for _ in range(3):
        limits = np.minimum(limits + 7, PARAMS.max_tokens)
        ours = sampler.generate(PROMPTS, params_of(name), KEY, limits, begun)
        unfinished = ~ours.finished & (ours.response_lengths < PARAMS.max_tokens)
        expected = ~whole.finished | (whole.response_lengths > limits.reshape(-1))
        np.testing.assert_array_equal(unfinished, expected & (limits.reshape(-1) < 20))
        begun = by_prompt(ours)
    assert_same(ours, whole)
    counted = sampler.read_statistics()
    assert counted["response_tokens"] == whole.response_lengths.sum()
    # The next call has nothing to do and returns the arrays unchanged.
    again = sampler.generate(PROMPTS, params_of(name), jax.random.key(9), begun=begun)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(again, field), getattr(ours, field))
    assert not any(sampler.read_statistics().values())


def test_each_token_is_scored_by_the_weights_of_its_version(unbroken):
    """The routes of a token's position, too, are those under which the next token was drawn."""
    name, sampler, _ = unbroken
    models = [sampler.model, new_model(name, 2), new_model(name, 3)]
    begun = {}
    for version, (model, limit) in enumerate(zip(models, (4, 9, 20))):
        sampler.load(model, version)
        limits = np.full((len(PROMPTS), PARAMS.samples), limit)
        before, ours = begun, sampler.generate(PROMPTS, params_of(name), KEY, limits, begun)
        begun = by_prompt(ours)
        for i, group in before.items():  # Earlier tokens keep their recorded values.
            for field in ("full_logp", "sampled_logp", "entropy", "version"):
                old, new = getattr(group, field), getattr(begun[i], field)
                np.testing.assert_array_equal(np.where(group.mask(), new, old), old)
    sampler.load(models[0], 0)
    versions = np.digitize(np.arange(20), (4, 9))
    np.testing.assert_array_equal(ours.version, np.where(ours.mask(), versions, -1))
    assert all(np.sum(ours.version == version) > 20 for version in range(3))
    lengths = ours.prompt_lengths + ours.response_lengths
    columns = np.arange(ours.tokens.shape[1])
    read = columns < lengths[:, None] - 1
    assert np.all((ours.routes >= 0) == read[..., None, None])
    # The position before a response token has that token's version; the prompt has the first one's.
    index = np.clip(columns - ours.prompt_lengths[:, None] + 1, 0, 19)
    drawn = np.take_along_axis(ours.version, index, axis=1)
    for version, model in enumerate(models):
        rows = ours.version == version
        gap = np.abs(ours.full_logp - learner_logp(model, ours))[rows]
        assert gap.max() <= ROUNDING
        if name == "mixture":
            segments = (columns < lengths[:, None]).astype(np.int32)
            experts = np.moveaxis(np.asarray(visit(model, ours.tokens, segments)), 0, 2)
            same = np.all(np.sort(experts) == np.sort(ours.routes), axis=(2, 3))
            assert np.all(same[read & (drawn == version)])
            assert not np.all(same[read])


def test_stop_loses_nothing(unbroken):
    """Neither tokens of the device call in progress nor waiting requests are lost."""
    name, sampler, whole = unbroken
    params = params_of(name)
    sampler.read_statistics()
    limits = np.full((len(PROMPTS), PARAMS.samples), 20)
    limits[0] = 1  # This group is complete before the first decode step.
    flight = sampler.stream(PROMPTS, params, KEY, limits=limits)
    index, group = next(flight)
    begun = flight.stop()
    assert flight.stop() == [] and list(flight) == []
    parts = {index: group, **dict(begun)}
    assert len(parts) == len(begun) + 1 and [i for i, _ in begun] == sorted(i for i, _ in begun)
    sampled = sum(part.response_lengths.sum() for part in parts.values())
    assert sampled == sampler.read_statistics()["response_tokens"] < whole.response_lengths.sum()
    for i, part in parts.items():
        expected = cut(by_prompt(whole)[i], part.response_lengths)
        assert_same(part, expected)
    assert index == 0 and all(np.any(part.response_lengths > 1) for i, part in begun if i < 3)
    assert np.all(begun[-1][1].response_lengths == 1)  # Prefilled, but not in a slot yet.
    ours = sampler.generate(PROMPTS, params, KEY, begun=parts)
    assert_same(ours, whole)


def test_stop_returns_what_was_handed_in(unbroken):
    """A call that is stopped before its first token returns the groups unchanged."""
    name, sampler, whole = unbroken
    begun = by_prompt(cut(whole, np.arange(len(whole)) % 4))
    flight = sampler.stream(PROMPTS, params_of(name), KEY, begun=begun)
    stopped = dict(flight.stop())
    assert stopped.keys() == begun.keys()
    for i, group in begun.items():
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(stopped[i], field), getattr(group, field))


def test_loading_weights_leaves_what_is_begun(unbroken):
    name, sampler, whole = unbroken
    flight = sampler.stream(PROMPTS, params_of(name), KEY)
    first = next(flight)
    sampler.load(sampler.model, version=0)
    with pytest.raises(RuntimeError, match="weights were replaced while responses were in flight"):
        list(flight)
    parts = dict([first, *flight.stop()])
    assert_same(sampler.generate(PROMPTS, params_of(name), KEY, begun=parts), whole)


def test_a_float8_cache_changes_only_what_reads_it():
    """Prefill reads unrounded keys and values, so its token is scored without rounding."""
    model = new_model("dense")
    sampler = new_sampler(model, float8_cache=True)
    whole = sampler.generate(PROMPTS, PARAMS, KEY)
    long = whole.response_lengths >= 6
    begun = cut(whole, np.where(long, 4, 20))
    ours = sampler.generate(PROMPTS, PARAMS, KEY, begun=by_prompt(begun))
    assert long.sum() >= 3
    gap = np.abs(ours.full_logp - learner_logp(model, ours))
    assert np.all(gap[long, 4] <= ROUNDING)
    decoded = ours.mask() & long[:, None] & (np.arange(20) > 4)
    assert 1e-4 < gap[decoded].mean() < 0.1
    for field in FIELDS:
        new, old = getattr(ours, field), getattr(begun, field)
        np.testing.assert_array_equal(new[~long], old[~long])


def test_eight_devices_continue_in_the_same_way():
    model = new_model("mixture")
    sampler = new_sampler(model)
    whole = sampler.generate(PROMPTS, ROUTED, KEY)
    begun = by_prompt(cut(whole, np.arange(len(whole)) + 1))
    with jax.set_mesh(mesh := make_mesh(data=2, expert=2, tensor=2)):
        placed = jax.device_put(model, shardings(mesh, model, SAMPLER_RULES))
        spread = new_sampler(placed)
        assert_same(spread.generate(PROMPTS, ROUTED, KEY, begun=begun), whole)
        first = spread.compilations()
        assert_same(spread.generate(PROMPTS, ROUTED, KEY, begun=begun), whole)
        assert spread.compilations() == first <= spread.most_compilations(ROUTED, begun=True)
        flight = spread.stream(PROMPTS, ROUTED, KEY)
        parts = dict([next(flight), *flight.stop()])
    assert_same(sampler.generate(PROMPTS, ROUTED, KEY, begun=parts), whole)


def test_widths_may_differ_between_calls():
    """Without a prompt_length, the widest prompt of each call determines the width of the arrays."""
    sampler = Sampler(new_model("dense"), slots=8)
    long = [7] * 20
    limits = np.full((2, 3), 5)
    begun = dict(sampler.stream([PROMPTS[0], long], PARAMS, KEY, limits=limits))
    ours = sampler.generate(PROMPTS[:1], PARAMS, KEY, begun={0: begun[0]})
    assert ours.tokens.shape == (3, 16 + 20)
    assert_same(ours, sampler.generate(PROMPTS[:1], PARAMS, KEY))


def test_what_does_not_belong_to_the_call_raises(unbroken):
    name, sampler, whole = unbroken
    params, begun = params_of(name), by_prompt(whole)
    for wrong, message in (
        ({5: begun[0]}, "begun: keys must be positions of prompts, 0 to 4, got 5"),
        (
            {0: whole},
            r"begun\[0\] was sampled with a different SamplingParams.samples: .* 15, .* 3",
        ),
        ({1: begun[0]}, r"begun\[1\] has a different prompt than prompts\[1\]"),
        ({0: whole.tokens}, r"begun\[0\] must be the Rollouts of prompt 0, got ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.stream(PROMPTS, params, KEY, begun=wrong)
    for change in ({"max_tokens": 9}, {"top_logprobs": 2}, {"routes": name != "mixture"}):
        if name != "mixture" and "routes" in change:
            continue  # A different error: the model has no experts.
        other = dataclasses.replace(params, **change)
        (field,) = change
        with pytest.raises(ValueError, match=f"different SamplingParams.{field}: its arrays"):
            sampler.stream(PROMPTS, other, KEY, begun=begun)


def test_tokens_of_an_environment_are_read_and_not_sampled():
    """An environment may append tokens to a response; the sampler continues after them."""
    sampler = new_sampler(new_model("mixture"))
    begun = by_prompt(sampler.generate(PROMPTS, ROUTED, KEY, np.full((5, 3), 4)))
    told = [50, 4, 51]  # One of them is a stop token.
    for group in begun.values():
        for row, (start, length) in enumerate(zip(group.prompt_lengths, group.response_lengths)):
            group.tokens[row, start + length : start + length + 3] = told
        group.response_lengths[:] += 3
        group.finished[:] = False
    ours = sampler.generate(PROMPTS, ROUTED, KEY, begun=begun)
    assert np.all(ours.mask().sum(1) == ours.response_lengths - 3)
    lengths = ours.prompt_lengths + ours.response_lengths
    read = np.arange(ours.tokens.shape[1]) < lengths[:, None] - 1
    assert np.all((ours.routes >= 0) == read[..., None, None])
    gap = np.abs(ours.full_logp - learner_logp(sampler.model, ours))[ours.mask()]
    assert gap.max() <= ROUNDING
    assert np.all(ours.finished | (ours.response_lengths == 20))
    pieces = ours.pieces(type("Ids", (), {"decode": staticmethod(str)}))[0]
    assert set(told) <= set(pieces.tolist())
