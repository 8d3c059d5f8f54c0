"""Rewards for form: one closed box at the end, and DAPO's soft overlong punishment."""

import numpy as np
import pytest

from drpo_jax.rewards import format_reward, overlong_penalty

GOOD = [
    r"\boxed{7}",
    r"So it is $\boxed{\frac{1}{2}}$.",
    r"\[ x = \boxed{7} \]",
    r"\(\boxed{\{1,2\}}\).",
    "$$\\boxed{7}$$\n\n",
    r"\boxed {7} .",
]
BAD = [
    "",
    "7",
    r"\boxed{}",
    r"\boxed{ }",
    r"\boxed{7",
    r"\boxed{7} is it",
    r"\boxed{7} \boxed{8}",
    r"\boxed{\boxed{7}}",
    r"\boxed 7",
    r"\boxed{7}}",
    r"\boxed{7}" + "x" * 1_000_000,
    r"\boxed{7}" + " ." * 500_000 + "x",
    r"\boxed{" * 100_000,
]


def test_format():
    reward = format_reward(GOOD + BAD)
    assert reward.dtype == np.float32
    assert reward.tolist() == [1.0] * len(GOOD) + [0.0] * len(BAD)
    assert format_reward([]).shape == (0,)


def test_overlong():
    """DAPO's setting: at most 20,480 tokens, of which the last 4,096 are punished."""
    lengths = [0, 16_384, 16_385, 18_432, 20_479, 20_480, 30_000]
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1]
    penalty = overlong_penalty(lengths, max_length=20_480, buffer=4_096)
    assert penalty.dtype == np.float32 and penalty.tolist() == expected
    n = np.arange(1, 40)
    by_cases = [0 if x <= 20 else (20 - x) / 10 if x <= 30 else -1 for x in n]
    np.testing.assert_allclose(overlong_penalty(n, 30, 10), by_cases, rtol=1e-6)
    assert overlong_penalty(n, 30, 30)[0] == np.float32(-1 / 30)


@pytest.mark.parametrize("buffer", [0, -1, 31])
def test_overlong_settings(buffer):
    with pytest.raises(
        ValueError, match=rf"buffer is {buffer}; it must be from 1 to max_length, 30"
    ):
        overlong_penalty([3], 30, buffer)
