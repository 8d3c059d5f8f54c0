"""Converts a GGUF file (llama.cpp) to a Hugging Face directory; `drpo convert` is the command line.

Quantized tensors are dequantized to float32. The tokenizer and its chat template, which a GGUF file
contains as well, are converted too.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drpo_jax.models.config_json import write_config
from drpo_jax.models.files import SINGLE, TOKENIZER, WEIGHTS, remove
from drpo_jax.models.settings import ModelConfig
from drpo_jax.storage import path_of

# Modules of blk.{i} and their names in model.layers.{i}.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Fields of `ModelConfig` by general.architecture.
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": dict(qk_norm=False),
    "qwen2": dict(qk_norm=False, attention_bias=True),
    "qwen3": dict(qk_norm=True),
}
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers of the byte-level BPE by tokenizer.ggml.pre.
SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
# Token types: special tokens, and added tokens that are ordinary text.
CONTROL, USER_DEFINED = 3, 4


def convert(file: str | Path, directory: str | Path) -> ModelConfig:
    """Writes the model and the tokenizer of a GGUF file as a Hugging Face directory.

    Args:
      file: a GGUF file of one of `FAMILIES`, with a byte-level BPE tokenizer of one of `SPLITS`.
      directory: the output directory. It is created if necessary; weights and a tokenizer that it
        already contains are removed.

    Returns:
      The architecture of the model.

    Raises:
      ValueError: if the architecture, the tokenizer or a tensor is not supported, or if a field is
        missing.
    """
    file, directory = path_of(file), path_of(directory)
    reader = GGUFReader(file)
    contents = {name: field.contents() for name, field in reader.fields.items()}
    fields = _Entries(file, "field", contents)
    config = _config(fields, reader.tensors, file)
    tokenizer = _tokenizer(fields, file)
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if fields["general.architecture"] == "llama":
            heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
            if count := heads.get(tensor.name.split(".")[-2]):
                values = _rotary_halves(values, count)
        tensors[_name(tensor.name, file)] = np.ascontiguousarray(values)
    directory.mkdir(parents=True, exist_ok=True)
    remove(directory, (*WEIGHTS, *TOKENIZER, "config.json"))
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    written = write_config(config) | {"dtype": "float32"}
    written["max_position_embeddings"] = fields[f"{fields['general.architecture']}.context_length"]
    written |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return config


class _Entries(dict[str, Any]):
    """Fields or tensors of a GGUF file by name; a missing one is a ValueError that names it.

    Args:
      file: the GGUF file.
      kind: "field" or "tensor", for the message.
      entries: the entries by name.
    """

    def __init__(self, file: str | Path, kind: str, entries: dict[str, Any]):
        super().__init__(entries)
        self._where = f"{file} has no {kind}"

    def __missing__(self, name: str) -> None:
        raise ValueError(f"{self._where} {name}")


def _config(fields: dict[str, Any], tensors, file) -> ModelConfig:
    family = fields["general.architecture"]
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: architecture {family!r} cannot be converted; supported: {', '.join(FAMILIES)}"
        )
    names = {tensor.name for tensor in tensors}
    factors = {fields.get(f"{family}.rope.{n}", 1) for n in ("scaling.factor", "scale_linear")}
    # llama.cpp scales linearly if a file has a factor but no type of scaling.
    default = "linear" if factors - {0, 1} else "none"
    kind = fields.get(f"{family}.rope.scaling.type", default)
    if "rope_freqs.weight" in names or kind != "none":
        raise ValueError(f"{file}: scaled rotary frequencies are not supported")
    heads = fields[f"{family}.attention.head_count"]
    width = fields[f"{family}.embedding_length"]
    shapes = _Entries(file, "tensor", {t.name: tuple(map(int, reversed(t.shape))) for t in tensors})
    eps = fields[f"{family}.attention.layer_norm_rms_epsilon"]
    return ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=width,
        layers=fields[f"{family}.block_count"],
        heads=heads,
        kv_heads=fields.get(f"{family}.attention.head_count_kv", heads),
        head_dim=fields.get(f"{family}.attention.key_length", width // heads),
        mlp_size=fields[f"{family}.feed_forward_length"],
        rope_theta=float(fields.get(f"{family}.rope.freq_base", 1e4)),
        rms_eps=float(np.format_float_positional(np.float32(eps))),  # 1e-5, not 9.99…e-6
        tie_embeddings="output.weight" not in names,
        **FAMILIES[family],
    )


def _name(name: str, file) -> str:
    """Translates blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight, for example."""
    inner, _, kind = name.rpartition(".")
    if inner in OUTSIDE:
        return f"{OUTSIDE[inner]}.{kind}"
    block, _, rest = inner.partition(".")
    number, _, rest = rest.partition(".")
    if block != "blk" or rest not in LAYER:
        raise ValueError(f"{file}: tensor {name!r} is not part of the supported architectures")
    return f"model.layers.{number}.{LAYER[rest]}.{kind}"


def _rotary_halves(values, heads):
    """Reorders rows of q or k from adjacent rotary pairs (llama.cpp) to pairs half a head apart."""
    shape = (heads, values.shape[0] // heads // 2, 2, -1)
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def _tokenizer(fields, file):
    kind, split = (fields.get(f"tokenizer.ggml.{k}") for k in ("model", "pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{file}: tokenizer {kind!r} with the split {split!r} cannot be converted; supported: "
            f"byte-level BPE (gpt2) with {', '.join(SPLITS)}"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    added = {CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, types)
            if kind in added
        ]
    )
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token")),
        **special,
    )


if __name__ == "__main__":  # An older form of `drpo convert`.
    runpy.run_module("drpo_jax.convert", run_name="__main__", alter_sys=True)
