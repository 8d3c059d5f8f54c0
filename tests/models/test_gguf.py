"""Conversion of GGUF files: weights, architecture and tokenizer are preserved."""

import json

import gguf
import numpy as np
import pytest
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

from drpo_jax.data import TextTokenizer
from drpo_jax.models import from_pretrained, read_config
from drpo_jax.models.gguf import LAYER, OUTSIDE, convert
from tests.fixtures.load import stored, write

LETTERS = sorted(ByteLevel.alphabet())
MERGES = [("1", "2"), ("Ġ", "t"), ("Ġt", "h")]
SPECIAL = ["<|end|>", "<|user|>"]
TOKENS = [*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)]


def write_gguf(path, fields, tensors, family, kinds={}, split="smollm", change=None):  # noqa: B006
    """Writes a GGUF file of Hugging Face tensors in the layout of llama.cpp's own converter.

    Args:
      kinds: quantization types by name, for tensors that are quantized codes.
      change: function that edits gguf's dictionary of fields before they are written.
    """
    names = {theirs: ours for ours, theirs in (LAYER | OUTSIDE).items()}
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ '<|user|>' + messages[0]['content'] + '<|end|>' }}")
    for name, tensor in tensors.items():
        inner, _, kind = name.removeprefix("model.layers.").rpartition(".")
        number, _, rest = inner.partition(".")
        plain = f"blk.{number}.{names[rest]}" if number.isdigit() else names[inner]
        if family == "llama" and plain.endswith(("attn_q", "attn_k")):
            heads = tensor.shape[0] // fields["head_dim"]
            halves = tensor.reshape(heads, 2, fields["head_dim"] // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(
            f"{plain}.{kind}", np.ascontiguousarray(tensor), raw_dtype=kinds.get(name)
        )
    if change:
        change(writer.kv_data[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def released(case, tmp_path):
    """Returns a fixture's fields of config.json, its tensors, and its ModelConfig."""
    record = stored(case)
    tensors = write(record, tmp_path)
    return json.loads((tmp_path / "config.json").read_text()), tensors, read_config(tmp_path)


@pytest.mark.parametrize(
    "case, family",
    [("llama_tied", "llama"), ("qwen2", "qwen2"), ("qwen3_dense", "qwen3")],
)
def test_weights_and_architecture(case, family, tmp_path):
    (tmp_path / "hf").mkdir()
    fields, tensors, config = released(case, tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", fields, tensors, family)
    assert convert(tmp_path / "a.gguf", tmp_path / "out") == config
    assert read_config(tmp_path / "out") == config
    rest = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (rest["max_position_embeddings"], rest["eos_token_id"]) == (4096, 0)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_quantized_tensors_are_dequantized(tmp_path):
    (tmp_path / "hf").mkdir()
    fields, tensors, _ = released("llama_tied", tmp_path / "hf")
    name, kind = "model.layers.0.mlp.up_proj.weight", gguf.GGMLQuantizationType.Q8_0
    tensors[name] = np.pad(tensors[name], ((0, 0), (0, -tensors[name].shape[1] % 32)))
    codes = quantize(tensors[name], kind)  # one scale per 32 values
    write_gguf(tmp_path / "a.gguf", fields, tensors | {name: codes}, "llama", {name: kind})
    convert(tmp_path / "a.gguf", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")[name]
    np.testing.assert_array_equal(written, gguf.dequantize(codes, kind))
    assert 0 < abs(written - tensors[name]).max() < 0.02 * abs(tensors[name]).max()


def test_old_files_in_the_directory_are_replaced(tmp_path):
    """Some engines read an index, here of another model, before model.safetensors."""
    (tmp_path / "hf").mkdir()
    fields, tensors, config = released("llama_tied", tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", fields, tensors, "llama")
    (tmp_path / "out").mkdir()
    old = "model.safetensors.index.json", "pytorch_model.bin", "generation_config.json"
    for name in (*old, "chat_template.jinja"):
        (tmp_path / "out" / name).write_text("{}")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    assert from_pretrained(tmp_path / "out")[1] == config
    assert not any((tmp_path / "out" / name).exists() for name in old)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() != "{}"


def test_tokenizer(tmp_path):
    (tmp_path / "hf").mkdir()
    fields, tensors, _ = released("llama_tied", tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", fields, tensors, "llama")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = TextTokenizer(tmp_path / "out", chat=True)
    # Digits are not merged.
    assert [TOKENS[i] for i in tokenizer.encode("12 th")] == ["1", "2", "Ġth"]
    assert tokenizer.decode(tokenizer.encode("12 the ∑")) == "12 the ∑"
    assert tokenizer.prompt("2") == [1, TOKENS.index("2"), 0]
    assert tokenizer.eos_id == 0 and tokenizer.stop_ids == (0,)


def test_errors(tmp_path):
    (tmp_path / "hf").mkdir()
    fields, tensors, _ = released("llama_tied", tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", fields, tensors, "llama", split="tekken")
    with pytest.raises(
        ValueError, match="split 'tekken' cannot be converted; supported: byte-level BPE .* smollm"
    ):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    write_gguf(tmp_path / "b.gguf", fields, tensors, "gemma")
    with pytest.raises(
        ValueError, match="architecture 'gemma' cannot be converted; supported: llama, qwen2, qwen3"
    ):
        convert(tmp_path / "b.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda fields: fields.pop("llama.attention.head_count"),
            "b.gguf has no field llama.attention.head_count$",
        ),
        (
            lambda fields: fields.update({"llama.rope.scaling.factor": float32(4.0)}),
            "b.gguf: scaled rotary frequencies are not supported",
        ),
    ],
)
def test_fields_that_are_missing_or_scale_silently(change, message, tmp_path):
    """llama.cpp scales linearly if a file has a factor but no type of scaling."""
    (tmp_path / "hf").mkdir()
    fields, tensors, _ = released("llama_tied", tmp_path / "hf")
    write_gguf(tmp_path / "b.gguf", fields, tensors, "llama", change=change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "b.gguf", tmp_path / "out")


def float32(value):
    return GGUFValue(value, gguf.GGUFValueType.FLOAT32)
