"""Properties over the whole input space: log-probabilities from −80 to 0, any advantage, float32.

An example of hypothesis is a whole batch of tokens, of one shape, so that every program compiles once.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis.extra.numpy import arrays

from drpo_jax.objectives import THRESHOLDS, beyond_clip, table
from drpo_jax.objectives.table import OBJECTIVES, gradient_weight, token_objective

SHAPE = (4, 8)  # rows, tokens
DELTAS = tuple(THRESHOLDS["delta"].values())
EPS = float(np.finfo(np.float32).eps)
# No shrinking: an example has 32 tokens, and `everywhere` names the one that fails.
example = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate]
)


def everywhere(condition, *context):
    """Asserts a condition for all tokens. The error shows the arrays of context at the first failure."""
    for at in np.argwhere(~np.asarray(condition)):
        values = [x[tuple(at)] if np.shape(x) == SHAPE else x for x in context]
        raise AssertionError(f"fails for the token with {values}")


def floats(low, high):
    low, high = (float(np.float32(x)) for x in (low, high))
    return st.floats(low, high, width=32, allow_subnormal=False)


def batches(elements, dtype=np.float32):
    return arrays(dtype, SHAPE, elements=elements, fill=st.nothing())


LOGP = floats(-1, 0) | floats(-80, 0)
ADVANTAGE = (floats(-3, 3) | floats(-1e6, 1e6) | st.sampled_from([0.0, -0.0, 1e-6, -1e-20])).map(
    lambda advantage: advantage if abs(advantage) >= 1e-20 else 0.0
)


@st.composite
def tokens(draw):
    """(log π, log µ, Â). Half of the pairs are close to each other, the others arbitrary."""
    logp = draw(batches(LOGP))
    gap = draw(batches(floats(-0.5, 0.5) | floats(-80, 80)))
    return logp, np.clip(logp - gap, -80, 0), draw(batches(ADVANTAGE))


@st.composite
def needs(draw):
    """The additional arrays of some objectives. Top tokens need not belong to one distribution.

    Many tokens share a value here: drawing them all would take most of the time.
    """
    return {
        "mask": draw(arrays(np.int32, SHAPE, elements=st.integers(0, SHAPE[1]))),
        "old_logp": draw(arrays(np.float32, SHAPE, elements=LOGP)),
        "topk_logp": draw(arrays(np.float32, (*SHAPE, 2), elements=LOGP)),
        "behavior_topk_logp": draw(arrays(np.float32, (*SHAPE, 2), elements=LOGP)),
    }


@functools.cache
def program(*cases):
    """One compiled program for (J, c, w) of all cases, (name, ((hyperparameter, value), …))."""

    @jax.jit
    def terms(logp, behavior_logp, advantage, needed):
        def one(name, hyper):
            keywords = {key: needed[key] for key in OBJECTIVES[name].arrays} | dict(hyper)
            J, c = token_objective(name, logp, behavior_logp, advantage, **keywords)
            return J, c, gradient_weight(name, logp, behavior_logp, advantage, **keywords)

        return [one(*case) for case in cases]

    def on_the_host(*args):
        return [tuple(map(np.asarray, result)) for result in terms(*args)]

    return on_the_host


def evaluate(names, *args, **hyper):
    """{name: (J, c, w)} with the same hyperparameters."""
    names = tuple(names)
    results = program(*((name, tuple(hyper.items())) for name in names))(*args)
    return dict(zip(names, results, strict=True))


def seen(logp, behavior_logp):
    """r, π and µ in float64, and whether log r is within the clip."""
    wide = np.float64(logp), np.float64(behavior_logp)
    return np.exp(wide[0] - wide[1]), *map(np.exp, wide), ~np.asarray(beyond_clip(*wide))


@example
@hypothesis.given(tokens=tokens(), needed=needs())
def test_finite_and_consistent_everywhere(cases, tokens, needed):
    frozen = tuple((name, tuple(hyper.items())) for name, hyper in cases)
    advantage = np.float64(tokens[2])
    r, _, _, inside = seen(*tokens[:2])
    for case, (J, c, w) in zip(frozen, program(*frozen)(*tokens, needed), strict=True):
        assert J.dtype == c.dtype == w.dtype == np.float32
        everywhere(np.isfinite(J) & np.isfinite(c) & np.isfinite(w), case, *tokens, J, c, w)
        everywhere(inside | ((c == 0) & (w == 0)), case, *tokens, c, w)
        # c = r·Â·w, except where the forms without |Â| report w = 1; rounding is that of the terms of w
        error = abs(c - r * advantage * w)
        rounding = 50 * EPS * r * abs(advantage) * (1 + abs(w)) + 1e-30
        everywhere(~inside | (abs(advantage) <= 1e-6) | (error <= rounding), case, *tokens, c, w)


@example
@hypothesis.given(tokens=tokens())
def test_drpo_is_bounded_and_its_spread_is_that_of_the_shift(tokens):
    _, pi, mu, inside = seen(*tokens[:2])
    drift = (np.sign(np.float64(tokens[2])) * (pi - mu))[inside]
    for delta in DELTAS:
        results = evaluate(("drpo", "drpo_no_correction", "mask_drpo"), *tokens, {}, delta=delta)
        w, cut, masked = (w for _, _, w in results.values())
        slack = 4 * EPS * (1 + 1 / delta)
        for name, bounded in (("drpo", w), ("mask_drpo", masked)):
            everywhere(~inside | (abs(bounded - 1) <= 1 / delta + slack), name, *tokens, delta)
        everywhere((cut >= 0) & (cut <= 1 + 1 / delta + slack), *tokens, delta, cut)
        if inside.any():
            assert abs(np.std(np.float64(w)[inside]) - np.std(drift) / delta) <= slack
        everywhere(cut == np.maximum(w, 0), *tokens, delta, cut, w)
        # mask_drpo: 1 inside; outside that of DRPO, which is then below 0 or above 2
        everywhere((masked == 1) | (masked == w), *tokens, delta, masked, w)
        outside = (masked < slack) | (masked > 2 - slack)
        everywhere(~inside | (masked == 1) | outside, *tokens, delta, masked)


@example
@hypothesis.given(tokens=tokens(), needed=needs())
def test_the_others_are_bounded_where_their_papers_bound_them(tokens, needed):
    names = ("surrogate", "grpo", "sapo", "cispo", "minirl", "gspo", "dppo_tv", "dppo_kl")
    masks = ("dppo_topk_tv", "dppo_topk_kl", "pdm", "ipo", "cppo", "trm", "vaco")
    results = evaluate((*names, *masks), *tokens, needed)
    inside = seen(*tokens[:2])[3]
    A, more, less = tokens[2], 1 + 4 * EPS, 1 - 4 * EPS
    for name, (J, c, w) in results.items():
        holds = {
            "surrogate": w == 1,
            "sapo": (w >= 0) & (w <= more) & (abs(J) <= 4 * abs(A) * more),
            "cispo": (abs(c) >= 0.8 * abs(A) * less) & (abs(c) <= 1.2 * abs(A) * more),
            "minirl": abs(c) <= 5 * abs(A) * more,
            "gspo": c <= 1.0004 * np.maximum(A, 0) * more,
        }.get(name, (w == 0) | (w == 1))  # grpo and the masks: 0 or 1
        everywhere(~inside | holds, name, *tokens, J, c, w)
    everywhere(results["grpo"][0] <= results["surrogate"][0], *tokens)  # a pessimistic bound
    capped = evaluate(("dppo_tv", "dppo_topk_kl"), *tokens, needed, ratio_cap=2.0)
    for name, (_, c, _) in capped.items():
        everywhere(abs(c) <= 2 * abs(A), name, *tokens, c)


@example
@hypothesis.given(tokens=tokens())
def test_at_the_released_threshold_no_weight_leaves_eight_percent_of_one(tokens):
    w = evaluate(("drpo",), *tokens, {}, delta=THRESHOLDS["delta"]["released"])["drpo"][2]
    inside = seen(*tokens[:2])[3]
    everywhere(~inside | (abs(w - 1) <= 0.08 + EPS), *tokens, w)


@jax.jit
def boundaries(logp, behavior_logp, advantage, delta):
    """w of DPPO-TV and DRPO, both again without the clip of log r, and sign(Â)·(π − µ)."""
    t = table.token(logp, behavior_logp, advantage)
    pair = ("dppo_tv", "drpo")
    weights = [gradient_weight(n, logp, behavior_logp, advantage, delta=delta) for n in pair]
    return *weights, *(OBJECTIVES[n].equation(t, delta=delta)[2] for n in pair), t.drift


@example
@hypothesis.given(
    tokens=tokens(),
    delta=batches(floats(2.0**-10, 20)),
    near=batches(st.sampled_from([None, -1e-2, -1e-4, -1e-5, 1e-5, 1e-4, 1e-2]), dtype=object),
)
def test_dppo_keeps_exactly_the_tokens_whose_drpo_weight_is_not_negative(tokens, delta, near):
    shift = abs(np.asarray(table.token(*tokens).shift))
    offset = np.array([[x or 0 for x in row] for row in near])  # δ close to the shift of the token
    delta = np.where((offset != 0) & (shift > 1e-6), shift * (1 + offset), delta)
    delta = delta.astype(np.float32)
    kept, w, kept_by_equation, w_of_equation, drift = map(np.asarray, boundaries(*tokens, delta))
    at_boundary = abs(drift - delta) <= 2e-6 * delta + 10 * EPS  # a mask keeps what is within 8 EPS
    inside = seen(*tokens[:2])[3]
    agree = (kept == 1) == (w >= 0)
    everywhere(at_boundary | np.where(inside, agree, (kept == 0) & (w == 0)), *tokens, delta)
    everywhere(at_boundary | ((kept_by_equation == 1) == (w_of_equation >= 0)), *tokens, delta)


@example
@hypothesis.given(tokens=tokens(), other=batches(LOGP), step=batches(floats(-1e-3, 1e-3)))
def test_weights_are_lipschitz_where_they_are_continuous(tokens, other, step):
    """DRPO is Lipschitz in π with 1/δ, SPO in r with 1/ε, and SAPO in r."""
    logp, behavior_logp, advantage = tokens
    moved = np.where(other < -1, np.clip(logp + step, -80, 0), other)  # near and far
    (r, pi, _, inside), (other_r, other_pi, _, also) = (
        seen(x, behavior_logp) for x in (logp, moved)
    )
    names = ("drpo", "drpo_no_correction", "spo", "sapo", "surrogate")
    one, two = (evaluate(names, x, behavior_logp, advantage, {}) for x in (logp, moved))
    in_pi = abs(pi - other_pi) + 4 * EPS
    # A rounded log r is off by up to EPS · |log r| / 2, and r by the same fraction.
    log_r = np.maximum(abs(logp - behavior_logp), abs(moved - behavior_logp))
    in_r = abs(r - other_r) + (8 + log_r) * EPS * (1 + np.maximum(r, other_r))
    for name, bound in (
        ("drpo", in_pi / 0.15),
        ("drpo_no_correction", in_pi / 0.15),
        ("spo", in_r / 12.5 + 4 * EPS),
        ("sapo", in_r),
        ("surrogate", 0),
    ):
        change = abs(one[name][2] - two[name][2])
        everywhere(~(inside & also) | (change <= bound), name, *tokens, moved, change)
    # These bounded weights determine how smooth the objectives are in r.
    size = np.float64(abs(advantage)) * in_r + 1e-30
    for name, most in (("surrogate", 1), ("sapo", 1), ("drpo", 1 + 1 / 0.15)):
        change = abs(np.float64(one[name][0]) - two[name][0])
        everywhere(~(inside & also) | (change <= 2 * most * size), name, *tokens, moved, change)


@example
@hypothesis.given(
    mu=batches(floats(2.0**-10, 0.75)),
    delta=floats(2.0**-10, 0.2),
    advantage=batches(floats(0.125, 8)),
)
def test_dppo_jumps_at_every_boundary_where_drpo_passes_through_zero(mu, delta, advantage):
    inner, outer = (np.log(mu + delta * x).astype(np.float32) for x in (0.99, 1.01))
    others = np.log(mu), advantage, np.full(SHAPE, delta, np.float32)
    (kept, w, *_), (dropped, corrected, *_) = (
        map(np.asarray, boundaries(x, *others)) for x in (inner, outer)
    )
    everywhere((kept == 1) & (dropped == 0), mu, delta)
    everywhere((w > 0) & (corrected < 0), mu, delta, w, corrected)
    everywhere(w - corrected <= 0.02 + 16 * EPS / delta, mu, delta, w, corrected)


@example
@hypothesis.given(tokens=tokens(), power=st.integers(-10, 10))
def test_reward_scale_moves_no_boundary_with_the_absolute_advantage(tokens, power):
    names = ("grpo", "cispo", "sapo", "spo", "dppo_tv", "dppo_kl")
    names += ("drpo", "drpo_no_correction", "mask_drpo")
    scale = np.float32(2.0**power)
    one, two = (evaluate(names, *tokens[:2], A, {}) for A in (tokens[2], tokens[2] * scale))
    for name in names:
        everywhere(one[name][2] == two[name][2], name, *tokens, scale)
        close = np.isclose(two[name][1], one[name][1] * scale, rtol=1e-6, atol=1e-30)
        everywhere(close, name, *tokens, scale)


@example
@hypothesis.given(tokens=tokens())
def test_the_coefficient_has_the_sign_of_the_advantage_unless_it_corrects(tokens):
    names = ("surrogate", "grpo", "cispo", "sapo", "spo", "dppo_tv", "drpo", "mask_drpo")
    for name, (_, c, w) in evaluate(names, *tokens, {}).items():
        right = np.sign(c) == np.sign(tokens[2]) * np.sign(w)
        everywhere(right | (abs(c) < 1e-30), name, *tokens, c, w)  # r·Â may underflow
