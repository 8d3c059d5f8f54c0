"""Hugging Face directories: round trips, layouts, sharded reading, and errors that name tensors."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drpo_jax.models import from_pretrained, save_pretrained
from drpo_jax.models import huggingface as H
from drpo_jax.parallel import make_mesh, shardings
from tests.fixtures.load import CASES, stored, write


def equal(a, b):
    leaves = [*zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_round_trips_are_bit_exact(name, tmp_path, monkeypatch):
    monkeypatch.setattr(H, "SHARD_BYTES", 20_000)
    tensors = write(stored(name), tmp_path)
    model, config = from_pretrained(tmp_path)
    save_pretrained(model, config, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {k: v for file in files for k, v in load_file(file).items()}
    assert len(files) > 1 and written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
        assert written[key].dtype == tensor.dtype
    again, same = from_pretrained(tmp_path / "out")
    assert same == config and equal(model, again)
    save_pretrained(model, config, tmp_path / "half", jnp.bfloat16)
    half, _ = from_pretrained(tmp_path / "half", jnp.bfloat16)
    assert equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe"])
def test_fused_experts_and_multimodal_names(name, tmp_path):
    """The layout of Qwen3.5's released checkpoint: fused experts, a vision tower, a nested config."""
    record = stored(name)
    (tmp_path / "plain").mkdir()
    tensors = write(record, tmp_path / "plain")
    config = json.loads(str(record["config"]))
    fused = {k: v for k, v in tensors.items() if ".experts." not in k}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp.experts"
        count = config.get("num_experts", config.get("num_local_experts"))

        def stack(part):
            return np.stack([tensors[f"{at}.{e}.{part}_proj.weight"] for e in range(count)])  # noqa: B023

        fused[f"{at}.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        fused[f"{at}.down_proj"] = stack("down")
    nested = {k.replace("model.", "model.language_model.", 1): v for k, v in fused.items()}
    nested |= {"model.visual.patch": np.zeros(3, np.float32), "mtp.fc.weight": np.zeros(2)}
    save_file(nested, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_5_moe", "text_config": config})
    )
    assert equal(from_pretrained(tmp_path)[0], from_pretrained(tmp_path / "plain")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "qwen2"])
def test_reading_into_shards(name, tmp_path):
    write(stored(name), tmp_path)
    whole, config = from_pretrained(tmp_path)
    sizes = dict(fsdp=2, tensor=2, expert=2 if config.experts else 1, data=-1)
    mesh = make_mesh(**sizes)
    model, _ = from_pretrained(tmp_path, shardings=partial(shardings, mesh))
    assert equal(model, whole)
    split = [leaf for leaf in jax.tree.leaves(model) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 5
    save_pretrained(model, config, tmp_path / "out")
    assert equal(from_pretrained(tmp_path / "out")[0], whole)


def test_a_process_reads_only_what_its_devices_hold(tmp_path, monkeypatch):
    """A tensor of which devices hold parts is never read whole."""
    tensors = write(stored("qwen3_moe"), tmp_path)
    read, original = {}, H.Checkpoint.read

    def watched(self, name, index=()):
        part = original(self, name, index)
        read.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(H.Checkpoint, "read", watched)
    mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    from_pretrained(tmp_path, shardings=partial(shardings, mesh))
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    assert max(read[name]) == tensors[name].size / 4


def test_wrong_tensors_raise(tmp_path):
    tensors = write(stored("qwen3_dense"), tmp_path)
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.1.self_attn.q_norm.weight")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    for text in (
        "missing (1): model.layers.1.self_attn.q_norm.weight",
        "unexpected (1): model.layers.0.extra.weight",
        "of another shape (1): model.norm.weight is (3,), not (24,)",
    ):
        assert text in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"12345678 half a file")
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="contains no .*safetensors"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "qwen3_dense",
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported: llama, qwen2",
        ),
        ("qwen3_dense", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3_dense", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters = .*yarn"),
        ("qwen3_dense", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "linear"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama_tied", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_5_moe", {"layer_types": ["full_attention", "linear_attention"] * 3}, "repeat"),
        ("qwen3_5_moe", {"layer_types": ["linear_attention", "full_attention"]}, "the 6 layers"),
        ("qwen3_dense", {"layer_types": ["sliding_attention"] * 2}, "layer_types = .*sliding"),
        (
            "qwen3_dense",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"not supported: rope_parameters for each layer type \(full_attention\)",
        ),
        ("qwen3_dense", {"rope_parameters": {"factor": 4.0}}, "rope_parameters = .*'factor': 4.0"),
        ("llama_tied", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
    ],
)
def test_unsupported_settings_raise(name, change, message, tmp_path):
    fields = json.loads(str(stored(name)["config"])) | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        H.read_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("qwen3_dense", {"rope_scaling": YARN}, "rope_scaling = .*yarn.*, rope_parameters = "),
        ("qwen3_dense", {"rope_scaling": {"type": "linear"}}, "rope_scaling = .*linear"),
        ("qwen3_dense", {"rope_theta": 1e4}, "rope_theta = 10000.0, rope_parameters.rope_theta = "),
        (
            "qwen3_dense",
            {"rope_parameters": {"rope_type": "default", "type": "yarn"}},
            "rope_parameters.rope_type = 'default', rope_parameters.type = 'yarn'",
        ),
        ("qwen3_5_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, rope_param"),
        ("qwen3_5_moe", {"full_attention_interval": 2}, "full_attention_interval = 2, layer_types"),
        ("qwen3_moe", {"num_experts": 8}, "num_experts = 8, num_local_experts = 6"),
    ],
)
def test_spellings_that_contradict_each_other_raise(name, change, message, tmp_path):
    """transformers silently prefers one of them, and engines differ in which one."""
    fields = json.loads(str(stored(name)["config"]))
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=f"config.json: the settings {message}.* contradict"):
        H.read_config(tmp_path)


def test_spellings_of_a_multimodal_model_have_to_agree(tmp_path):
    text = json.loads(str(stored("qwen3_5_moe")["config"]))
    for tied, own in ((False, False), (None, True), (True, None)):
        fields = {"tie_word_embeddings": tied, "text_config": text | {"tie_word_embeddings": own}}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert H.read_config(tmp_path).tie_embeddings is bool(tied or own)
    fields = {"tie_word_embeddings": False, "text_config": text | {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="text_config.tie_word_embeddings = True contradict"):
        H.read_config(tmp_path)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_dense", "qwen3_moe", "qwen3_5_moe"])
def test_absent_fields(name, tmp_path):
    """The error names fields that transformers requires or guesses; others get its defaults."""
    fields = json.loads(str(stored(name)["config"]))
    rope = fields["rope_parameters"]
    doubled = fields | {"rope_scaling": rope, "rope_theta": rope["rope_theta"]}
    for same in (
        doubled,
        fields | {"rope_scaling": None, "rope_theta": None, "rms_norm_eps": None},
    ):
        (tmp_path / "config.json").write_text(json.dumps(same))
        ours = H.read_config(tmp_path)
    heads = {k: v for k, v in fields.items() if k != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps(heads | {"num_key_value_heads": None}))
    assert H.read_config(tmp_path) == dataclasses.replace(ours, kv_heads=ours.heads)
    (tmp_path / "config.json").write_text(json.dumps(heads))
    if name == "llama_tied":
        assert H.read_config(tmp_path).kv_heads == ours.heads
    else:
        with pytest.raises(ValueError, match=f"{name[:5]}.* are missing: num_key_value_heads"):
            H.read_config(tmp_path)
    size = "moe_intermediate_size" if ours.experts else "intermediate_size"
    for field in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", size):
        rest = {k: v for k, v in fields.items() if k != field}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=rf"config.json: fields of \w+ are missing: {field}"):
            H.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a JSON file"):
        H.read_config(tmp_path)


def test_absent_head_width(tmp_path):
    """As in transformers, it is 128 for Qwen3; in other families, the heads share the width."""
    for name, width in (("qwen3_dense", 128), ("llama_tied", 8), ("qwen2", 4), ("qwen3_moe", 4)):
        fields = json.loads(str(stored(name)["config"]))
        del fields["head_dim"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert H.read_config(tmp_path).head_dim == width


def test_reading_the_dialect_of_released_checkpoints(tmp_path):
    fields = json.loads(str(stored("qwen3_moe")["config"]))
    released = {
        k: v for k, v in fields.items() if k not in ("rope_parameters", "num_local_experts")
    }
    released |= {"rope_theta": 1e4, "num_experts": 6, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = H.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released))
    assert H.read_config(tmp_path) == ours and ours.rope_theta == 1e4 and ours.experts == 6


def old_weights(directory):
    """Writes files that other tools leave in a directory: weights in all formats, and an adapter."""
    names = (
        "model.safetensors", "model-00001-of-00002.safetensors", "model-00002.safetensors",
        "consolidated.safetensors", "other.safetensors.index.json", "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_config.json",
        "adapter_model.safetensors", "adapter_model.bin",
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("old")


def test_saving_replaces_the_weights_in_the_directory(tmp_path):
    """Engines could read the old weights: transformers prefers model.safetensors to an index."""
    write(stored("qwen3_dense"), tmp_path)
    model, config = from_pretrained(tmp_path)
    old_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    save_pretrained(jax.tree.map(lambda x: x + 1, model), config, tmp_path, jnp.bfloat16)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "model-00001.safetensors", "model.safetensors.index.json", "notes.txt"
    ]  # fmt: skip
    again, _ = from_pretrained(tmp_path)
    np.testing.assert_allclose(again.final_norm[...], model.final_norm[...] + 1, rtol=2**-8)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored_bytes = sum(x.nbytes for x in load_file(tmp_path / "model-00001.safetensors").values())
    assert index["metadata"]["total_size"] == stored_bytes


def test_links_to_a_cache_of_downloads_are_not_followed(tmp_path):
    """The hub's cache consists of links; writing through them would change other models."""
    write(stored("qwen3_dense"), tmp_path)
    model, config = from_pretrained(tmp_path)
    names = ("model-00001.safetensors", "model.safetensors.index.json", "config.json")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "out").mkdir()
    for name in (*names, "tokenizer.json"):
        (tmp_path / "blobs" / name).write_text("cached")
        (tmp_path / "out" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "tokenizer.json").write_text("new")
    save_pretrained(model, config, tmp_path / "out", like=tmp_path)
    assert {p.read_text() for p in (tmp_path / "blobs").iterdir()} == {"cached"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"


def test_an_interrupted_save_is_not_readable(tmp_path, monkeypatch):
    write(stored("qwen3_dense"), tmp_path)
    model, config = from_pretrained(tmp_path)
    save_pretrained(model, config, tmp_path / "out")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(H, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, config, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        from_pretrained(tmp_path / "out")


def test_the_tokenizer_in_the_directory_is_replaced(tmp_path):
    """An old chat_template.jinja, for example, would override the new tokenizer_config.json."""
    write(stored("qwen3_dense"), tmp_path)
    model, config = from_pretrained(tmp_path)
    for name, files in (
        ("one", ("tokenizer.json", "chat_template.jinja", "generation_config.json")),
        ("two", ("tokenizer.json", "tokenizer_config.json")),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
        fields = {"eos_token_id": len(files), "max_position_embeddings": 7 * len(files)}
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    out = tmp_path / "out"

    def texts():
        return {
            p.name: p.read_text() for p in out.iterdir() if p.name[:5] not in ("model", "confi")
        }

    save_pretrained(model, config, out, like=tmp_path / "one")
    assert texts() == dict.fromkeys(
        ("tokenizer.json", "chat_template.jinja", "generation_config.json"), "one"
    )
    save_pretrained(model, config, out, like=tmp_path / "one", tokenizer=tmp_path / "two")
    assert texts() == dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), "two")
    fields = json.loads((out / "config.json").read_text())
    assert (fields["eos_token_id"], fields["max_position_embeddings"]) == (2, 21)
    save_pretrained(model, config, out, like=out)  # in place
    assert texts() == dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), "two")
    assert json.loads((out / "config.json").read_text()) == fields


def test_directories_with_two_models_raise(tmp_path):
    tensors = write(stored("qwen3_dense"), tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def write_index(**files):
        index.write_text(json.dumps({"weight_map": files}))

    write_index(a="model.safetensors")
    from_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    index.unlink()
    from_pretrained(tmp_path)  # transformers, too, ignores the other file.
    write_index(a="part-1.safetensors")
    with pytest.raises(ValueError, match="two models: model.safetensors, .*remove the one"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part-1.safetensors")
    write_index(a="part-1.safetensors", b="part-2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"\(1 of 2\): part-2.safetensors"):
        from_pretrained(tmp_path)
    name = "model.norm.weight"
    save_file({name: tensors[name]}, tmp_path / "part-2.safetensors")
    with pytest.raises(ValueError, match=f"{name} twice, the second time in part-2.safetensors"):
        from_pretrained(tmp_path)
    for text, message in (
        ("{", "is not a JSON file"),
        ("[]", "object, not list"),
        ("{}", "no weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json.* {message}"):
            from_pretrained(tmp_path)
