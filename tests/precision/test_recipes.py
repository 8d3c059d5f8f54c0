import dataclasses

import jax
import jax.numpy as jnp
import pytest

from drpo_jax.precision import RECIPES, MatmulRecipe, get_recipe, quantize_weight


def test_recipes_are_the_table():
    high = MatmulRecipe()
    forward = MatmulRecipe(weight="float8_e4m3fn", activation="float8_e4m3fn")
    assert (high.weight, high.activation, high.gradient) == (None, None, None)
    assert (forward.weight_block, forward.tile, forward.scale) == ((128, 128), (1, 128), "pow2")
    assert set(RECIPES) == {"none", "rollout", "e2e"}
    assert RECIPES["none"].sampler == RECIPES["none"].learner == high
    assert RECIPES["rollout"].sampler == forward and RECIPES["rollout"].learner == high
    assert RECIPES["e2e"].sampler == forward
    assert RECIPES["e2e"].learner == dataclasses.replace(forward, gradient="float8_e5m2")


def test_get_recipe():
    for name, recipe in RECIPES.items():
        assert get_recipe(name) == recipe
        assert hash(get_recipe(name)) == hash(recipe)
    learner = get_recipe("e2e", scale="float32").learner
    assert learner == dataclasses.replace(RECIPES["e2e"].learner, scale="float32")
    with pytest.raises(ValueError, match="'rolout', did you mean 'rollout'"):
        get_recipe("rolout")
    with pytest.raises(ValueError, match="'pow3'"):
        get_recipe("none", scale="pow3")


def test_quantize_weight():
    w = jnp.ones((3, 200, 130))
    assert quantize_weight(w, get_recipe("rollout").learner) is w
    sampler = get_recipe("rollout", scale="float32").sampler
    q = jax.jit(lambda w: quantize_weight(w, sampler))(w)
    assert q.codes.dtype == jnp.float8_e4m3fn and q.scales.shape == (3, 2, 2)
    assert q.scales[0, 0, 0] == pytest.approx(1 / 448)
