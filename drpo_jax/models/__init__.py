"""The decoder that both learner and sampler run."""

from drpo_jax.models.cache import KV, DeltaState, Ring
from drpo_jax.models.huggingface import from_pretrained, read_config, save_pretrained
from drpo_jax.models.moe import load_balance_loss
from drpo_jax.models.presets import PRESETS
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.models.transformer import (
    Hidden,
    Prefix,
    Transformer,
    router_metrics,
)

__all__ = [
    "KV",
    "PRESETS",
    "Compute",
    "DeltaState",
    "Hidden",
    "ModelConfig",
    "Prefix",
    "Ring",
    "Transformer",
    "from_pretrained",
    "load_balance_loss",
    "read_config",
    "router_metrics",
    "save_pretrained",
]
