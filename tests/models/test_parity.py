"""Our Qwen3 against `transformers`: float32 logits from the same weights."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.models import ModelConfig, Transformer

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = ("qwen3_dense", "qwen3_dense_tied", "qwen3_moe", "qwen3_moe_tied")


def load(record):
    """(our model, tokens, their logits) of a fixture's arrays."""
    hf = json.loads(str(record["config"]))
    config = ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        mlp_size=hf.get("intermediate_size", 0),
        experts=hf.get("num_experts", 0),
        experts_per_token=hf.get("num_experts_per_tok", 0),
        expert_size=hf.get("moe_intermediate_size", 0),
        rope_theta=hf["rope_theta"],
        rms_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
    )
    model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    used = {"config", "tokens", "logits"}

    def weight(name):
        used.add(name)
        return record[name].astype(np.float32)

    def put(param, new):
        assert param.shape == new.shape
        param.set_value(jnp.asarray(new))

    def stack(path, turn=True):
        layers = [weight(f"model.layers.{i}.{path}.weight") for i in range(config.layers)]
        return np.stack([w.T if turn else w for w in layers])

    blocks = model.blocks
    put(model.embed, weight("model.embed_tokens.weight"))
    put(model.final_norm, weight("model.norm.weight"))
    if not config.tie_embeddings:
        put(model.lm_head, weight("lm_head.weight").T)
    put(blocks.input_norm, stack("input_layernorm"))
    put(blocks.post_attention_norm, stack("post_attention_layernorm"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        put(getattr(blocks.attention, name), stack(f"self_attn.{name}"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        if config.experts:
            experts = [stack(f"mlp.experts.{e}.{name}") for e in range(config.experts)]
            put(getattr(blocks.mlp, name), np.stack(experts, axis=1))
        else:
            put(getattr(blocks.mlp, name), stack(f"mlp.{name}"))
    if config.experts:
        put(blocks.mlp.router, stack("mlp.gate"))
    unused = set(record) - used - {"lm_head.weight"}  # a tied head may be stored as well
    assert not unused
    return model, record["tokens"], record["logits"]


def assert_equal_logits(record):
    model, tokens, theirs = load(record)
    ours = np.asarray(jax.jit(lambda model: model(tokens))(model))
    assert np.std(theirs) > 0.3  # something to get wrong
    assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_stored_ones(name):
    with np.load(FIXTURES / f"{name}.npz") as archive:
        assert_equal_logits(dict(archive))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make = runpy.run_path(str(FIXTURES / "make.py"))
    assert_equal_logits(make["record"](name, seed=1))
