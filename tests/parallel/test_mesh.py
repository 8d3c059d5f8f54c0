import jax
import pytest

from drpo_jax.parallel import MESH_AXES, make_mesh, make_sampler_mesh


def test_one_axis_takes_the_remaining_devices():
    assert jax.device_count() == 8  # tests/conftest.py
    assert dict(make_mesh().shape) == dict(zip(MESH_AXES, (8, 1, 1, 1, 1)))
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == dict(zip(MESH_AXES, (2, 2, 1, 1, 2)))
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "needs 3 devices, there are 8; set one of .* to -1"),
        (dict(data=-1, fsdp=3), "there are 8; the axes besides mesh.data = -1 must divide them"),
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


def sizes_of(mesh):
    return tuple(mesh.shape[axis] for axis in MESH_AXES)


def test_the_sampler_divides_the_same_devices():
    learner = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    assert sizes_of(make_sampler_mesh(learner)) == (2, 1, 1, 2, 2)
    assert sizes_of(make_sampler_mesh(learner, expert=-1, tensor=2)) == (1, 1, 1, 4, 2)
    assert sizes_of(make_sampler_mesh(learner, data=8)) == (8, 1, 1, 1, 1)
    long = make_mesh(data=1, fsdp=2, sequence=2, tensor=2)
    assert sizes_of(make_sampler_mesh(long)) == (4, 1, 1, 1, 2)
    assert sizes_of(make_sampler_mesh(long, fsdp=-1)) == (1, 8, 1, 1, 1)
    mesh = make_sampler_mesh(learner, fsdp=8)
    assert mesh.axis_types == learner.axis_types
    assert list(mesh.devices.flat) == list(learner.devices.flat)
    with pytest.raises(
        ValueError, match="sampler_mesh .* needs 4 devices, there are 8; set one of sam"
    ):
        make_sampler_mesh(learner, expert=4)
    with pytest.raises(
        ValueError, match="sampler_mesh sizes must be positive, at most one of them"
    ):
        make_sampler_mesh(learner, data=-1, tensor=-1)
