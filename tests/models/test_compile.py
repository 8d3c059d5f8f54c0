"""The size of the learner's programs does not grow with depth.

The tests compare lowered programs, so nothing is timed and nothing is compiled.
"""

import jax
import numpy as np
import optax
import pytest

from drpo_jax.learner import Batch, UpdateSettings, init_state, policy, update
from drpo_jax.models import Compute, ModelConfig, Transformer

pytestmark = pytest.mark.slow

SIZES = dict(vocab_size=64, hidden_size=24, heads=3, kv_heads=1, head_dim=8)
MIXTURE = dict(experts=6, experts_per_token=2, expert_size=12)
CONFIGS = {
    "llama": dict(mlp_size=32, qk_norm=False, tie_embeddings=True),
    "qwen2": dict(mlp_size=32, qk_norm=False, attention_bias=True),
    "qwen3": dict(mlp_size=32),
    "qwen3_moe": MIXTURE,
    "qwen3_5_moe": MIXTURE
    | dict(
        attention_gate=True, norm_offset=1.0, rotary_fraction=0.5, shared_expert_size=10,
        full_attention_every=2, linear_key_heads=2, linear_value_heads=4, linear_key_dim=8,
        linear_value_dim=6,
    ),
}  # fmt: skip
P, T = 2, 70


def new_model(family, layers):
    config = ModelConfig(**SIZES, **CONFIGS[family], layers=layers)
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def lines(function, *args):
    """Returns the number of lines of the lowered program, one for every operation."""
    return jax.jit(function).lower(*args).as_text().count("\n")


def forward(family, layers, **compute):
    tokens = np.zeros((P, T), np.int32)
    run = lambda model: model.hidden(tokens, compute=Compute(**compute)).hidden  # noqa: E731
    return lines(run, new_model(family, layers))


def step(family, layers):
    ids, numbers = np.zeros((P, T), np.int32), np.zeros((P, T), np.float32)
    batch = Batch(ids, ids, ids, ids, {"behavior_logp": numbers, "advantage": numbers})
    compute = Compute(remat="full")
    settings = UpdateSettings(policy("drpo"), "token-mean", T, micro_batches=2, compute=compute)
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda m: init_state(m, optimizer), new_model(family, layers))
    static = {"settings": settings, "optimizer": optimizer, "schedule": lambda _: 1e-3}
    return lines(lambda s, b: update(s, b, **static), state, batch)


@pytest.mark.parametrize("family", CONFIGS)
def test_twice_the_layers_have_the_same_forward_program(family):
    assert forward(family, 16) == forward(family, 8) > 50


@pytest.mark.parametrize("family", CONFIGS)
def test_twice_the_layers_have_the_same_update_program(family):
    assert step(family, 16) == step(family, 8) > 300


def test_unrolled_layers_are_detected():
    assert forward("qwen3", 16, unroll=16) > forward("qwen3", 8, unroll=8) + 8 * 10
