"""Hugging Face directories: round trips, layouts, sharded reading, and errors that name tensors."""

import json
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
    ],
)
def test_unsupported_settings_raise(name, change, message, tmp_path):
    fields = json.loads(str(stored(name)["config"])) | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        H.read_config(tmp_path)


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
