"""The presets against published tables, parameter counts, `transformers`' configs, tensors on disk."""

import dataclasses
import functools
import json
import math
import re

import jax
import numpy as np
import pytest
import transformers

from drpo_jax.models import Transformer
from drpo_jax.models.config_json import read_config, write_config
from drpo_jax.models.huggingface import model_rules
from drpo_jax.models.presets import PRESETS

# layers, width, heads, kv heads, head width, vocabulary, rope theta, epsilon, tied, q/k norm, q/k/v
# bias
TABLE = {
    "qwen3-4b": (36, 2560, 32, 8, 128, 151936, 1e6, 1e-6, True, True, False),
    "qwen3-30b-a3b": (48, 2048, 32, 4, 128, 151936, 1e6, 1e-6, False, True, False),
    "qwen3.5-35b-a3b": (40, 2048, 16, 2, 256, 248320, 1e7, 1e-6, False, True, False),
    "r1-distill-qwen-1.5b": (28, 1536, 12, 2, 128, 151936, 1e4, 1e-6, False, False, True),
    "smollm2-135m": (30, 576, 9, 3, 64, 49152, 1e5, 1e-5, True, False, False),
}
# width of the dense MLP; or experts, experts per token, expert width, shared expert width
MLPS = {
    "qwen3-4b": 9728,
    "qwen3-30b-a3b": (128, 8, 768, 0),
    "qwen3.5-35b-a3b": (256, 8, 512, 512),
    "r1-distill-qwen-1.5b": 8960,
    "smollm2-135m": 1536,
}
# parameters, active parameters per token, tensors of a checkpoint (one per expert)
COUNTS = {
    "qwen3-4b": (4.02e9, 4.02e9, 2 + 36 * 11),
    "qwen3-30b-a3b": (30.5e9, 3.3e9, 3 + 48 * (8 + 1 + 3 * 128)),
    "qwen3.5-35b-a3b": (34.66e9, 3.46e9, 3 + 30 * (2 + 9) + 10 * (2 + 6) + 40 * (5 + 3 * 256)),
    "r1-distill-qwen-1.5b": (1.78e9, 1.78e9, 3 + 28 * 12),
    "smollm2-135m": (134.5e6, 134.5e6, 2 + 30 * 9),
}
CONFIGS = {
    "qwen3-4b": "Qwen3Config",
    "qwen3-30b-a3b": "Qwen3MoeConfig",
    "qwen3.5-35b-a3b": "Qwen3_5MoeTextConfig",
    "r1-distill-qwen-1.5b": "Qwen2Config",
    "smollm2-135m": "LlamaConfig",
}
NORMS = {"input_layernorm.weight": (2048,), "post_attention_layernorm.weight": (2048,)}
EXPERTS = {  # the first and the last one
    **{f"mlp.experts.{e}.gate_proj.weight": (768, 2048) for e in (0, 127)},
    **{f"mlp.experts.{e}.up_proj.weight": (768, 2048) for e in (0, 127)},
    **{f"mlp.experts.{e}.down_proj.weight": (2048, 768) for e in (0, 127)},
}
SHARED = {
    **{f"mlp.experts.{e}.gate_proj.weight": (512, 2048) for e in (0, 255)},
    **{f"mlp.experts.{e}.up_proj.weight": (512, 2048) for e in (0, 255)},
    **{f"mlp.experts.{e}.down_proj.weight": (2048, 512) for e in (0, 255)},
    "mlp.gate.weight": (256, 2048),
    "mlp.shared_expert.gate_proj.weight": (512, 2048),
    "mlp.shared_expert.up_proj.weight": (512, 2048),
    "mlp.shared_expert.down_proj.weight": (2048, 512),
    "mlp.shared_expert_gate.weight": (1, 2048),
}
LAYERS = {  # (preset, layer): tensors in the released files
    ("qwen3-4b", 0): {
        "input_layernorm.weight": (2560,),
        "post_attention_layernorm.weight": (2560,),
        "self_attn.q_proj.weight": (4096, 2560),
        "self_attn.k_proj.weight": (1024, 2560),
        "self_attn.v_proj.weight": (1024, 2560),
        "self_attn.o_proj.weight": (2560, 4096),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "mlp.gate_proj.weight": (9728, 2560),
        "mlp.up_proj.weight": (9728, 2560),
        "mlp.down_proj.weight": (2560, 9728),
    },
    ("qwen3-30b-a3b", 47): NORMS
    | EXPERTS
    | {
        "self_attn.q_proj.weight": (4096, 2048),
        "self_attn.k_proj.weight": (512, 2048),
        "self_attn.v_proj.weight": (512, 2048),
        "self_attn.o_proj.weight": (2048, 4096),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "mlp.gate.weight": (128, 2048),
    },
    ("qwen3.5-35b-a3b", 0): NORMS
    | SHARED
    | {
        "linear_attn.in_proj_qkv.weight": (8192, 2048),
        "linear_attn.in_proj_z.weight": (4096, 2048),
        "linear_attn.in_proj_b.weight": (32, 2048),
        "linear_attn.in_proj_a.weight": (32, 2048),
        "linear_attn.conv1d.weight": (8192, 1, 4),
        "linear_attn.A_log": (32,),
        "linear_attn.dt_bias": (32,),
        "linear_attn.norm.weight": (128,),
        "linear_attn.out_proj.weight": (2048, 4096),
    },
    ("qwen3.5-35b-a3b", 39): NORMS
    | SHARED
    | {
        "self_attn.q_proj.weight": (8192, 2048),  # queries and their gates
        "self_attn.k_proj.weight": (512, 2048),
        "self_attn.v_proj.weight": (512, 2048),
        "self_attn.o_proj.weight": (2048, 4096),
        "self_attn.q_norm.weight": (256,),
        "self_attn.k_norm.weight": (256,),
    },
    ("r1-distill-qwen-1.5b", 27): {
        "input_layernorm.weight": (1536,),
        "post_attention_layernorm.weight": (1536,),
        "self_attn.q_proj.weight": (1536, 1536),
        "self_attn.q_proj.bias": (1536,),
        "self_attn.k_proj.weight": (256, 1536),
        "self_attn.k_proj.bias": (256,),
        "self_attn.v_proj.weight": (256, 1536),
        "self_attn.v_proj.bias": (256,),
        "self_attn.o_proj.weight": (1536, 1536),
        "mlp.gate_proj.weight": (8960, 1536),
        "mlp.up_proj.weight": (8960, 1536),
        "mlp.down_proj.weight": (1536, 8960),
    },
    ("smollm2-135m", 29): {
        "input_layernorm.weight": (576,),
        "post_attention_layernorm.weight": (576,),
        "self_attn.q_proj.weight": (576, 576),
        "self_attn.k_proj.weight": (192, 576),
        "self_attn.v_proj.weight": (192, 576),
        "self_attn.o_proj.weight": (576, 576),
        "mlp.gate_proj.weight": (1536, 576),
        "mlp.up_proj.weight": (1536, 576),
        "mlp.down_proj.weight": (576, 1536),
    },
}


@functools.cache
def abstract(name):
    return jax.eval_shape(lambda: Transformer(PRESETS[name], jax.random.key(0)))


@functools.cache
def tensors(name):
    """Returns the shapes of a checkpoint's tensors by name."""
    rules = model_rules(PRESETS[name], abstract(name)).values()
    return {tensor: shape for rule in rules for tensor, shape in rule.tensors().items()}


def counted(config):
    """Counts parameters by hand: (all, active per token including the embedding)."""
    d, h = config.hidden_size, config.head_dim
    head = 0 if config.tie_embeddings else config.vocab_size * d
    n, k = config.heads * h, config.kv_heads * h
    queries = 2 * n if config.attention_gate else n
    attention = d * (queries + 2 * k) + n * d
    attention += 2 * h if config.qk_norm else 0
    attention += n + 2 * k if config.attention_bias else 0
    keys = config.linear_key_heads * config.linear_key_dim
    values = config.linear_value_heads * config.linear_value_dim
    channels = 2 * keys + values
    linear = d * (channels + 2 * values + 2 * config.linear_value_heads)
    linear += config.linear_conv_kernel * channels
    linear += 2 * config.linear_value_heads + config.linear_value_dim
    full = config.layers // config.full_attention_every
    rest = config.vocab_size * d + head + d + 2 * d * config.layers
    rest += full * attention + (config.layers - full) * linear
    if not config.experts:
        return (rest + config.layers * 3 * d * config.mlp_size,) * 2
    rest += config.layers * d * config.experts
    if config.shared_expert_size:
        rest += config.layers * (3 * d * config.shared_expert_size + d)
    expert = config.layers * 3 * d * config.expert_size
    return rest + config.experts * expert, rest + config.experts_per_token * expert


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_published_tables(name):
    c = PRESETS[name]
    sizes = (c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_dim, c.vocab_size, c.rope_theta)
    settings = c.rms_eps, c.tie_embeddings, c.qk_norm, c.attention_bias
    assert sizes + settings == TABLE[name]
    moe = c.experts, c.experts_per_token, c.expert_size, c.shared_expert_size
    assert (c.mlp_size or moe) == MLPS[name] and bool(c.mlp_size) != any(moe)
    hybrid = name == "qwen3.5-35b-a3b"
    assert (c.full_attention_every, c.rotary_fraction) == ((4, 0.25) if hybrid else (1, 1.0))
    assert (c.attention_gate, c.norm_offset) == (hybrid, float(hybrid))
    if hybrid:
        assert (c.linear_key_heads, c.linear_value_heads) == (16, 32)
        assert (c.linear_key_dim, c.linear_value_dim, c.linear_conv_kernel) == (128, 128, 4)


def test_the_tables_are_complete():
    assert TABLE.keys() == MLPS.keys() == COUNTS.keys() == CONFIGS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    total, active, count = COUNTS[name]
    everything, met = counted(PRESETS[name])
    assert everything == pytest.approx(total, rel=3e-3) and met == pytest.approx(active, rel=2e-2)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(name))) == everything
    assert sum(map(math.prod, tensors(name).values())) == everything
    assert len(tensors(name)) == count


@pytest.mark.parametrize("name, layer", LAYERS)
def test_tensors_of_a_layer(name, layer):
    at = f"model.layers.{layer}."
    between = rf"mlp\.experts\.(?!(0|{PRESETS[name].experts - 1})\.)"
    ours = {n.removeprefix(at): s for n, s in tensors(name).items() if n.startswith(at)}
    ours = {n: shape for n, shape in ours.items() if not re.match(between, n)}
    assert ours == LAYERS[name, layer]


@pytest.mark.parametrize("name", PRESETS)
def test_tensors_outside_the_layers(name):
    c = PRESETS[name]
    ours = {n: s for n, s in tensors(name).items() if ".layers." not in n}
    table = (c.vocab_size, c.hidden_size)
    head = {} if c.tie_embeddings else {"lm_head.weight": table}
    expected = {"model.embed_tokens.weight": table, "model.norm.weight": (c.hidden_size,)}
    assert ours == expected | head
    numbers = {int(m[1]) for n in tensors(name) if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    assert numbers == set(range(c.layers))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_the_config_of_transformers(name, tmp_path):
    c = PRESETS[name]
    theirs = transformers.AutoConfig.for_model(**write_config(c))
    assert type(theirs).__name__ == CONFIGS[name]
    assert (theirs.num_hidden_layers, theirs.hidden_size) == (c.layers, c.hidden_size)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (c.heads, c.kv_heads)
    assert theirs.rope_parameters["rope_theta"] == c.rope_theta
    if c.full_attention_every > 1:
        kinds = np.array(theirs.layer_types) == "full_attention"
        np.testing.assert_array_equal(np.flatnonzero(kinds), np.arange(3, 40, 4))
    (tmp_path / "config.json").write_text(json.dumps(write_config(c)))
    assert read_config(tmp_path) == c
    theirs.save_pretrained(tmp_path)  # their dialect, with all defaults
    assert read_config(tmp_path) == c


def test_qwen3_5_equals_the_defaults_of_transformers(tmp_path):
    """The defaults of the config class are the sizes of Qwen3.5-35B-A3B."""
    theirs = transformers.AutoConfig.for_model("qwen3_5_moe_text")
    theirs.save_pretrained(tmp_path)
    preset = dataclasses.replace(PRESETS["qwen3.5-35b-a3b"], rope_theta=1e4)  # the class's default
    assert read_config(tmp_path) == preset
