"""Sampling responses, with the exact logprob of every token."""

from drpo_jax.sampler.engine import Rollouts, Sampler
from drpo_jax.sampler.token import SamplingParams

__all__ = ["Rollouts", "Sampler", "SamplingParams"]
