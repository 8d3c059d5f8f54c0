"""Sampling responses, with the exact logprob of every token."""

from drpo_jax.sampler.engine import Sampler
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.token import SamplingParams

__all__ = ["Rollouts", "Sampler", "SamplingParams"]
