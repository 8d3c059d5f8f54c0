import jax
import pytest

from drpo_jax.parallel import MESH_AXES, make_mesh


def test_one_axis_takes_the_remaining_devices():
    assert jax.device_count() == 8  # tests/conftest.py
    assert dict(make_mesh().shape) == dict(zip(MESH_AXES, (8, 1, 1, 1)))
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == dict(zip(MESH_AXES, (2, 2, 1, 2)))
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "needs 3 devices, there are 8; set one of .* to -1"),
        (dict(data=-1, fsdp=3), "there are 8"),
        (dict(data=-1, fsdp=16), "needs 16 devices, there are 8"),
        (dict(data=-1, fsdp=-1), "at most one of them -1"),
        (dict(data=8, tensor=0), "must be positive"),
        (dict(data=-2), "must be positive"),
    ],
    ids=str,
)
def test_wrong_sizes_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)
