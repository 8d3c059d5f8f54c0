import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.parallel import make_mesh, make_sampler_mesh, resharding


def specs(source, target, shape):
    return [step.spec for step in resharding(source, target, shape)]


def test_axes_move_from_one_dimension_to_another_one_dimension_at_a_time():
    """Experts [E, D, F] from expert 2 and fsdp 4 to expert 4 and tensor 2, over the same devices."""
    learner = make_mesh(data=1, fsdp=4, expert=2)
    sampler = make_sampler_mesh(learner, expert=-1, tensor=2)
    source = NamedSharding(learner, P("expert", "fsdp", None))
    target = NamedSharding(sampler, P("expert", None, "tensor"))
    # axis_0 has four devices, axis_1 has two.
    ways = [P(None, "axis_0", "axis_1"), P("axis_0", None, "axis_1")]
    assert specs(source, target, (4, 8, 8)) == ways
    assert [step.shard_shape((4, 8, 8)) for step in resharding(source, target, (4, 8, 8))] == [
        (4, 2, 4),
        (1, 8, 4),
    ]
    assert resharding(source, target, (4, 8, 8))[0].mesh.devices.flat[:].tolist() == (
        learner.devices.flat[:].tolist()
    )


def test_a_move_waits_until_the_mesh_divides_the_dimension():
    learner = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    sampler = make_sampler_mesh(learner, fsdp=2, expert=4)
    source = NamedSharding(learner, P("tensor", "expert", "fsdp"))
    target = NamedSharding(sampler, P("fsdp", "expert", None))
    assert specs(source, target, (2, 8, 8)) == [
        P(None, ("axis_1", "axis_2"), "axis_0"),
        P("axis_0", ("axis_1", "axis_2"), None),
    ]
    assert specs(source, target, (8, 3, 8)) == [P(("axis_0", "axis_2"), "axis_1", None)]


def test_a_dimension_is_split_before_another_is_gathered():
    """An embedding [V, D] from fsdp 4, replicated over expert 2, to tensor 2, replicated over four."""
    learner = make_mesh(data=1, fsdp=4, expert=2)
    sampler = make_sampler_mesh(learner, expert=-1, tensor=2)
    source, target = (
        NamedSharding(learner, P("tensor", "fsdp")),
        NamedSharding(sampler, P(("fsdp", "tensor"), None)),
    )
    assert specs(source, target, (64, 8)) == [P("axis_1", "axis_0")]
    assert specs(source, target, (63, 8)) == []


def test_there_is_nothing_between_shardings_that_only_gather_or_have_no_common_mesh():
    learner = make_mesh(data=1, fsdp=4, expert=2)
    sampler = make_sampler_mesh(learner)
    source = NamedSharding(learner, P("expert", "fsdp"))
    assert resharding(source, NamedSharding(sampler, P("expert", None)), (4, 8)) == []
    six = make_mesh(data=2, tensor=3, devices=jax.devices()[:6])
    other = make_sampler_mesh(six, data=3, tensor=2)
    source, target = NamedSharding(six, P("tensor", None)), NamedSharding(other, P(None, "tensor"))
    assert resharding(source, target, (6, 6)) == []
