import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from drpo_jax.parallel import (
    SAMPLER_RULES,
    batch_shards,
    constrain,
    flatten_tokens,
    make_mesh,
    partition_spec,
    unflatten_tokens,
)


def test_specs_follow_the_table():
    assert partition_spec(("layers", "experts", "embed", "expert_mlp")) == P(
        None, "expert", ("fsdp", "sequence"), "tensor"
    )
    assert partition_spec(("batch", "length")) == P(("data", "fsdp", "expert"), "sequence")
    vocab = partition_spec(("vocab", "embed"), rules=SAMPLER_RULES)
    assert vocab == P(("fsdp", "expert", "tensor"), None)
    wide = partition_spec(("mlp_batch", "mlp"), rules=SAMPLER_RULES)
    assert wide == P(("data", "expert"), ("fsdp", "tensor"))


def test_unknown_axis_raises():
    with pytest.raises(ValueError, match="unknown logical axis 'mpl' .*known: .*'mlp'"):
        partition_spec(("embed", "mpl"))


def test_two_axes_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match="'heads' and 'mlp' .* both map to mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch' and 'embed' .* both map to mesh axis 'fsdp'"):
        partition_spec(("batch", "embed"))


def test_indivisible_size_raises():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    assert partition_spec(("embed", "mlp"), (12, 6), mesh) == P(("fsdp", "sequence"), "tensor")
    with pytest.raises(ValueError, match=r"'embed' of an array \(10, 6\) .* size 10, .* 4 parts"):
        partition_spec(("embed", "mlp"), (10, 6), mesh)
    with pytest.raises(ValueError, match="'batch' .* size 6"):
        partition_spec(("batch",), (6,), mesh)


def test_batch_shards_and_constrain():
    x = jax.numpy.ones((8, 2))
    assert constrain(x, "batch", None) is x  # no mesh
    mesh = make_mesh(data=2, fsdp=2, expert=1, tensor=2)
    assert batch_shards(mesh) == 4
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2)


def test_tokens_are_flattened_where_they_are():
    """The tokens of a device are a block of two rows and two columns."""
    x = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    np.testing.assert_array_equal(flatten_tokens(x), x.reshape(16, 3))  # no mesh
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
        flat = jax.jit(flatten_tokens)(x)
        again = jax.jit(lambda x: unflatten_tokens(x, (4, 4)))(flat)
    blocks = x.reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4)  # data, sequence, row, column
    np.testing.assert_array_equal(flat, blocks.reshape(16, 3))
    np.testing.assert_array_equal(again, x)
