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
    assert set(RECIPES) == {"none", "rollout", "e2e", "tensorwise"}
    assert RECIPES["none"].sampler == RECIPES["none"].learner == high
    assert RECIPES["rollout"].sampler == forward and RECIPES["rollout"].learner == high
    assert RECIPES["e2e"].sampler == forward
    assert RECIPES["e2e"].learner == dataclasses.replace(forward, gradient="float8_e5m2")
    tensor = dataclasses.replace(forward, weight_block=None, tile=None)
    assert RECIPES["tensorwise"].sampler == tensor
    assert RECIPES["tensorwise"].learner == dataclasses.replace(tensor, gradient="float8_e5m2")


def test_get_recipe():
    for name, recipe in RECIPES.items():
        assert get_recipe(name) == recipe
        assert hash(get_recipe(name)) == hash(recipe)
    learner = get_recipe("e2e", scale="float32").learner
    assert learner == dataclasses.replace(RECIPES["e2e"].learner, scale="float32")
    for name in ("e2e", "tensorwise"):
        hybrid, e4m3 = (get_recipe(name, gradient=g) for g in ("e5m2", "e4m3"))
        assert hybrid == RECIPES[name] and e4m3.sampler == hybrid.sampler
        assert e4m3.learner == dataclasses.replace(hybrid.learner, gradient="float8_e4m3fn")
    assert get_recipe("rollout", gradient="e4m3") == RECIPES["rollout"]
    native = get_recipe("tensorwise", native=True)
    assert native.sampler.native and native.learner.native
    with pytest.raises(ValueError, match="'rolout', did you mean 'rollout'"):
        get_recipe("rolout")
    with pytest.raises(ValueError, match="'pow3'"):
        get_recipe("none", scale="pow3")
    with pytest.raises(ValueError, match="'e3m4'.* e5m2, e4m3"):
        get_recipe("e2e", gradient="e3m4")


def test_quantize_weight():
    w = jnp.ones((3, 200, 130))
    assert quantize_weight(w, get_recipe("rollout").learner) is w
    sampler = get_recipe("rollout", scale="float32").sampler
    q = jax.jit(lambda w: quantize_weight(w, sampler))(w)
    assert q.codes.dtype == jnp.float8_e4m3fn and q.scales.shape == (3, 2, 2)
    assert q.scales[0, 0, 0] == pytest.approx(1 / 448)

    # One scale per expert matrix, of its own values alone.
    tensor = get_recipe("tensorwise").sampler
    experts = jnp.asarray([448.0, 1.0, 7.0]).reshape(3, 1, 1) * jnp.ones((2, 3, 200, 130))
    q = quantize_weight(experts, tensor)
    assert q.codes.shape == experts.shape and q.scales.shape == (2, 3, 1, 1)
    assert q.scales[1, :, 0, 0].tolist() == [1, 2**-8, 2**-6]
