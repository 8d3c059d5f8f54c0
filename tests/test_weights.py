"""How the sampler and the noise treat each parameter of each family."""

import jax
import pytest

from benchmarks.meshes import FAMILIES, small_config
from drpo_jax.models import Transformer
from drpo_jax.parallel import is_param
from drpo_jax.programs import model_config

CAST = {"embed", "lm_head", "beta_gate", "decay_gate", "conv", "shared_gate"}
BIASES = {"q_bias", "k_bias", "v_bias"}
DECAY = {"A_log", "dt_bias"}


def row(name):
    """(sync, noise, decay) of a parameter."""
    if name.endswith("norm"):
        return "keep", False, False
    if name.endswith("_proj"):
        return "quantize", True, True
    if name in BIASES | DECAY:
        return "keep" if name in DECAY else "cast", True, False
    assert name == "router" or name in CAST, name
    return "keep" if name == "router" else "cast", True, True


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_says_how_it_is_treated(family):
    fields = FAMILIES[family] | {"model.attention_bias": family == "dense"}
    config = model_config(small_config(fields))
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_param)
    assert len(leaves) > 10
    for path, leaf in leaves:
        metadata = leaf.get_metadata()
        treatment = metadata["sync"], metadata["noise"], metadata["decay"]
        assert treatment == row(path[-1].name), path
