"""The programs of a run give the same numbers on one device and on meshes of eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.meshes import (
    FAMILIES,
    GREEDY,
    MOE,
    NAMED,
    PROMPT,
    RESPONSE,
    SEED,
    bounds,
    differences,
    greedy_samples,
    new_programs,
    numbers,
)
from drpo_jax.precision import Quantized, fake_quantize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
KEY = jax.random.key(SEED)
MIXED = NAMED["all but data"]
LONG = dict(data=1, fsdp=2, sequence=2, expert=2)
# The sampler's own division of the eight devices.
OWN = {f"sampler_mesh.{axis}": 2 for axis in ("fsdp", "expert", "tensor")}
OWN_DENSE = {"sampler_mesh.fsdp": 4, "sampler_mesh.tensor": 2}


@pytest.fixture(scope="module")
def one_device():
    return functools.cache(lambda family: numbers(FAMILIES[family]))


def assert_same(ours, expected, family):
    largest = differences(ours, expected)
    assert largest["tokens"] == 0
    for name, most in bounds(family).items():
        assert largest[name] <= most, (name, largest)
    assert expected.metrics[2]["loss"] != expected.metrics[0]["loss"]
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), expected.start, expected.end)
    assert min(jax.tree.leaves(moved)) > 1e-3


# The mixture runs on every mesh. The other families share its rules and run on the meshes that combine
# axes; a dense model has no experts to split.
@pytest.mark.parametrize(
    ("family", "mesh"),
    [("moe", mesh) for mesh in NAMED]
    + [("dense", "data"), ("dense", "fsdp and tensor")]
    + [
        ("hybrid", "data"),
        ("hybrid", "fsdp and tensor"),
        ("hybrid", "all but data"),
        ("hybrid", "sequence, fsdp and tensor"),
    ],
)
def test_eight_devices_compute_what_one_does(family, mesh, one_device):
    assert_same(numbers(FAMILIES[family], **NAMED[mesh]), one_device(family), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampler_with_its_own_mesh_samples_what_one_device_does(family, one_device):
    """The learner splits over fsdp alone; the sampler's weights stay in place, and tokens move."""
    own = OWN_DENSE if family == "dense" else OWN
    programs, expected = new_programs(FAMILIES[family] | own, data=1, fsdp=8), one_device(family)
    with jax.set_mesh(programs.mesh):
        ours = greedy_samples(programs, programs.init(KEY).model)
    np.testing.assert_array_equal(ours.tokens, expected.rollouts.tokens)
    largest = np.max(abs(ours.sampled_logp - expected.rollouts.sampled_logp))
    assert largest <= bounds(family)["logprobs"]


def test_the_penalties_of_the_config_reach_the_objective():
    fields = {"objective.kl": "k3", "objective.kl_coefficient": 0.1, "objective.kl_behavior": 0.01}
    policy = new_programs(MOE | fields).objective
    assert (policy.kl, policy.kl_coefficient, policy.kl_behavior) == ("k3", 0.1, 0.01)


def test_policy_updates_on_mixed_meshes():
    fields = MOE | {"model.load_balance": 0.0, "train.pack": True, "objective.name": "gspo"}
    fields["objective.aggregation"] = "seq-mean-token-mean"
    expected = numbers(fields, policy=True)
    for mesh in (MIXED, LONG):
        assert_same(numbers(fields, policy=True, **mesh), expected, "moe")


def test_updates_by_tokens_on_mixed_meshes():
    """Micro-batches of several widths on eight devices, and one device with a sequence per row."""
    fields = MOE | {"model.load_balance": 0.0, "objective.name": "gspo"}
    fields["objective.aggregation"] = "seq-mean-token-mean"
    expected = numbers(fields, policy=True)
    fields |= {"train.micro_batch": 0, "train.micro_tokens": 4 * 8 * -(-(PROMPT + RESPONSE) // 8)}
    for mesh in (MIXED, LONG):
        assert_same(numbers(fields, policy=True, **mesh), expected, "moe")


def test_sync_quantizes_the_projections_and_nothing_else():
    fields = MOE | {"precision.recipe": "rollout"}
    programs = new_programs(fields)
    with jax.set_mesh(programs.mesh):
        model = programs.init(KEY).model
        synced, exact = programs.sync(model), programs.sync_exact(model)
    for (path, ours), weight, same in zip(
        jax.tree_util.tree_leaves_with_path(synced),
        *map(jax.tree.leaves, (model.unstacked(), exact)),
    ):
        projection = any(getattr(k, "name", "").endswith("_proj") for k in path)
        expected = fake_quantize(weight) if projection else weight
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(same, weight)
        assert projection == bool(np.any(ours != weight))
    mesh = new_programs(fields, **MIXED)
    with jax.set_mesh(mesh.mesh):
        sharded = mesh.sync(mesh.init(KEY).model)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(synced)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "own"),
    [({}, {}), (MIXED, {}), (MIXED, OWN)],
    ids=["one", "mixed", "own mesh"],
)
def test_codes_and_values_sample_alike(sizes, own):
    samples, kinds = [], []
    for held in ("values", "codes"):
        fields = MOE | {"precision.recipe": "rollout", "precision.sampler_weights": held} | own
        programs = new_programs(fields, **sizes)
        with jax.set_mesh(programs.mesh):
            programs.sampler.load(programs.sync(programs.init(KEY).model))
            kinds.append(programs.sampler.model.blocks[0].mlp.up_proj.get_value())
            prompts = [[2 + i] * (1 + i) for i in range(8)]
            samples.append(programs.sampler.generate(prompts, GREEDY, KEY))
    values, codes = samples
    assert isinstance(kinds[1], Quantized) and kinds[1].codes.dtype == jnp.float8_e4m3fn
    assert kinds[0].dtype == jnp.float32
    np.testing.assert_array_equal(values.tokens, codes.tokens)
    np.testing.assert_allclose(values.logp, codes.logp, atol=1e-5)


def test_a_batch_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"slots = 12 \(config field sampler.slots\) .* = 8"):
        new_programs(MOE | {"sampler.slots": 12}, data=8)
    with pytest.raises(ValueError, match="train.micro_batch = 4 is not a multiple of the 8"):
        new_programs(MOE | {"train.micro_batch": 4}, data=8)
    few = MOE | {"train.micro_batch": 0, "train.micro_tokens": 100}
    with pytest.raises(ValueError, match="micro_tokens = 100 is too small: each of the 8 devices"):
        new_programs(few, data=8)
    with pytest.raises(
        ValueError, match="tensor = 8 of the sampler's mesh must divide the model's 4 kv"
    ):
        new_programs(MOE, data=1, tensor=8)


@pytest.mark.parametrize("own", [{}, OWN], ids=["mixed", "own mesh"])
def test_every_replica_holds_the_synced_weights(own):
    """From FSDP to the sampler's layout: checksums of the bits on every device."""
    fields = MOE | {"precision.recipe": "rollout", "precision.noise": 0.01}
    fields |= {"compute.dtype": "bfloat16"}
    programs = new_programs(fields | own, **MIXED)

    def checksum(array):
        return np.sum(np.asarray(array).view(np.uint16), dtype=np.uint64)

    key = jax.random.key(7)
    with jax.set_mesh(programs.mesh):
        model = programs.init(KEY).model
        synced = programs.sync(model, key)
        other = programs.sync(model, jax.random.key(8))
        noisy = programs.perturbed(model, key)
    one = new_programs(fields)
    with jax.set_mesh(one.mesh):
        expected = one.sync(jax.device_get(model), key)
        perturbed = one.perturbed(jax.device_get(model), key)
    moved = 0
    for ours, theirs, again in zip(*map(jax.tree.leaves, (synced, expected, other))):
        for shard in ours.addressable_shards:
            assert checksum(shard.data) == checksum(np.asarray(theirs)[shard.index])
        moved += np.any(np.asarray(ours) != np.asarray(again))
    norms = 4 * programs.model_config.layers + 1
    assert moved == len(jax.tree.leaves(synced)) - norms  # norms have no noise
    for ours, theirs in zip(*map(jax.tree.leaves, (noisy, perturbed))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
