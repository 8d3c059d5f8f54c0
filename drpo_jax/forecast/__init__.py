"""Forecasts of a rollout step at real lengths, without running it.

lengths  a distribution of lengths, or those of a rollout file
step     the step at these lengths: decode steps, micro-batches, seconds of each phase
"""

from drpo_jax.forecast.lengths import Lengths, parse_lengths
from drpo_jax.forecast.step import forecast, forecast_text, hardware_limits

__all__ = ["Lengths", "forecast", "forecast_text", "hardware_limits", "parse_lengths"]
