"""Limits of decoding, compared with the arrays of the models and with arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.costs import (
    CHIPS,
    Chip,
    DecodeBytes,
    Work,
    compute_seconds,
    decode_bytes,
    decode_seconds,
)
from drpo_jax.models import Compute, ModelConfig, Transformer

DENSE = ModelConfig(
    vocab_size=64, hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_size=64
)
MIXTURE = dataclasses.replace(DENSE, mlp_size=0, experts=4, experts_per_token=2, expert_size=32)
HYBRID = dataclasses.replace(
    DENSE, full_attention_every=2, linear_key_heads=2, linear_value_heads=4, linear_key_dim=8,
    linear_value_dim=8, linear_conv_kernel=4,
)  # fmt: skip


def nbytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("config", [DENSE, MIXTURE, HYBRID], ids=["dense", "mixture", "hybrid"])
def test_bytes_are_those_of_the_arrays(config, float8):
    def caches(columns):
        compute = Compute(dtype="bfloat16")
        model = Transformer(config, jax.random.key(0))
        return model.empty_caches(1, columns, compute, float8)

    at = {n: nbytes(jax.eval_shape(lambda n=n: caches(n))) for n in (16, 32)}
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), model)
    moved = decode_bytes(config, nbytes(half), float8_cache=float8)
    assert moved.token == (at[32] - at[16]) / 16
    assert moved.state == at[16] - 16 * moved.token
    assert moved.weights == nbytes(half) - nbytes(half.embed)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert decode_bytes(tied, nbytes(half)).weights == nbytes(half)


def test_seconds_of_qwen3_4b():
    """512 responses of 8,192 tokens to prompts of 2,048, in 128 slots on 16 chips of 1.638 TB/s."""
    config = ModelConfig(
        vocab_size=151936, hidden_size=2560, layers=36, heads=32, kv_heads=8, head_dim=128,
        mlp_size=9728, tie_embeddings=True,
    )  # fmt: skip
    moved = decode_bytes(config, weights=8.045e9)
    assert moved.token == 36 * 2 * 8 * 128 * 2 and moved.state == 0
    step = 8.045e9 + 128 * 6144 * moved.token
    assert moved.step(128, 6144) == step
    lengths = np.full(512, 2048), np.full(512, 8192)
    seconds = decode_seconds(moved, CHIPS["v6e"], 16, 128, *lengths)
    assert seconds == pytest.approx(4 * 8192 * step / (16 * 1.638e12))
    assert seconds == pytest.approx(155, abs=1)


def test_seconds_of_different_lengths():
    """Two responses of 2 and 4 tokens, each of which reads its prompt and half of itself per token."""
    moved = DecodeBytes(weights=100.0, token=3.0, state=5.0)
    chip = Chip("made up", 1.0, {}, bandwidth=2.0, links=1.0)
    seconds = decode_seconds(moved, chip, 4, 2, np.array([10, 20]), np.array([2, 4]))
    tokens = 2 * 3 * (10 + 1) + 4 * 3 * (20 + 2)
    assert seconds == pytest.approx((3 * 100 + tokens + 6 * 2 * 5) / 8)


def test_seconds_of_flops():
    assert compute_seconds(Work(1.0, 918e12), CHIPS["v6e"], 4, "bfloat16") == 0.25
