"""Tokens that reach every regime of every objective, with the additional arrays of some objectives.

Axis letters: B rows, T tokens of a row, K top tokens.
"""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from drpo_jax.objectives import OBJECTIVES

CASES = [(name, {}) for name in OBJECTIVES] + [
    ("grpo", {"epsilon_high": 0.28}),
    ("grpo", {"dual_clip": 3.0}),
    ("cispo", {"epsilon_low": 10.0, "epsilon_high": 4.0}),
    ("minirl", {"epsilon_low": 0.1, "epsilon_high": 0.1, "ratio_cap": 1.5}),
    ("sapo", {"tau_positive": 0.5, "tau_negative": 2.0}),
    ("gspo", {"epsilon_low": 0.2, "epsilon_high": 0.3}),
    ("spo", {"epsilon": 0.2}),
    ("spo_no_advantage", {"epsilon": 0.2}),
    ("dppo_tv", {"ratio_cap": 2.0}),
    ("dppo_kl", {"ratio_cap": 2.0}),
    ("dppo_topk_tv", {"ratio_cap": 2.0}),
    ("dppo_topk_kl", {"delta": 0.2}),
    ("drpo", {"delta": 12.5}),
    ("drpo_no_advantage", {"delta": 0.4}),
    ("drpo_no_correction", {"delta": 12.5}),
    ("mask_drpo", {"directional": True}),
    ("mask_drpo", {"delta": 0.01}),
    ("mask_drpo", {"mask_delta": 0.4}),
    ("mask_drpo", {"delta": 12.5, "mask_delta": 0.15, "directional": True}),
]


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """Compilation dominates the time of these tests."""


@pytest.fixture(params=CASES, ids=lambda case: "-".join((case[0], *case[1])))
def case(request):
    """(name, hyperparameters) of every objective, some with more than one setting."""
    return request.param


@pytest.fixture(scope="session")
def cases():
    """All cases."""
    return CASES


class Batch(NamedTuple):
    """float64 arrays [B, T], and the additional arrays of some objectives by name."""

    logp: np.ndarray
    behavior_logp: np.ndarray
    advantage: np.ndarray
    arrays: dict

    def needs(self, name):
        """The arrays of the objective called `name`, as keyword arguments."""
        return {key: self.arrays[key] for key in OBJECTIVES[name].arrays}

    def astype(self, dtype):
        """The same in another floating dtype; the mask keeps its own."""
        cast = {k: v if k == "mask" else v.astype(dtype) for k, v in self.arrays.items()}
        return Batch(*(x.astype(dtype) for x in self[:3]), cast)


@pytest.fixture(scope="session")
def batch():
    """40 rows of 100 tokens with |log r| < 20. test_table.py checks which regimes they reach."""
    rng, shape = np.random.default_rng(0), (40, 100)
    logp, behavior_logp = np.log(rng.beta(0.3, 0.5, (2, *shape)))
    near = rng.random(shape) < 0.5  # half of them close to on-policy
    logp = np.where(near, np.minimum(behavior_logp + rng.normal(0, 0.3, shape), -1e-4), logp)
    rare = rng.random(shape) < 0.1  # some whose ratio is huge or tiny
    behavior_logp = np.where(rare, -1.0 - rng.uniform(0, 19.9, shape), behavior_logp)
    logp = np.where(rare, -1.0, logp)
    swapped = rare & (rng.random(shape) < 0.5)
    logp, behavior_logp = np.where(swapped, (behavior_logp, logp), (logp, behavior_logp))
    # Ten rows whose sequence ratios are around GSPO's clip.
    logp[:10] = np.minimum(behavior_logp[:10] + rng.normal(0, 1e-3, (10, 100)), -1e-4)
    logp = np.clip(logp, behavior_logp - 19.99, behavior_logp + 19.99)

    # Several responses per row, some tokens of none (0). Â is constant within a response.
    mask, advantage = np.zeros(shape, np.int32), rng.normal(0, 1, shape)
    for row in range(shape[0]):
        cuts = np.sort(rng.choice(np.arange(1, shape[1]), 8, replace=False))
        for number, span in enumerate(np.split(np.arange(shape[1]), cuts)):
            mask[row, span] = number
            if number:
                advantage[row, span] = advantage[row, span[0]]

    # Whole distributions over eight tokens; the four likeliest under µ are recorded.
    logits = rng.normal(0, 2, (*shape, 8))
    moved = logits + rng.choice([0.02, 0.3, 2.0], (*shape, 1)) * rng.normal(0, 1, (*shape, 8))
    likeliest = np.argsort(-logits, axis=-1)[..., :4]
    topk = [
        np.take_along_axis(x - np.log(np.exp(x).sum(-1, keepdims=True)), likeliest, axis=-1)
        for x in (moved, logits)
    ]
    old_logp = np.minimum(logp + rng.normal(0, 0.3, shape), -1e-6)
    arrays = {"mask": mask, "old_logp": old_logp}
    arrays |= {"topk_logp": topk[0], "behavior_topk_logp": topk[1]}
    return Batch(logp, behavior_logp, advantage, arrays)


@pytest.fixture(scope="session")
def in_float64():
    """Computes function(*args) in float64. Returns: NumPy arrays."""

    def call(function, *args, **kwargs):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, function(*args, **kwargs))

    return call
