"""The equations: every coefficient against autodiff, and the paper's claims about the weights."""

import re
import textwrap

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import table
from drpo_jax.objectives.table import OBJECTIVES, gradient_weight, resolve_hyper, token_objective
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, beyond_clip

DELTA = 0.15
CASES = [(name, {}) for name in OBJECTIVES] + [
    ("grpo", {"epsilon_high": 0.28}),
    ("grpo", {"dual_clip": 3.0}),
    ("cispo", {"epsilon_low": 10.0, "epsilon_high": 4.0}),
    ("sapo", {"tau_positive": 0.5, "tau_negative": 2.0}),
    ("spo", {"epsilon": 0.2}),
    ("spo_no_advantage", {"epsilon": 0.2}),
    ("dppo_tv", {"ratio_cap": 2.0}),
    ("dppo_kl", {"ratio_cap": 2.0}),
    ("drpo", {"delta": 12.5}),
    ("drpo_no_correction", {"delta": 12.5}),
    ("mask_drpo", {"directional": True}),
    ("mask_drpo", {"delta": 0.01}),
]
PENALIZED = ("drpo", "spo", "mask_drpo", "drpo_no_correction")  # the forms with |Â|
IDS = [f"{name}-{'-'.join(hyper)}" for name, hyper in CASES]
every_case = pytest.mark.parametrize("name, hyper", CASES, ids=IDS)


def tokens(size=4000, seed=0, dtype=np.float64):
    """Random (logp, behavior_logp, advantage): common and rare tokens, |log r| < 20."""
    rng = np.random.default_rng(seed)
    logp, behavior_logp = np.log(rng.beta(0.3, 0.5, (2, size)))
    near = rng.random(size) < 0.5  # half of them close to on-policy
    logp = np.where(near, np.minimum(behavior_logp + rng.normal(0, 0.3, size), -1e-4), logp)
    rare = rng.random(size) < 0.1  # some whose ratio is huge or tiny
    logp = np.where(rare, -1.0, logp)
    behavior_logp = np.where(rare, -1.0 - rng.uniform(0, 19.9, size), behavior_logp)
    logp, behavior_logp = np.where(
        rare & (rng.random(size) < 0.5), (behavior_logp, logp), (logp, behavior_logp)
    )
    logp = np.clip(logp, behavior_logp - 19.99, behavior_logp + 19.99)
    return logp.astype(dtype), behavior_logp.astype(dtype), rng.normal(0, 1, size).astype(dtype)


def in_float64(function, *args, **hyper):
    """The arrays of function(*args, **hyper), computed in float64, as numpy's."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*args, **hyper))


def assert_coefficient_is_derivative(name, hyper):
    logp, behavior_logp, advantage = tokens()

    def terms(logp):
        def objective(logp):
            J, c = token_objective(name, logp, behavior_logp, advantage, **hyper)
            return J.sum(), c

        derivative, c = jax.grad(objective, has_aux=True)(logp)
        return derivative, c, gradient_weight(name, logp, behavior_logp, advantage, **hyper)

    derivative, c, w = in_float64(jax.jit(terms), logp)
    assert derivative.dtype == c.dtype == w.dtype == np.float64
    np.testing.assert_allclose(c, derivative, rtol=1e-7, atol=1e-9)
    ratio = np.exp(logp - behavior_logp)
    np.testing.assert_allclose(c, ratio * advantage * w, rtol=1e-7, atol=1e-9)
    return w


@every_case
def test_coefficient_is_the_derivative_of_the_objective(name, hyper):
    assert_coefficient_is_derivative(name, hyper)


def test_tokens_reach_every_regime():
    logp, behavior_logp, advantage = tokens()
    shift, drift = (x := np.exp(logp) - np.exp(behavior_logp)), np.sign(advantage) * x
    log_r = logp - behavior_logp
    assert (drift > DELTA).sum() > 100 and (drift < -DELTA).sum() > 100
    assert (abs(shift) < DELTA).sum() > 100
    assert log_r.max() > 19 and log_r.min() < -19
    assert (behavior_logp < np.log(1e-4)).sum() > 100


def bernoulli_kl(m, p):
    return m * np.log(m / p) + (1 - m) * np.log((1 - m + 1e-8) / (1 - p + 1e-8))


# The objectives, from π (p), µ (m) and Â (A), as the papers print them.
PRINTED = {
    "surrogate": lambda p, m, A: p / m * A,
    "grpo": lambda p, m, A: np.minimum(p / m * A, np.clip(p / m, 0.8, 1.2) * A),
    "cispo": lambda p, m, A: np.clip(p / m, 0.8, 1.2) * A * np.log(p),
    "sapo": lambda p, m, A: (
        4 / (t := np.where(A > 0, 1.0, 1.05)) / (1 + np.exp(-t * (p / m - 1))) * A
    ),
    "spo": lambda p, m, A: p / m * A - abs(A) * (p / m - 1) ** 2 / 25,
    "spo_no_advantage": lambda p, m, A: p / m * A - (p / m - 1) ** 2 / 25,
    "dppo_tv": lambda p, m, A: np.where(A > 0, p - m <= 0.15, p - m >= -0.15) * p / m * A,
    "dppo_kl": lambda p, m, A: ((bernoulli_kl(m, p) <= 0.05) | (A * (p / m - 1) < 0)) * p / m * A,
    "drpo": lambda p, m, A: p / m * A - abs(A) * m * (p / m - 1) ** 2 / 0.3,
    "drpo_no_advantage": lambda p, m, A: p / m * A - m * (p / m - 1) ** 2 / 0.3,
    "drpo_no_correction": lambda p, m, A: np.where(
        np.sign(A) * (p - m) > 0.15,
        A + abs(A) * 0.15 / (2 * m),
        p / m * A - abs(A) * m * (p / m - 1) ** 2 / 0.3,
    ),
    "mask_drpo": lambda p, m, A: (
        p / m * A - (abs(p - m) > 0.15) * abs(A) * ((p - m) ** 2 - 0.15**2) / (0.3 * m)
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_the_printed_equation(name):
    logp, behavior_logp, advantage = tokens(seed=1)
    J, _ = in_float64(token_objective, name, logp, behavior_logp, advantage)
    expected = PRINTED[name](np.exp(logp), np.exp(behavior_logp), advantage)
    np.testing.assert_allclose(J, expected, rtol=1e-6, atol=1e-9)


@every_case
def test_on_policy_every_objective_is_the_policy_gradient(name, hyper):
    logp, _, advantage = tokens(size=64, dtype=np.float32)
    _, c = token_objective(name, logp, logp, advantage, **hyper)
    np.testing.assert_array_equal(c, advantage)
    np.testing.assert_array_equal(gradient_weight(name, logp, logp, advantage, **hyper), 1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ascent_raises_the_probability_of_a_token_with_positive_advantage(name):
    def objective(logits):
        logp = jax.nn.log_softmax(logits)[1]
        return token_objective(name, logp, jnp.log(0.25), 1.0)[0]

    gradient = jax.jit(jax.grad(objective))(jnp.zeros(4))
    assert gradient[1] > 0 and (gradient[jnp.array([0, 2, 3])] < 0).all()


# ------------------------------------------------------------------------ claims of the paper


def weight_at(name, pi, mu, advantage, **hyper):
    pi, mu, advantage = np.broadcast_arrays(pi, mu, advantage)
    padded = (np.resize(x, 8) for x in (np.log(pi), np.log(mu), advantage))  # one shape compiles
    return in_float64(gradient_weight, name, *padded, **hyper)[: pi.size].reshape(pi.shape)


def test_drpo_is_spo_with_a_token_adaptive_bound():
    logp, behavior_logp, advantage = tokens()
    bound = DELTA / np.exp(behavior_logp)
    drpo = in_float64(token_objective, "drpo", logp, behavior_logp, advantage, delta=DELTA)
    spo = in_float64(token_objective, "spo", logp, behavior_logp, advantage, epsilon=bound)
    np.testing.assert_allclose(drpo, spo, rtol=1e-7, atol=1e-9)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.floats(1e-4, 1 - 1e-4), st.floats(0.01, 0.9), st.sampled_from([-2.0, -0.1, 0.3, 5.0])
)
def test_the_boundary_attenuates_inside_stops_at_it_and_corrects_outside(mu, delta, advantage):
    pi = mu + np.sign(advantage) * delta * np.array([0.0, 0.5, 0.999, 1.0, 1.001, 1.5, -0.5, -1.5])
    reachable = (pi > 1e-9) & (pi < 1)
    expected = np.array([1.0, 0.5, 0.001, 0.0, -0.001, -0.5, 1.5, 2.5])
    pi = np.where(reachable, pi, mu)
    weight = weight_at("drpo", pi, mu, advantage, delta=delta)
    np.testing.assert_allclose(weight, np.where(reachable, expected, 1.0), atol=1e-9)
    # DPPO: kept inside, dropped outside, kept where converging. Its boundary is the same one.
    steps = np.array([1.0, 1.0, 1.0, np.nan, 0.0, 0.0, 1.0, 1.0])
    kept = weight_at("dppo_tv", pi, mu, advantage, delta=delta)
    checked = reachable & ~np.isnan(steps)
    np.testing.assert_array_equal(kept[checked], steps[checked])
    # The two ablations split DRPO's weight between them.
    outside = np.where(reachable, np.array([0, 0, 0, 0, 1, 1, 0, 0]), 0) > 0
    masked = weight_at("mask_drpo", pi, mu, advantage, delta=delta, directional=True)
    np.testing.assert_allclose(masked[~outside & (steps == 1)], 1.0)
    np.testing.assert_allclose(masked[outside], weight[outside], atol=1e-9)
    cut = weight_at("drpo_no_correction", pi, mu, advantage, delta=delta)
    np.testing.assert_allclose(cut, np.maximum(weight, 0), atol=1e-9)


def test_mask_drpo_amplifies_converging_tokens_outside_unless_directional():
    pi, mu = 0.3, 0.6  # Â > 0: converging, |π − µ| = 2δ
    assert weight_at("mask_drpo", pi, mu, 1.0) == pytest.approx(3.0)
    assert weight_at("mask_drpo", pi, mu, 1.0, directional=True) == 1.0
    assert weight_at("drpo", pi, mu, 1.0) == pytest.approx(3.0)
    assert weight_at("dppo_tv", pi, mu, 1.0) == weight_at("dppo_kl", pi, mu, 1.0) == 1.0


def test_weights_are_bounded_for_drpo_and_unbounded_for_spo_along_the_tail():
    mu = 10.0 ** -np.arange(1, 8)
    drpo = weight_at("drpo", 0.3, mu, 1.0)
    spo = weight_at("spo", 0.3, mu, 1.0)
    assert (abs(drpo) <= 1 + 1 / DELTA).all()
    np.testing.assert_allclose(drpo, 1 - (0.3 - mu) / DELTA)
    assert (np.diff(spo) < 0).all() and spo[-1] < -1e5
    logp, behavior_logp, advantage = tokens()
    weight = in_float64(gradient_weight, "drpo", logp, behavior_logp, advantage)
    assert (abs(weight - 1) <= 1 / DELTA).all()


def test_drpo_is_continuous_at_the_boundary_where_dppo_jumps():
    mu, step = 0.4, 1e-9
    pi = mu + DELTA + np.array([-step, step])
    assert abs(np.diff(weight_at("drpo", pi, mu, 1.0)))[0] < 1e-7
    np.testing.assert_array_equal(weight_at("dppo_tv", pi, mu, 1.0), [1.0, 0.0])


PROBABILITY = st.floats(0, 1)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.tuples(PROBABILITY, PROBABILITY), min_size=8, max_size=8))
def test_the_variance_of_the_shift_is_at_most_a_quarter(pairs):
    with np.errstate(divide="ignore"):
        logp, behavior_logp = np.log(pairs).T
    t = table.token(logp, behavior_logp, 1.0)
    assert np.var(abs(np.asarray(t.shift))) <= 0.25 + 1e-6
    assert np.var(table.drpo(t, DELTA)[2]) <= 1 / DELTA**2 + 1e-4


@pytest.mark.parametrize("name", PENALIZED)
def test_with_the_absolute_advantage_reward_scale_moves_no_boundary(name):
    logp, behavior_logp, advantage = tokens()
    weight = in_float64(gradient_weight, name, logp, behavior_logp, advantage)
    scaled = in_float64(gradient_weight, name, logp, behavior_logp, 10 * advantage)
    np.testing.assert_array_equal(weight, scaled)


def test_without_it_the_boundary_is_proportional_to_the_advantage():
    for advantage in (-2.0, -1.0, 0.5, 1.0, 2.0):
        mu = 0.5
        pi = mu + DELTA * advantage  # where drpo_no_advantage stops
        assert weight_at("drpo_no_advantage", pi, mu, advantage) == pytest.approx(0, abs=1e-12)
        pi = mu * (1 + 0.2 * advantage)  # where spo_no_advantage stops
        weight = weight_at("spo_no_advantage", pi, mu, advantage, epsilon=0.2)
        assert weight == pytest.approx(0, abs=1e-12)


def test_the_coefficient_is_unbounded_though_the_weight_is_not():
    def largest(name, mu):
        pi = np.linspace(mu, 1, 200_001)
        return in_float64(token_objective, name, np.log(pi), np.log(mu), 1.0)[1].max()

    for mu, expected in ((1e-2, 4.3), (1e-4, 375)):
        peak = (DELTA + mu) ** 2 / (4 * DELTA * mu)
        assert largest("drpo", mu) == pytest.approx(peak, rel=1e-3)
        assert peak == pytest.approx(expected, rel=0.01)
        assert largest("spo", mu) <= (12.5 + 1) ** 2 / (4 * 12.5) + 1e-6  # 3.65


def test_the_released_delta_never_corrects():
    logp, behavior_logp, advantage = tokens()
    weight = in_float64(gradient_weight, "drpo", logp, behavior_logp, advantage, delta=12.5)
    assert weight.min() >= 0.92 and weight.max() <= 1.08


# ---------------------------------------------------------------------------------- numerics

EXTREME = np.array([0.0, -1e-8, -1e-3, -1, -19.9, -20, -20.1, -50, -110, -1e4, -1e30, -np.inf])


@every_case
def test_extreme_inputs_stay_finite(name, hyper):
    logp, behavior_logp, advantage = np.meshgrid(
        EXTREME, EXTREME, np.array([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 100.0, -100.0])
    )
    logp, behavior_logp, advantage = (
        x.astype(np.float32) for x in (logp, behavior_logp, advantage)
    )
    J, c = token_objective(name, logp, behavior_logp, advantage, **hyper)
    w = gradient_weight(name, logp, behavior_logp, advantage, **hyper)
    assert J.dtype == c.dtype == w.dtype == np.float32
    assert np.isfinite(J).all() and np.isfinite(c).all() and np.isfinite(w).all()
    clipped = np.asarray(beyond_clip(logp, behavior_logp))
    assert clipped.any() and not c[clipped].any() and not w[clipped].any()


def test_beyond_clip_is_beyond_twenty_nats():
    logp = jnp.array([-20.0, -20.1, -30.0, 0.0, -jnp.inf, -jnp.inf])
    behavior_logp = jnp.array([0.0, 0.0, -30.0, -20.1, -jnp.inf, 0.0])
    expected = [False, True, False, True, False, True]
    np.testing.assert_array_equal(beyond_clip(logp, behavior_logp), expected)
    assert LOG_RATIO_CLIP == 20


@every_case
def test_weight_at_zero_advantage(name, hyper):
    logp, behavior_logp, _ = tokens(size=64, dtype=np.float32)
    _, c = token_objective(name, logp, behavior_logp, 0.0, **hyper)
    weight = gradient_weight(name, logp, behavior_logp, 0.0, **hyper)
    if name not in ("cispo", "sapo") and "ratio_cap" not in hyper:
        np.testing.assert_array_equal(weight, 1.0)
    ratio, shift = np.exp(logp - behavior_logp), np.exp(logp) - np.exp(behavior_logp)
    if name == "drpo_no_advantage":  # the pull back needs no advantage
        np.testing.assert_allclose(c, -ratio * shift / DELTA, rtol=1e-5)
    elif name == "spo_no_advantage":
        epsilon = hyper.get("epsilon", 12.5)
        np.testing.assert_allclose(c, -ratio * (ratio - 1) / epsilon, rtol=1e-4)
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


def test_a_new_objective_is_as_short_as_the_docstring_says(monkeypatch):
    monkeypatch.setattr(table, "OBJECTIVES", dict(OBJECTIVES))
    example = re.search(r"\n(    def drpo_cubic.*?)\n\nTo derive", table.__doc__, re.S)[1]
    exec(textwrap.dedent(example), dict(vars(table)))
    weight = assert_coefficient_is_derivative("drpo_cubic", {"delta": 0.2})
    assert weight.min() < 0 and weight.max() > 1
    assert table.OBJECTIVES["drpo_cubic"].hyper == {"delta": 0.15}
    assert table.OBJECTIVES["drpo_cubic"].summary.startswith("J = ")


def test_defaults_are_the_documented_ones():
    assert resolve_hyper("drpo", {}) == {"delta": 0.15}
    assert resolve_hyper("dppo_kl", {}) == {"delta": 0.05, "ratio_cap": None}
    assert resolve_hyper("spo", {}) == {"epsilon": 12.5}
    assert resolve_hyper("grpo", {"dual_clip": 3}) == {
        "epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 3,
    }  # fmt: skip
    assert all(objective.summary for objective in OBJECTIVES.values())


@pytest.mark.parametrize(
    "name, hyper, message",
    [
        ("drop", {}, "Unknown objective 'drop'. Did you mean 'drpo'? Accepted: surrogate, grpo"),
        ("drpo", {"dleta": 1}, "'drpo' 'dleta'. Did you mean 'delta'? Accepted: delta."),
        ("surrogate", {"delta": 1}, "'surrogate' 'delta'. Accepted: none."),
        ("drpo", {"delta": 0}, "'drpo' needs delta to be a number above 0, not 0"),
        ("drpo", {"delta": None}, "delta to be a number above 0, not None"),
        ("drpo", {"delta": float("nan")}, "delta to be a number above 0, not nan"),
        ("spo", {"epsilon": "0.2"}, "epsilon to be a number above 0, not '0.2'"),
        ("grpo", {"dual_clip": 0.5}, "dual_clip to be a number above 1 or None, not 0.5"),
        ("mask_drpo", {"directional": 1}, "directional to be True or False, not 1"),
    ],
)
def test_wrong_names_and_values_are_named(name, hyper, message):
    for function in (token_objective, gradient_weight):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(name, -1.0, -1.0, 1.0, **hyper)
