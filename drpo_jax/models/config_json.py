"""Reads and writes the architecture in the config.json of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from drpo_jax.hub import local_directory
from drpo_jax.models.settings import ModelConfig

# Fields of `ModelConfig` that follow from model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(qk_norm=False),
    "qwen2": dict(qk_norm=False, attention_bias=True),
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_5_moe_text": dict(attention_gate=True, norm_offset=1.0),
}
# Fields of `ModelConfig` and their names in config.json, in all families.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rms_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# The same for gated DeltaNets.
LINEAR = {
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "linear_conv_kernel": "linear_conv_kernel_dim",
}
# Settings of config.json for which only one value is supported.
REQUIRED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def read_config(path: str | Path) -> ModelConfig:
    """Returns the architecture of a Hugging Face directory or hub id.

    Both dialects of config.json are supported, that of released checkpoints and that of
    `transformers` 5.

    Raises:
      ValueError: if the family or a setting is not supported.
      FileNotFoundError: if there is no config.json.
    """
    file = local_directory(path, ["config.json"]) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: {path} must be a Hugging Face directory, for example one created "
            "by `hf download OWNER/NAME --local-dir DIRECTORY`"
        )
    fields = json.loads(file.read_text())
    tied = fields.get("tie_word_embeddings")
    fields = fields.get("text_config", fields)  # the language part of a multimodal model
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    wrong = {k: fields[k] for k, v in REQUIRED.items() if fields.get(k, v) != v}
    if family == "qwen3_moe" and "norm_topk_prob" not in fields:
        wrong["norm_topk_prob"] = False  # the default of this family
    if fields.get("mlp_only_layers"):
        wrong["mlp_only_layers"] = fields["mlp_only_layers"]
    if family != "qwen2" and fields.get("attention_bias"):
        wrong["attention_bias"] = True
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        wrong["rope_parameters"] = rope
    if wrong:
        settings = ", ".join(f"{k} = {v!r}" for k, v in wrong.items())
        raise ValueError(f"{path}: not supported for {family}: {settings}")
    sizes = {ours: fields[theirs] for ours, theirs in FIELDS.items() if theirs in fields}
    if tied is not None:
        sizes["tie_embeddings"] = tied
    sizes["head_dim"] = fields.get("head_dim") or sizes["hidden_size"] // sizes["heads"]
    sizes["rope_theta"] = float(rope.get("rope_theta", fields.get("rope_theta", 1e4)))
    experts = fields.get("num_experts", fields.get("num_local_experts", 0))
    if experts:
        sizes["experts"], sizes["experts_per_token"] = experts, fields["num_experts_per_tok"]
        sizes["expert_size"] = fields["moe_intermediate_size"]
    else:
        sizes["mlp_size"] = fields["intermediate_size"]
    if family == "qwen3_5_moe_text":
        sizes |= {ours: fields[theirs] for ours, theirs in LINEAR.items()}
        sizes["shared_expert_size"] = fields["shared_expert_intermediate_size"]
        partial = fields.get("partial_rotary_factor", 0.25)
        sizes["rotary_fraction"] = rope.get("partial_rotary_factor", partial)
        sizes["full_attention_every"] = _interval(path, fields)
    return ModelConfig(**sizes, **FAMILIES[family])


def _interval(path, fields: dict[str, Any]) -> int:
    """Returns n for a model in which layers n, 2n, … have full attention."""
    kinds = fields.get("layer_types")
    if not kinds:
        return fields.get("full_attention_interval", 4)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    pattern = ["linear_attention"] * (every - 1) + ["full_attention"]
    if not every or kinds != pattern * (len(kinds) // every):
        raise ValueError(f"{path}: not supported: layer_types that do not repeat: {kinds}")
    return every


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of config.json for an architecture, as `transformers` 5 reads them."""
    if config.full_attention_every > 1:
        family, architecture = "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"
    elif config.experts:
        family, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    elif config.qk_norm:
        family, architecture = "qwen3", "Qwen3ForCausalLM"
    elif config.attention_bias:
        family, architecture = "qwen2", "Qwen2ForCausalLM"
    else:
        family, architecture = "llama", "LlamaForCausalLM"
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "hidden_act": "silu",
    }
    fields |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    fields |= {
        "head_dim": config.head_dim,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
    }
    if config.experts:
        fields |= dict(
            num_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            moe_intermediate_size=config.expert_size,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        )
    else:
        fields["intermediate_size"] = config.mlp_size
    if config.full_attention_every > 1:
        every = config.full_attention_every
        kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
        fields |= {theirs: getattr(config, ours) for ours, theirs in LINEAR.items()}
        fields["shared_expert_intermediate_size"] = config.shared_expert_size
        fields["layer_types"] = kinds * (config.layers // every)
        fields["partial_rotary_factor"] = config.rotary_fraction
    return fields
