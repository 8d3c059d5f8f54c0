"""Analytic FLOPs against the multiplied parameters, and against the compiled matmuls."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from drpo_jax.costs import generating, head_flops, layers_flops, scoring, training
from drpo_jax.costs.counts import matmul_flops
from drpo_jax.costs.hlo import Module
from drpo_jax.models import PRESETS, Compute, ModelConfig, Transformer

DENSE = ModelConfig(
    vocab_size=96, hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_size=48
)
MOE = dataclasses.replace(
    DENSE, mlp_size=0, experts=8, experts_per_token=2, expert_size=16, shared_expert_size=16
)
# For TPU, because on CPU the rotary embedding is a matmul, too.
FULL = Compute(attention="full", platform="tpu")


def abstract(config):
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


@pytest.mark.parametrize("name", PRESETS)
def test_two_flops_for_every_parameter_that_a_token_meets(name):
    """For every family. The recurrence of the DeltaNets adds its own."""
    config, met = PRESETS[name], 0
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract(config).blocks, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )
    for path, leaf in leaves:
        if path[-1].name.endswith(("_proj", "_gate", "router", "conv")):
            routed = "experts" in leaf.get_metadata()["axes"]
            share = config.experts_per_token / config.experts if routed else 1
            met += share * math.prod(leaf.shape)
    linear = config.layers - config.layers // config.full_attention_every
    entries = config.linear_value_heads * config.linear_key_dim * config.linear_value_dim
    assert layers_flops(config, keys=0) == pytest.approx(2 * met + 6 * linear * entries, rel=1e-9)
    assert head_flops(config) == 2 * config.vocab_size * config.hidden_size


def test_a_forward_pass_as_compiled():
    """With all scores computed at once, every token multiplies with the keys of all tokens."""
    length = 24
    compute, tokens = FULL, jnp.zeros((2, length), jnp.int32)
    run = jax.jit(lambda model: model(tokens, compute=compute))
    program = Module(run.lower(abstract(DENSE)).compile().as_text())
    each = layers_flops(DENSE, keys=length) + head_flops(DENSE)
    assert matmul_flops(program) == 2 * length * each


@pytest.mark.parametrize(("remat", "layers"), [("none", 3), ("full", 4)])
def test_a_training_step_as_compiled(remat, layers):
    """Three forward passes, or four with remat. The recomputation omits the last matmul of a layer,
    whose result the backward pass does not read."""
    compute, tokens = dataclasses.replace(FULL, remat=remat), jnp.zeros((2, 16), jnp.int32)

    def loss(model):
        return jnp.sum(jnp.square(model.hidden(tokens, compute=compute).hidden))

    program = Module(jax.jit(jax.grad(loss)).lower(abstract(DENSE)).compile().as_text())
    expected = layers * 2 * 16 * layers_flops(DENSE, keys=16)
    last = (layers - 3) * 2 * 16 * DENSE.layers * 2 * DENSE.mlp_size * DENSE.hidden_size
    assert matmul_flops(program) == pytest.approx(expected - last, rel=1e-9)


def test_the_work_of_a_step():
    keys, n, p, r = 3.5, 6, 2, 4  # mean of 1 … 6
    assert scoring(DENSE, n, p, r).model == n * (
        6 * layers_flops(DENSE, keys) + 4 * head_flops(DENSE)
    )
    once, again = (training(DENSE, n, p, r, remat) for remat in ("dots", "full"))
    assert once.model == once.executed == again.model == 3 * scoring(DENSE, n, p, r).model
    assert again.executed - again.model == n * 6 * layers_flops(DENSE, keys)
    tokens = sum(layers_flops(DENSE, p + i) + head_flops(DENSE) for i in (1, 2, 3, 4))
    prompt = sum(layers_flops(DENSE, i) for i in (1, 2)) + head_flops(DENSE)
    assert generating(DENSE, n, 2, p, r) == pytest.approx(n * tokens + 2 * prompt)


def test_experts_that_are_not_visited_cost_nothing():
    more = dataclasses.replace(MOE, experts=80)
    router = 2 * MOE.hidden_size * 72 * MOE.layers
    assert layers_flops(more, 5) - layers_flops(MOE, 5) == router
