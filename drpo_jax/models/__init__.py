"""The decoder that both learner and sampler run."""

from drpo_jax.models.layers import Compute
from drpo_jax.models.moe import load_balance_loss
from drpo_jax.models.transformer import Hidden, ModelConfig, Transformer, router_metrics

__all__ = [
    "Compute",
    "Hidden",
    "ModelConfig",
    "Transformer",
    "load_balance_loss",
    "router_metrics",
]
