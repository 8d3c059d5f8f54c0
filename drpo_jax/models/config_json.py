"""Reads and writes the architecture in the config.json of a Hugging Face directory."""

from pathlib import Path
from typing import Any

from drpo_jax.hub import local_directory
from drpo_jax.models.files import read_json
from drpo_jax.models.settings import ModelConfig

# Fields of `ModelConfig` that follow from model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(qk_norm=False),
    "qwen2": dict(qk_norm=False, attention_bias=True),
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_5_moe_text": dict(attention_gate=True, norm_offset=1.0),
}
MIXTURES = ("qwen3_moe", "qwen3_5_moe_text")
HYBRIDS = ("qwen3_5_moe_text",)
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
# The same for an MLP, for a mixture of experts, and for gated DeltaNets.
DENSE = {"mlp_size": "intermediate_size"}
EXPERTS = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}
LINEAR = {
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "linear_conv_kernel": "linear_conv_kernel_dim",
}
SHARED = {"shared_expert_size": "shared_expert_intermediate_size"}
# Defaults of fields that config.json may lack, as in `transformers`.
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Default head_dim. The other families divide the width among the heads.
HEAD_DIM = {"qwen3": 128, "qwen3_5_moe_text": 256}
# Settings of config.json for which only one value is supported.
REQUIRED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
# Supported keys of rope_parameters. The sections of a multimodal model have equal positions for text.
ROPE = {"rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def read_config(path: str | Path) -> ModelConfig:
    """Returns the architecture of a Hugging Face directory or hub id.

    Both dialects of config.json are supported, that of released checkpoints and that of
    `transformers` 5. If both spell the same setting, they must agree, because engines differ in which
    one they read.

    Raises:
      ValueError: if the family or a setting is not supported, if a field is missing, or if two fields
        contradict each other; the message names them.
      FileNotFoundError: if there is no config.json.
    """
    file = local_directory(path, ["config.json"]) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: {path} must be a Hugging Face directory, for example one created "
            "by `hf download OWNER/NAME --local-dir DIRECTORY`"
        )
    try:
        return _architecture(read_json(file))
    except _Wrong as error:
        raise ValueError(f"{file}: {error}") from None


class _Wrong(ValueError):
    """A problem with a config.json; the message lacks its path."""


def _architecture(whole: dict[str, Any]) -> ModelConfig:
    raw = whole.get("text_config", whole)  # the language model of a multimodal model
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise _Wrong(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    rope = _rope(raw)
    _check_supported(raw, rope, family)
    fields = DEFAULTS | _present(raw) | _present(_spelled_twice(whole, raw))
    if family == "llama" or "num_key_value_heads" in raw:  # absent or null
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    names = FIELDS | (EXPERTS if family in MIXTURES else DENSE)
    names |= LINEAR | SHARED if family in HYBRIDS else {}
    if missing := [name for name in names.values() if fields.get(name) is None]:
        raise _Wrong(f"fields of {family} are missing: {', '.join(missing)}")
    sizes = {ours: fields[theirs] for ours, theirs in names.items()}
    sizes["head_dim"] = fields.get("head_dim", HEAD_DIM.get(family)) or (
        sizes["hidden_size"] // sizes["heads"]
    )
    sizes["rope_theta"] = float(rope.get("rope_theta", 1e4))
    if family in HYBRIDS:
        sizes["rotary_fraction"] = rope.get("partial_rotary_factor", 0.25)
        sizes["full_attention_every"] = _interval(fields)
    return ModelConfig(**sizes, **FAMILIES[family])


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are not null; `transformers` treats null as absent."""
    return {name: value for name, value in fields.items() if value is not None}


def _check_supported(fields: dict[str, Any], rope: dict[str, Any], family: str) -> None:
    """Raises unless every setting has the value that is implemented."""
    wrong = {k: fields[k] for k, v in REQUIRED.items() if fields.get(k, v) not in (v, None)}
    if family == "qwen3_moe" and fields.get("norm_topk_prob") is None:
        wrong["norm_topk_prob"] = False  # the default of this family
    if fields.get("mlp_only_layers"):
        wrong["mlp_only_layers"] = fields["mlp_only_layers"]
    if family != "qwen2" and fields.get("attention_bias"):
        wrong["attention_bias"] = True
    kinds = fields.get("layer_types") or []
    if family not in HYBRIDS and set(kinds) - {"full_attention"}:
        wrong["layer_types"] = kinds
    partial = family in HYBRIDS or rope.get("partial_rotary_factor", 1) == 1
    if rope["rope_type"] != "default" or rope.keys() - ROPE or not partial:
        wrong["rope_parameters"] = rope
    if wrong:
        settings = ", ".join(f"{k} = {v!r}" for k, v in wrong.items())
        raise _Wrong(f"not supported for {family}: {settings}")


def _agreed(spellings: dict[str, Any]) -> Any:
    """Returns the value of a setting that has several spellings; None if all of them are None."""
    values = {name: value for name, value in spellings.items() if value is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        contradiction = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        raise _Wrong(f"the settings {contradiction} contradict each other; remove the wrong one")
    return first


def _spelled_twice(whole: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that a config.json may have in two places or under two names."""
    tied = {
        "tie_word_embeddings": whole.get("tie_word_embeddings"),
        "text_config.tie_word_embeddings": text.get("tie_word_embeddings"),
    }
    experts = {name: text.get(name) for name in ("num_experts", "num_local_experts")}
    return {"tie_word_embeddings": _agreed(tied), "num_experts": _agreed(experts)}


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings under the names of rope_parameters; rope_type is always set."""
    blocks = {}
    names = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name)]
    for name in names or ["rope_parameters"]:
        block = _present(fields.get(name) or {})
        if nested := [key for key, value in block.items() if isinstance(value, dict)]:
            raise _Wrong(f"not supported: {name} for each layer type ({', '.join(nested)})")
        kinds = {f"{name}.{key}": block.pop(key, None) for key in ("rope_type", "type")}
        block["rope_type"] = _agreed(kinds) or "default"
        for key in ("rope_theta", "partial_rotary_factor"):
            block[key] = _agreed({key: fields.get(key), f"{name}.{key}": block.get(key)})
        blocks[name] = _present(block)
    return _agreed(blocks)


def _interval(fields: dict[str, Any]) -> int:
    """Returns n for a model in which layers n, 2n, … have full attention."""
    every = fields.get("full_attention_interval")
    kinds = fields.get("layer_types")
    if not kinds:
        return every or 4
    first = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    pattern = ["linear_attention"] * (first - 1) + ["full_attention"]
    if not first or kinds != pattern * (fields["num_hidden_layers"] // first):
        raise _Wrong(
            "not supported: layer_types that do not repeat, or whose number differs from the "
            f"{fields['num_hidden_layers']} layers: {kinds}"
        )
    return _agreed({"full_attention_interval": every, "layer_types": first})


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
