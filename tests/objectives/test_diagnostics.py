"""The summary of a batch's weights, by hand and under micro-batching."""

import numpy as np
import pytest

from drpo_jax.objectives import gradient_weight, token_objective, weight_summary

PI = np.array([[0.5, 0.9, 0.3, 0.55], [1e-30, 0.02, 0.7, 0.99]])
MU = np.array([[0.5, 0.6, 0.6, 0.50], [0.5, 0.01, 0.1, 0.01]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


def summary(rows=slice(None), mask=MASK):
    logp, behavior_logp = np.log(PI).astype("float32"), np.log(MU).astype("float32")
    _, c = token_objective("drpo", logp, behavior_logp, 1.0)
    w = gradient_weight("drpo", logp, behavior_logp, 1.0)
    return weight_summary(w[rows], logp[rows], behavior_logp[rows], c[rows], mask[rows])


def test_by_hand():
    sums, extremes = summary()
    counted = MASK > 0
    weight = 1 - (PI - MU)[counted] / 0.15
    weight[4] = 0  # beyond the clip
    ratio = (PI / MU)[counted]
    ratio[4] = np.exp(-20)
    expected = {
        "weight/corrected": 1,  # 0.6 -> 0.9
        "weight/attenuated": 3,  # 0.5 -> 0.55, 0.01 -> 0.02, and the clipped one
        "weight/amplified": 1,  # 0.6 -> 0.3; on-policy (w = 1) is neither
        "weight/mean": weight.sum(),
        "policy/shift": abs(PI - MU)[counted].sum(),
        "policy/ratio": ratio.sum(),
        "policy/kl": (ratio - 1 - np.log(ratio)).sum(),
        "policy/tail": 1,
        "policy/beyond_clip": 1,
    }
    assert sums.keys() == expected.keys()
    for name, (total, count) in sums.items():
        assert count == 6
        assert total == pytest.approx(expected[name], rel=1e-5), name
    assert extremes["weight/w_min"] == pytest.approx(-1, rel=1e-5)
    assert extremes["weight/w_max"] == pytest.approx(3, rel=1e-5)
    assert extremes["policy/shift_max"] == pytest.approx(0.5)
    assert extremes["policy/ratio_max"] == pytest.approx(2)
    assert extremes["weight/coefficient_max"] == pytest.approx(2 * (1 - 0.01 / 0.15), rel=1e-5)


def test_micro_batches_add_up():
    whole, extremes = summary()
    parts = [summary(slice(0, 1)), summary(slice(1, 2)), summary(mask=MASK * 0)]
    for name, pair in whole.items():
        np.testing.assert_allclose(np.sum([sums[name] for sums, _ in parts], axis=0), pair, 1e-6)
    for name, value in extremes.items():
        combine = min if name.endswith("_min") else max
        assert combine(extreme[name] for _, extreme in parts) == value
