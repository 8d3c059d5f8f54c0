"""The equations: every coefficient against autodiff, their numerics, and the table itself."""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import table, token_weights
from drpo_jax.objectives.check import check, hostile_tokens
from drpo_jax.objectives.table import (
    OBJECTIVES,
    THRESHOLDS,
    gradient_weight,
    resolve_hyper,
    token_objective,
)
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, beyond_clip

DELTA = 0.15


# ---------------------------------------------------------------------------------- the checks


@pytest.mark.slow  # Three compilations for each of 40 cases.
def test_every_objective_passes_the_checks(case):
    name, hyper = case
    assert {
        outcome.check: outcome.problem for outcome in check(name, **hyper) if outcome.problem
    } == {}


def test_tokens_reach_every_regime(batch, in_float64):
    shift = np.exp(batch.logp) - np.exp(batch.behavior_logp)
    drift = np.sign(batch.advantage) * shift
    log_r = batch.logp - batch.behavior_logp
    assert (drift > DELTA).sum() > 100 and (drift < -DELTA).sum() > 100
    assert (abs(shift) < DELTA).sum() > 100
    assert log_r.max() > 19 and log_r.min() < -19
    assert (batch.behavior_logp < np.log(1e-4)).sum() > 100
    in_responses = batch.arrays["mask"] > 0
    arrays = {name for name, objective in OBJECTIVES.items() if objective.arrays}
    for name in arrays - {"drpo_prefix", "drpo_decoupled"}:
        kept = in_float64(gradient_weight, name, *batch[:3], **batch.needs(name)) != 0
        for advantage in (batch.advantage > 0, batch.advantage < 0):
            assert kept[in_responses & advantage].sum() > 100, name
            assert (~kept)[in_responses & advantage].sum() > 100, name


def test_gspo_through_its_aggregation_is_the_mean_over_responses(batch, in_float64):
    """Packed or one per row, weight·c is the derivative of the paper's objective."""
    five = np.arange(40)[:, None] < 5  # rows, of eight responses each
    packed = [np.where(five, x, 0) for x in (*batch[:3], batch.arrays["mask"])]
    places = [(row, packed[3][row] == number) for row in range(5) for number in range(1, 9)]
    alone = [np.zeros_like(x) for x in packed]  # a response per row, at its start
    for i, at in enumerate(places):
        for target, source in zip(alone, packed, strict=True):
            target[i, : at[1].sum()] = source[at]
    mask = alone[3] > 0
    lengths = mask.sum(1)

    def mean_of_clipped_ratios(logp):
        s = jnp.exp(jnp.where(mask, logp - alone[1], 0).sum(-1) / lengths)
        A = alone[2][:, 0]
        return jnp.minimum(s * A, jnp.clip(s, 1 - 3e-4, 1 + 4e-4) * A).mean()

    def step(logp, behavior_logp, advantage, mask):
        weight, denominator = token_weights("seq-mean-token-mean", mask)
        J, c = token_objective("gspo", logp, behavior_logp, advantage, mask=mask)
        return (weight * J).sum() / denominator, weight * c / denominator

    value, slope = in_float64(jax.jit(jax.value_and_grad(mean_of_clipped_ratios)), alone[0])
    assert (slope != 0).any() and (slope[mask] == 0).any()
    for rows in (alone, [*alone[:3], mask], packed):
        J, c = in_float64(step, *rows)
        assert J == pytest.approx(value, rel=1e-6)
        if rows is packed:
            c = np.stack([np.pad(c[at], (0, 100 - at[1].sum())) for at in places])
        np.testing.assert_allclose(c, slope, rtol=1e-6, atol=1e-12)


def test_on_policy_every_objective_is_the_policy_gradient(case, batch):
    name, hyper = case
    batch = batch.astype(np.float32)
    same = {"old_logp": batch.logp, "behavior_topk_logp": batch.arrays["topk_logp"]}
    needed = {key: same.get(key, value) for key, value in batch.needs(name).items()} | hyper
    _, c = token_objective(name, batch.logp, batch.logp, batch.advantage, **needed)
    np.testing.assert_array_equal(c, batch.advantage)
    w = gradient_weight(name, batch.logp, batch.logp, batch.advantage, **needed)
    np.testing.assert_array_equal(w, 1.0)


def test_ascent_raises_a_token_with_positive_advantage_and_lowers_one_with_negative():
    def objectives(logits, advantage):
        logp = jax.nn.log_softmax(logits)
        quarter = jnp.log(jnp.full(4, 0.25))
        arrays = {"mask": jnp.ones(1, bool), "old_logp": quarter[1:2]}
        arrays |= {"topk_logp": logp[None, :2], "behavior_topk_logp": quarter[None, :2]}
        token = logp[1:2], quarter[1:2], advantage
        needed = {
            name: {key: arrays[key] for key in OBJECTIVES[name].arrays} for name in OBJECTIVES
        }
        return [token_objective(name, *token, **needed[name])[0].sum() for name in OBJECTIVES]

    gradients = jax.jit(jax.vmap(jax.jacrev(objectives), (None, 0)))
    for name, (up, down) in zip(OBJECTIVES, gradients(jnp.zeros(4), jnp.array([1.0, -1.0]))):
        for gradient, sign in ((up, 1), (down, -1)):
            np.testing.assert_allclose(gradient, sign * np.array([-0.25, 0.75, -0.25, -0.25]),
                                       rtol=1e-5, err_msg=name)  # fmt: skip


# ---------------------------------------------------------------------------------- numerics


def test_hostile_tokens_stay_finite(case):
    name, hyper = case
    for tokens in hostile_tokens():
        keywords = tokens.needs(name) | hyper
        J, c = token_objective(name, *tokens[:3], **keywords)
        w = gradient_weight(name, *tokens[:3], **keywords)
        assert J.dtype == c.dtype == w.dtype == np.float32
        assert np.isfinite(J).all() and np.isfinite(c).all() and np.isfinite(w).all()
        clipped = np.asarray(beyond_clip(*tokens[:2]))
        assert clipped.any() and not c[clipped].any() and not w[clipped].any()


def test_beyond_clip_is_beyond_twenty_nats():
    logp = jnp.array([-20.0, -20.1, -30.0, 0.0, -jnp.inf, -jnp.inf])
    behavior_logp = jnp.array([0.0, 0.0, -30.0, -20.1, -jnp.inf, 0.0])
    expected = [False, True, False, True, False, True]
    np.testing.assert_array_equal(beyond_clip(logp, behavior_logp), expected)
    assert LOG_RATIO_CLIP == 20


def test_weight_at_zero_advantage(case, batch, in_float64):
    name, hyper = case
    tokens, needed = (*batch[:2], np.zeros_like(batch.advantage)), batch.needs(name) | hyper
    _, c = in_float64(token_objective, name, *tokens, **needed)
    weight = in_float64(gradient_weight, name, *tokens, **needed)
    if name in ("cispo", "minirl", "sapo", "gspo", "ipo", "trm") or {"ratio_cap", "rho_cap"} & set(
        hyper
    ):
        assert np.isfinite(weight).all() and (weight != 1).any()  # how the ratio is treated
    else:
        np.testing.assert_array_equal(weight, 1.0)
    pi, mu = np.exp(batch.logp), np.exp(batch.behavior_logp)
    if name == "drpo_no_advantage":  # the pull back needs no advantage
        expected = -pi / mu * (pi - mu) / hyper.get("delta", DELTA)
        np.testing.assert_allclose(c, expected, rtol=1e-7)
    elif name == "spo_no_advantage":
        expected = -pi / mu * (pi / mu - 1) / hyper.get("epsilon", 12.5)
        np.testing.assert_allclose(c, expected, rtol=1e-7)
    else:
        assert not c.any()


def test_the_shift_is_the_difference_of_exponentials():
    # µ·(r − 1) with the clipped ratio would be 2e-9 here.
    t = table.token(np.float32(-0.5), np.float32(-40.0), 1.0)
    assert t.shift == pytest.approx(np.exp(-0.5), rel=1e-6)


def test_dtypes_and_broadcasting():
    logp = jnp.full((3, 5), -1.0, jnp.bfloat16)
    J, c = token_objective("drpo", logp, jnp.float32(-1.1), jnp.ones((3, 1)))
    w = gradient_weight("surrogate", logp, -1.1, jnp.ones((3, 1)))
    assert J.shape == c.shape == w.shape == (3, 5)
    assert J.dtype == c.dtype == w.dtype == jnp.float32


# ------------------------------------------------------------------------- the table itself


def test_a_new_objective_is_as_short_as_the_docstring_says(monkeypatch, batch):
    example = re.search(r"\n(    def drpo_cubic.*?)\n\nAn argument", table.__doc__, re.S)[1]
    monkeypatch.setitem(OBJECTIVES, "drpo_cubic", None)  # Removed again after the test.
    exec(textwrap.dedent(example), dict(vars(table)))
    assert not any(outcome.problem for outcome in check("drpo_cubic", delta=0.2))
    weight = gradient_weight("drpo_cubic", *batch[:3], delta=0.2)
    assert weight.min() < 0 and weight.max() > 1
    assert OBJECTIVES["drpo_cubic"].hyper == {"delta": 0.15}
    assert OBJECTIVES["drpo_cubic"].arrays == ()
    assert OBJECTIVES["drpo_cubic"].summary.startswith("J = ")


def test_defaults_are_the_documented_ones():
    unset = {"delta_low": None, "delta_high": None}
    assert resolve_hyper("drpo", {}) == {"delta": 0.15} | unset
    assert resolve_hyper("dppo_kl", {}) == {"delta": 0.05, "ratio_cap": None} | unset
    assert resolve_hyper("dppo_topk_tv", {}) == {"delta": 0.15, "ratio_cap": None} | unset
    assert resolve_hyper("cppo", {}) == {"delta": 0.2, "w_min": 0.8, "delta_b": 0.02}
    assert resolve_hyper("spo", {}) == {"epsilon": 12.5}
    assert resolve_hyper("gspo", {}) == {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
    assert resolve_hyper("minirl", {"ratio_cap": 2}) == {
        "epsilon_low": 0.2, "epsilon_high": 0.27, "ratio_cap": 2,
    }  # fmt: skip
    assert resolve_hyper("grpo", {"dual_clip": 3}) == {
        "epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 3,
    }  # fmt: skip
    assert all(objective.summary for objective in OBJECTIVES.values())


def test_the_arrays_that_an_objective_needs_are_its_arguments_without_default():
    needed = {name: objective.arrays for name, objective in OBJECTIVES.items() if objective.arrays}
    assert needed == {
        "minirl": ("old_logp",),
        "gspo": ("mask",),
        "dppo_topk_tv": ("topk_logp", "behavior_topk_logp"),
        "dppo_topk_kl": ("topk_logp", "behavior_topk_logp"),
        "pdm": ("topk_logp", "behavior_topk_logp"),
        "cppo": ("mask",),
        "trm": ("mask",),
        "vaco": ("mask",),
        "drpo_prefix": ("mask",),
        "drpo_decoupled": ("old_logp",),
    }
    assert not any(set(o.arrays) & set(o.hyper) for o in OBJECTIVES.values())


def test_the_readings_of_the_thresholds():
    delta, epsilon = THRESHOLDS["delta"], THRESHOLDS["epsilon"]
    assert delta == {"boundary": 0.15, "released": 12.5, "scaled": 0.08}
    assert epsilon == {"released": 12.5, "original": 0.2}
    for name, objective in OBJECTIVES.items():  # the defaults are presets
        for key, value in objective.hyper.items():
            if key == objective.threshold:
                assert value in THRESHOLDS[key].values(), name

    # The same token, π − µ = +0.15 and r = 4, under each reading.
    tokens = jnp.log(0.2), jnp.log(0.05), 1.0
    for reading, expected in (("boundary", 0), ("released", 0.988), ("scaled", -0.875)):
        w = gradient_weight("drpo", *tokens, delta=delta[reading])
        assert w == pytest.approx(expected, abs=1e-5)
    # "scaled" is the reading under which 12.5 multiplies the penalty.
    J, _ = token_objective("drpo", *tokens, delta=delta["scaled"])
    assert J == pytest.approx(4 - 12.5 * 0.05 * 9 / 2, rel=1e-5)
    for reading, expected in (("released", 1 - 3 / 12.5), ("original", 1 - 3 / 0.2)):
        w = gradient_weight("spo", *tokens, epsilon=epsilon[reading])
        assert w == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name, hyper, message",
    [
        ("drop", {}, "Unknown objective 'drop'. Did you mean 'drpo'? Accepted: surrogate, grpo"),
        (
            "drpo",
            {"dleta": 1},
            "'drpo' 'dleta'. Did you mean 'delta'? Accepted: delta, delta_low, delta_high.",
        ),
        ("surrogate", {"delta": 1}, "'surrogate' 'delta'. Accepted: none."),
        ("ipo", {"mask": 1}, "'ipo' 'mask'. Did you mean 'delta'? Accepted: delta."),
        ("minirl", {"old_logprob": 0}, "'minirl' 'old_logprob'. Did you mean 'old_logp'?"),
        ("drpo", {"delta": 0}, "'drpo' needs delta to be a number above 0, not 0"),
        ("drpo", {"delta": None}, "delta to be a number above 0, not None"),
        ("drpo", {"delta": float("nan")}, "delta to be a number above 0, not nan"),
        ("cppo", {"w_min": 1.5}, "w_min to be a number above 0 and at most 1, not 1.5"),
        ("spo", {"epsilon": "0.2"}, "epsilon to be a number above 0, not '0.2'"),
        ("grpo", {"dual_clip": 0.5}, "dual_clip to be a number above 1 or None, not 0.5"),
        ("mask_drpo", {"directional": 1}, "directional to be True or False, not 1"),
        ("gspo", {}, "'gspo' needs the arrays mask besides logp, behavior_logp and advantage"),
        ("minirl", {"old_logp": None}, "missing: old_logp."),
        ("dppo_topk_tv", {}, "missing: topk_logp, behavior_topk_logp."),
        ("dppo_topk_kl", {"topk_logp": 0.0}, "missing: behavior_topk_logp."),
    ],
)
def test_wrong_names_and_values_are_named(name, hyper, message):
    for function in (token_objective, gradient_weight):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(name, -1.0, -1.0, 1.0, **hyper)
    if name in OBJECTIVES and set(hyper) <= set(OBJECTIVES[name].hyper) and hyper:
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve_hyper(name, hyper)
