"""Tokens that reach every regime of every objective, and settings of every objective."""

import jax
import numpy as np
import pytest

from drpo_jax.objectives import OBJECTIVES
from drpo_jax.objectives.check import random_tokens

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
    ("dppo_tv", {"delta_low": 0.05, "delta_high": 0.3}),
    ("dppo_kl", {"delta_high": 0.3}),
    ("dppo_topk_tv", {"delta_low": 0.02}),
    ("dppo_topk_kl", {"delta_low": 0.2, "delta_high": 0.01}),
    ("pdm", {"delta": 0.01}),
    ("cppo", {"delta": 0.05, "w_min": 0.3, "delta_b": 0.1}),
    ("trm", {"delta": 0.5}),
    ("drpo", {"delta": 12.5}),
    ("drpo", {"delta_low": 0.05, "delta_high": 0.3}),
    ("drpo_prefix", {"delta": 0.05, "w_min": 0.3, "delta_b": 0.1}),
    ("drpo_decoupled", {"delta": 0.4}),
    ("drpo_decoupled", {"rho_cap": 2.0}),
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


@pytest.fixture(scope="session")
def batch():
    """40 rows of 100 tokens with |log r| < 20. test_table.py checks which regimes they reach."""
    return random_tokens()


@pytest.fixture(scope="session")
def in_float64():
    """Computes function(*args) in float64. Returns: NumPy arrays."""

    def call(function, *args, **kwargs):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, function(*args, **kwargs))

    return call
