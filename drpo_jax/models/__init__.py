"""The decoder that both the learner and the sampler run.

One class, `Transformer`, covers all families below. The learner calls `Transformer.hidden` on whole
sequences. The sampler calls it with a `Prefix` to prefill prompts in chunks, and calls
`Transformer.decode` to extend every sequence by one token.

Files, in reading order:

    settings     `ModelConfig`, the architecture, and `Compute`, how it is computed
    transformer  `Block` and `Transformer`: the whole model
    layers       parameters with logical axes, projections, norms, rotary embedding, embeddings
    attention    grouped-query attention; `flash` holds its kernels for long sequences
    delta_net    gated DeltaNet, the linear attention of Qwen3.5
    moe          the dense MLP and the mixture of experts: routing and its statistics
    experts      the experts' matmuls, on one device or over the mesh; `grouped` holds their kernels
    cache        what decoding keeps for each layer: keys and values, or the state of a DeltaNet
    live         the attention kernel of decoding on TPU
    presets      the `ModelConfig`s of released models
    huggingface  reads and writes Hugging Face directories; `config_json` handles config.json
    gguf         converts files of llama.cpp to Hugging Face directories

Families, and the fields of `ModelConfig` that distinguish them:

    Llama        no q/k norms (qk_norm)
    Qwen2        biases of q, k and v (attention_bias), no q/k norms
    Qwen3        RMS norms of every query and key head (qk_norm)
    Qwen3-MoE    Qwen3 with a mixture of experts in place of the MLP (experts, …)
    Qwen3.5-MoE  gated DeltaNets in three of four layers (full_attention_every, linear_…), gated and
                 partly rotated attention (attention_gate, rotary_fraction), zero-centered norms
                 (norm_offset), a mixture of experts with a shared expert (shared_expert_size)
"""

from drpo_jax.models.attention import check_heads
from drpo_jax.models.cache import KV, DeltaState, Ring
from drpo_jax.models.huggingface import from_pretrained, read_config, save_pretrained
from drpo_jax.models.moe import load_balance_loss, router_metrics
from drpo_jax.models.presets import PRESETS
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.models.transformer import Hidden, Prefix, Transformer

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
    "check_heads",
    "from_pretrained",
    "load_balance_loss",
    "read_config",
    "router_metrics",
    "save_pretrained",
]
