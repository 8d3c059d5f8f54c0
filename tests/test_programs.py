"""The programs of a run, on one device and on meshes of eight: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.config import default_config, resolve
from drpo_jax.parallel import make_mesh
from drpo_jax.precision import Quantized, fake_quantize
from drpo_jax.programs import Programs
from drpo_jax.sampler import SamplingParams

pytestmark = pytest.mark.usefixtures("compile_quickly")
ROWS, PROMPT, RESPONSE = 16, 10, 6
MOE = {"model.experts": 4, "model.experts_per_token": 2, "model.expert_size": 16}
DENSE = {"model.mlp_size": 48}
GREEDY = SamplingParams(max_tokens=RESPONSE, temperature=0.0)
KEY = jax.random.key(7)
MESHES = {
    "moe, data": (MOE, dict(data=8)),
    "moe, expert": (MOE, dict(data=4, expert=2)),
    "moe, mixed": (MOE, dict(data=1, fsdp=2, expert=2, tensor=2)),
    "dense, fsdp and tensor": (DENSE, dict(data=1, fsdp=4, tensor=2)),
}


def tiny(fields):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.vocab_size": 64,
            "model.hidden_size": 32,
            "model.layers": 2,
            "model.heads": 4,
            "model.kv_heads": 2,
            "model.head_dim": 8,
            "model.mlp_size": 0,
            "model.rope_theta": 1e4,
            "optimizer.eps": 1e-3,  # Adam then divides by nothing tiny: float32 errors stay small
            "optimizer.learning_rate": 1e-2,
            "data.digits": 2,
            "sampler.max_prompt_length": PROMPT,
            "sampler.max_response_length": RESPONSE,
            "sampler.slots": 16,
            "evaluate.samples": 1,
            "sampler.decode_steps": RESPONSE,
            "train.prompts": 8,
            "train.samples": 2,
            "train.mini_batch_prompts": 8,
            "train.micro_batch": 8,
            "sft.batch": ROWS,
            "sft.micro_batch": 8,
            "sft.learning_rate": 1e-2,
            "sft.warmup_steps": 0,
            **fields,
        }
    )
    return resolve(config)


def new_programs(fields, **sizes):
    """Programs on eight devices, or on one if no sizes are given."""
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    return Programs(tiny(fields), mesh, stop=(1,))


def new_batch(programs):
    rng = np.random.default_rng(0)
    tokens = rng.integers(64, size=(ROWS, PROMPT + RESPONSE)).astype(np.int32)
    prompts = rng.integers(1, PROMPT + 1, size=ROWS).astype(np.int32)
    responses = rng.integers(0, RESPONSE + 1, size=ROWS).astype(np.int32)
    data = {"behavior_logp": rng.normal(-4, 0.5, size=(ROWS, RESPONSE)).astype(np.float32)}
    data["advantage"] = rng.normal(size=ROWS).astype(np.float32)
    return programs.batch(tokens, prompts, responses, data, pack=True)[0]


def numbers(fields, policy=False, **sizes):
    """Metrics of three updates, the model before and after, and greedy tokens of the start."""
    programs = new_programs(fields, **sizes)
    with jax.set_mesh(programs.mesh):
        state = programs.init(KEY)
        start = jax.device_get(state.model)
        programs.exact_sampler.load(programs.sync_exact(state.model))
        prompts = [[2 + i] * (1 + i) for i in range(8)]
        rollouts = programs.exact_sampler.generate(prompts, GREEDY, KEY)
        batch, metrics = new_batch(programs), []
        step = programs.supervised_update
        if policy:
            state, step = programs.restart(state.model), programs.policy_update
        for _ in range(3):
            state, report = step(state, batch)
            metrics.append(jax.device_get(report.metrics))
        assert step._cache_size() == 1  # the state comes back as it went in
        placed = jax.tree.map(
            lambda a, like: (
                (a.shape, a.dtype) == (like.shape, like.dtype)
                and a.sharding.is_equivalent_to(like.sharding, a.ndim)
            ),
            state,
            programs.abstract_state if policy else programs.abstract_sft_state,
        )
        assert all(jax.tree.leaves(placed))
        return metrics, start, jax.device_get(state.model), rollouts


@pytest.fixture(scope="module")
def one_device():
    known = {}

    def get(fields, **options):
        key = str((fields, options))
        if key not in known:
            known[key] = numbers(fields, **options)
        return known[key]

    return get


def assert_same_numbers(ours, expected):
    for a, b in zip(ours[0], expected[0]):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    assert expected[0][2]["loss"] != expected[0][0]["loss"]
    for before, after in ((1, 1), (2, 2)):
        for a, b in zip(jax.tree.leaves(ours[before]), jax.tree.leaves(expected[after])):
            np.testing.assert_allclose(a, b, atol=1e-5)
    moved = [np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, expected[1:3]))]
    assert min(moved) > 1e-3
    np.testing.assert_array_equal(ours[3].tokens, expected[3].tokens)
    np.testing.assert_allclose(ours[3].logp, expected[3].logp, atol=2e-5)


@pytest.mark.parametrize("case", MESHES)
def test_eight_devices_compute_what_one_does(case, one_device):
    fields, sizes = MESHES[case]
    assert_same_numbers(numbers(fields, **sizes), one_device(fields))


def test_policy_updates_on_a_mixed_mesh(one_device):
    fields = MOE | {"model.load_balance": 0.0, "train.pack": True, "objective.name": "gspo"}
    fields["objective.aggregation"] = "seq-mean-token-mean"
    mixed = MESHES["moe, mixed"][1]
    assert_same_numbers(numbers(fields, policy=True, **mixed), one_device(fields, policy=True))


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
    mesh = new_programs(fields, **MESHES["moe, mixed"][1])
    with jax.set_mesh(mesh.mesh):
        sharded = mesh.sync(mesh.init(KEY).model)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(synced)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [{}, MESHES["moe, mixed"][1]], ids=["one", "mixed"])
def test_codes_and_values_sample_alike(sizes):
    found, kinds = [], []
    for held in ("values", "codes"):
        fields = MOE | {"precision.recipe": "rollout", "precision.sampler_weights": held}
        programs = new_programs(fields, **sizes)
        with jax.set_mesh(programs.mesh):
            programs.sampler.load(programs.sync(programs.init(KEY).model))
            kinds.append(programs.sampler.model.blocks[0].mlp.up_proj.get_value())
            prompts = [[2 + i] * (1 + i) for i in range(8)]
            found.append(programs.sampler.generate(prompts, GREEDY, KEY))
    values, codes = found
    assert isinstance(kinds[1], Quantized) and kinds[1].codes.dtype == jnp.float8_e4m3fn
    assert kinds[0].dtype == jnp.float32
    np.testing.assert_array_equal(values.tokens, codes.tokens)
    np.testing.assert_allclose(values.logp, codes.logp, atol=1e-5)


def test_a_batch_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ValueError, match="sampler.slots = 12 is not a multiple of the 8 devices"):
        new_programs(MOE | {"sampler.slots": 12}, data=8)
    with pytest.raises(ValueError, match="train.micro_batch = 4 is not a multiple of the 8"):
        new_programs(MOE | {"train.micro_batch": 4}, data=8)
    with pytest.raises(ValueError, match="model.kv_heads = 2 is not a multiple of mesh.tensor = 4"):
        new_programs(MOE, data=2, tensor=4)


def test_every_replica_holds_what_was_sent():
    """From FSDP to the sampler's layout: the bits of every device's share, summed as integers."""
    fields = MOE | {"precision.recipe": "rollout", "precision.noise": 0.01}
    fields |= {"compute.dtype": "bfloat16"}
    programs = new_programs(fields, **MESHES["moe, mixed"][1])

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
    assert moved == len(jax.tree.leaves(synced)) - norms  # which have no noise
    for ours, theirs in zip(*map(jax.tree.leaves, (noisy, perturbed))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
