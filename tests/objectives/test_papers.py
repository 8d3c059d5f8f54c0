"""Golden values: every objective against the papers' own formulas.

NumPy in float64, written from π, µ and Â as the papers print them; nothing of the package is used.
Both J and c are written out, so that neither is only compared with what the other implies.
"""

from typing import NamedTuple

import numpy as np
import pytest

from drpo_jax.objectives import OBJECTIVES, gradient_weight, token_objective


class Tokens(NamedTuple):
    p: np.ndarray  # π
    m: np.ndarray  # µ
    A: np.ndarray  # Â
    old: np.ndarray  # π of the trainer before the first update
    sequence: np.ndarray  # [rows, time], the number of the token's response in its row; 0: none
    top_p: np.ndarray  # [rows, time, K], π and µ of the likeliest tokens under µ
    top_m: np.ndarray


def surrogate(t):
    return t.p / t.m * t.A, t.p / t.m * t.A


def grpo(t, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None):
    r = t.p / t.m
    J = np.minimum(r * t.A, np.clip(r, 1 - epsilon_low, 1 + epsilon_high) * t.A)
    passes = np.where(t.A > 0, r <= 1 + epsilon_high, r >= 1 - epsilon_low)
    if dual_clip:
        passes &= (t.A > 0) | (r <= dual_clip)
        J = np.where(t.A < 0, np.maximum(J, dual_clip * t.A), J)
    return J, passes * r * t.A


def minirl(t, epsilon_low=0.2, epsilon_high=0.27, ratio_cap=5.0):
    moved = t.p / t.old
    M = np.where(t.A > 0, moved <= 1 + epsilon_high, moved >= 1 - epsilon_low)
    c = M * np.minimum(t.p / t.m, ratio_cap) * t.A
    return c * np.log(t.p), c


def cispo(t, epsilon_low=0.2, epsilon_high=0.2):
    c = np.clip(t.p / t.m, 1 - epsilon_low, 1 + epsilon_high) * t.A
    return c * np.log(t.p), c


def sapo(t, tau_positive=1.0, tau_negative=1.05):
    r, tau = t.p / t.m, np.where(t.A > 0, tau_positive, tau_negative)
    gate = 1 / (1 + np.exp(-tau * (r - 1)))
    return 4 / tau * gate * t.A, 4 * gate * (1 - gate) * r * t.A


def gspo(t, epsilon_low=3e-4, epsilon_high=4e-4):
    """For each token: J of its response, and T times ∂J/∂log π of the token."""
    J, c = np.full(t.p.shape, np.nan), np.full(t.p.shape, np.nan)
    for row, numbers in enumerate(t.sequence):
        for number in set(numbers) - {0}:
            at = row, numbers == number
            ratios, A = t.p[at] / t.m[at], t.A[at][0]
            s = np.exp(np.log(ratios).sum() / len(ratios))
            clipped = min(max(s, 1 - epsilon_low), 1 + epsilon_high)
            J[at] = min(s * A, clipped * A)
            c[at] = len(ratios) * (s / len(ratios)) * A if s * A <= clipped * A else 0
    return J, c


def spo(t, epsilon=12.5):
    r = t.p / t.m
    J = r * t.A - abs(t.A) / (2 * epsilon) * (r - 1) ** 2
    return J, r * (t.A - abs(t.A) / epsilon * (r - 1))


def spo_no_advantage(t, epsilon=12.5):
    r = t.p / t.m
    return r * t.A - (r - 1) ** 2 / (2 * epsilon), r * (t.A - (r - 1) / epsilon)


def _dppo(t, divergence, delta, ratio_cap):
    r = t.p / t.m
    dropped = (divergence > delta) & np.where(t.A > 0, t.p > t.m, t.p < t.m)
    if ratio_cap is None:
        return ~dropped * r * t.A, ~dropped * r * t.A
    # Above the cap, ∂J/∂log r stays at the cap.
    beyond = np.where(r > ratio_cap, ratio_cap * np.log(r / ratio_cap), 0)
    value = np.minimum(r, ratio_cap)
    return ~dropped * (value + beyond) * t.A, ~dropped * value * t.A


def _side(t, delta, low, high):
    return np.where(t.p > t.m, high or delta, low or delta)


def dppo_tv(t, delta=0.15, delta_low=None, delta_high=None, ratio_cap=None):
    return _dppo(t, abs(t.p - t.m), _side(t, delta, delta_low, delta_high), ratio_cap)


def dppo_kl(t, delta=0.05, delta_low=None, delta_high=None, ratio_cap=None):
    kl = t.m * np.log(t.m / t.p) + (1 - t.m) * np.log((1 - t.m + 1e-8) / (1 - t.p + 1e-8))
    return _dppo(t, kl, _side(t, delta, delta_low, delta_high), ratio_cap)


def dppo_topk_tv(t, delta=0.15, delta_low=None, delta_high=None, ratio_cap=None):
    p, m = _with_remainder(t)
    tv = 0.5 * abs(p - m).sum(-1)
    return _dppo(t, tv, _side(t, delta, delta_low, delta_high), ratio_cap)


def dppo_topk_kl(t, delta=0.05, delta_low=None, delta_high=None, ratio_cap=None):
    p, m = _with_remainder(t)
    kl = (m * np.log(m / p)).sum(-1)
    return _dppo(t, kl, _side(t, delta, delta_low, delta_high), ratio_cap)


def _kept(t, keeps):
    return keeps * t.p / t.m * t.A, keeps * t.p / t.m * t.A


def pdm(t, delta=0.15):
    """The sampled token's step e_k − π changes KL(µ‖π), whose slope in the logits is π − µ."""
    p, m = _with_remainder(t)
    slope = t.p - t.m - (p * (p - m)).sum(-1)
    return _kept(t, ~(((m * np.log(m / p)).sum(-1) > delta) & (t.A * slope > 0)))


def ipo(t, delta=0.1):
    return _kept(t, abs(t.p - t.m) <= delta)


def _responses(t):
    """Yields the row of every response, and the columns of its tokens."""
    for row, numbers in enumerate(t.sequence):
        for number in set(numbers) - {0}:
            yield row, np.flatnonzero(numbers == number)


def _prefix_bounds(t, delta, w_min, delta_b):
    """CPPO token by token: the bound on |π − µ| that each prefix leaves; NaN outside of responses."""
    bounds = np.full(t.p.shape, np.nan)
    for row, columns in _responses(t):
        D = abs(t.p - t.m)[row, columns]
        budget = min(max(np.quantile(D, 0.9), delta_b), 2 * delta_b)
        allowed = spent = 0.0
        for i, column in enumerate(columns):
            w = 1 - (1 - w_min) * i / max(len(columns) - 1, 1)
            bounds[row, column] = min(delta, delta + budget * allowed - spent) / w
            allowed, spent = allowed + w, spent + w * D[i]
    return bounds


def cppo(t, delta=0.2, w_min=0.8, delta_b=0.02):
    bound = _prefix_bounds(t, delta, w_min, delta_b)
    kept = (t.A * (t.p / t.m - 1) <= 0) | (abs(t.p - t.m) <= bound)
    return _kept(t, np.where(np.isnan(bound), np.nan, kept))


def drpo_prefix(t, delta=0.2, w_min=0.8, delta_b=0.02):
    return drpo(t, np.maximum(_prefix_bounds(t, delta, w_min, delta_b), delta_b))


def trm(t, delta=0.15):
    kept = np.full(t.p.shape, np.nan)
    for at in _responses(t):
        kept[at] = abs(t.p - t.m)[at].max() <= delta
    return _kept(t, kept)


def vaco(t, delta=0.05):
    kept = np.full(t.p.shape, np.nan)
    for at in _responses(t):
        converging = t.A[at] * (t.p[at] - t.m[at]) <= 0
        kept[at] = converging | (abs(t.p - t.m)[at].mean() <= delta)
    return _kept(t, kept)


def _with_remainder(t):
    return (np.append(x, 1 - x.sum(-1, keepdims=True), axis=-1) for x in (t.top_p, t.top_m))


def drpo(t, delta=0.15, delta_low=None, delta_high=None):
    r, delta = t.p / t.m, _side(t, delta, delta_low, delta_high)
    J = r * t.A - abs(t.A) / (2 * delta) * t.m * (r - 1) ** 2
    return J, r * t.A * (1 - np.sign(t.A * (r - 1)) * abs(t.p - t.m) / delta)


def drpo_decoupled(t, delta=0.15, rho_cap=np.inf):
    """DRPO of π and π_old, times min(ρ, cap)."""
    J, c = drpo(t._replace(m=t.old), delta)
    weight = np.minimum(t.old / t.m, rho_cap)
    return weight * J, weight * c


def drpo_no_advantage(t, delta=0.15):
    r = t.p / t.m
    return r * t.A - t.m * (r - 1) ** 2 / (2 * delta), r * (t.A - (t.p - t.m) / delta)


def drpo_no_correction(t, delta=0.15):
    """DRPO up to the boundary. Beyond it J keeps its value at the boundary."""
    bound = np.where(t.A > 0, np.minimum(t.p, t.m + delta), np.maximum(t.p, t.m - delta))
    past = bound != t.p
    J, c = drpo(t._replace(p=bound), delta)
    return J, np.where(past, 0, c)


def mask_drpo(t, delta=0.15, mask_delta=None, directional=False):
    mask_delta = mask_delta or delta
    r, outside = t.p / t.m, abs(t.p - t.m) > mask_delta
    if directional:
        outside &= t.A * (r - 1) > 0
    penalty = abs(t.A) * ((t.p - t.m) ** 2 - mask_delta**2) / (2 * delta * t.m)
    return r * t.A - outside * penalty, np.where(outside, drpo(t, delta)[1], r * t.A)


PAPERS = {name: globals()[name] for name in OBJECTIVES if name in globals()}


def test_every_objective_that_ships_is_written_down():
    assert len(PAPERS) >= 23


def test_both_are_the_papers_equations(case, batch, in_float64):
    name, hyper = case
    if name not in PAPERS:
        pytest.skip(f"{name} is not written down here")
    arrays = batch.arrays
    probabilities = map(np.exp, (batch.logp, batch.behavior_logp))
    top = np.exp(arrays["topk_logp"]), np.exp(arrays["behavior_topk_logp"])
    old = np.exp(arrays["old_logp"])
    tokens = Tokens(*probabilities, batch.advantage, old, arrays["mask"], *top)
    expected_J, expected_c = PAPERS[name](tokens, **hyper)

    arguments = batch[:3], batch.needs(name) | hyper
    J, c = in_float64(token_objective, name, *arguments[0], **arguments[1])
    w = in_float64(gradient_weight, name, *arguments[0], **arguments[1])
    where = ~np.isnan(expected_J)  # Outside of responses, some define no terms.
    assert where.mean() > 0.8
    np.testing.assert_allclose(J[where], expected_J[where], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(c[where], expected_c[where], rtol=1e-6, atol=1e-9)
    ratio = tokens.p / tokens.m * tokens.A
    np.testing.assert_allclose(w[where], (expected_c / ratio)[where], rtol=1e-5, atol=1e-6)


# One token by hand, r = 3/2 and Â = 2: diverging, inside every boundary but the ratio clips and
# VACO's 0.05, and at that of IPO. It is the first of a response of equal tokens.
# π_old = 1/4, so that π/π_old = 1.2; of the two likeliest tokens and the others µ = .5, .2, .3 and
# π = .4, .3, .3: TV = .1, KL = .0305. Binary KL = .0257. log .3 = −1.2039728.
INSIDE = {
    "surrogate": (3, 3),
    "grpo": (1.2 * 2, 0),
    "cispo": (1.2 * 2 * -1.2039728, 1.2 * 2),
    "minirl": (1.5 * 2 * -1.2039728, 3),
    "sapo": (4 * 0.62245933 * 2, 4 * 0.62245933 * 0.37754067 * 3),  # σ(½), σ(−½)
    "gspo": (1.0004 * 2, 0),
    "spo": (3 - 2 * 0.25 / 25, 3 * 0.96),
    "spo_no_advantage": (3 - 0.25 / 25, 1.5 * (2 - 0.04)),
    "dppo_tv": (3, 3),
    "dppo_kl": (3, 3),
    "dppo_topk_tv": (3, 3),
    "dppo_topk_kl": (3, 3),
    "pdm": (3, 3),
    "ipo": (3, 3),
    "cppo": (3, 3),
    "trm": (3, 3),
    "vaco": (0, 0),
    "drpo_prefix": (3 - 2 * 0.2 * 0.25 / 0.4, 3 * (1 - 0.1 / 0.2)),
    "drpo_decoupled": (3 - 2 * 0.05**2 / (0.3 * 0.2), 3 * (1 - 0.05 / 0.15)),
    "drpo": (3 - 2 * 0.2 * 0.25 / 0.3, 3 * (1 - 0.1 / 0.15)),
    "drpo_no_advantage": (3 - 0.2 * 0.25 / 0.3, 1.5 * (2 - 0.1 / 0.15)),
    "drpo_no_correction": (3 - 2 * 0.2 * 0.25 / 0.3, 3 * (1 - 0.1 / 0.15)),
    "mask_drpo": (3, 3),
}
# The mirror image, past the boundaries: µ = .4, π = .1, r = ¼, Â = −2; π − µ = −.3 = −2δ. The top
# tokens: µ = .4, .3, .3 and π = .1, .4, .5, TV = .3, KL = .3150; Binary KL = .3112. π_old = .2.
# log .1 = −2.3025851.
OUTSIDE = {
    "surrogate": (-0.5, -0.5),
    "grpo": (0.8 * -2, 0),
    "cispo": (0.8 * -2 * -2.3025851, 0.8 * -2),
    "minirl": (0, 0),  # π/π_old = ½
    "sapo": (4 / 1.05 * 0.31270572 * -2, 4 * 0.31270572 * 0.68729428 * -0.5),  # σ(∓.7875)
    "gspo": (0.9997 * -2, 0),
    "spo": (-0.5 - 2 * 0.5625 / 25, -0.5 * (1 - 0.75 / 12.5)),
    "spo_no_advantage": (-0.5 - 0.5625 / 25, 0.25 * (-2 + 0.75 / 12.5)),
    "dppo_tv": (0, 0),
    "dppo_kl": (0, 0),
    "dppo_topk_tv": (0, 0),
    "dppo_topk_kl": (0, 0),
    "pdm": (0, 0),  # the bracket is −.3 + .1·.3 − .4·.1 − .5·.2 = −.41
    "ipo": (0, 0),
    "cppo": (0, 0),
    "trm": (0, 0),
    "vaco": (0, 0),
    "drpo_prefix": (-0.5 - 2 * 0.4 * 0.5625 / 0.4, -0.5 * (1 - 1.5)),
    "drpo_decoupled": (-0.5 - 2 * 0.1**2 / (0.3 * 0.4), -0.5 * (1 - 0.1 / 0.15)),
    "drpo": (-0.5 - 2 * 0.4 * 0.5625 / 0.3, -0.5 * (1 - 2)),
    "drpo_no_advantage": (-0.5 - 0.4 * 0.5625 / 0.3, 0.25 * (-2 + 2)),
    "drpo_no_correction": (-2 + 2 * 0.15 / 0.8, 0),
    "mask_drpo": (-0.5 - 2 * (0.09 - 0.0225) / (0.3 * 0.4), -0.5 * (1 - 2)),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    "by_hand, pi, mu, advantage, old, top_pi, top_mu",
    [
        (INSIDE, 0.3, 0.2, 2.0, 0.25, (0.4, 0.3), (0.5, 0.2)),
        (OUTSIDE, 0.1, 0.4, -2.0, 0.2, (0.1, 0.4), (0.4, 0.3)),
    ],
    ids=["inside", "outside"],
)
def test_one_token_by_hand(name, by_hand, pi, mu, advantage, old, top_pi, top_mu):
    def many(x):  # a shape that other tests compile as well
        return np.broadcast_to(np.float32(x), (40, 100, *np.shape(x)))

    arrays = {
        "mask": many(1).astype(bool),
        "old_logp": np.log(many(old)),
        "topk_logp": np.log(many(top_pi)),
        "behavior_topk_logp": np.log(many(top_mu)),
    }
    arguments = {key: arrays[key] for key in OBJECTIVES[name].arrays}
    tokens = np.log(many(pi)), np.log(many(mu)), many(advantage)
    J, c = token_objective(name, *tokens, **arguments)
    w = gradient_weight(name, *tokens, **arguments)
    expected = *by_hand[name], by_hand[name][1] / (pi / mu * advantage)
    np.testing.assert_allclose([J[0, 0], c[0, 0], w[0, 0]], expected, rtol=1e-5, atol=1e-6)
