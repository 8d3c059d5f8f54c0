"""The mesh axis `sequence`: devices that split the columns of rows."""

import jax
import numpy as np
import pytest

from benchmarks.meshes import FAMILIES, PROMPT, RESPONSE, ROWS, SEED, new_batch, new_programs
from drpo_jax import calls
from drpo_jax.costs.counts import collectives
from drpo_jax.costs.hlo import Module
from drpo_jax.learner import PARTS
from drpo_jax.parallel import make_mesh
from drpo_jax.sampler import Sampler

pytestmark = pytest.mark.usefixtures("compile_quickly")
DENSE, HYBRID = FAMILIES["dense"], FAMILIES["hybrid"]


def sent_bytes(fields, response, **sizes):
    """Returns the bytes of floats that a device sends in an update, by kind of collective."""
    programs = new_programs(fields | {"sampler.max_response_length": response}, **sizes)
    batch = calls.abstract_batch(programs, programs.update_shape, calls.update_inputs(programs))
    with jax.set_mesh(programs.mesh):
        lowered = programs.policy_update.lower(programs.abstract_state, batch)
    sent = {}
    for c in collectives(Module(lowered.compile().as_text(), 8, "")):
        if c.shapes.startswith("f32"):
            sent[c.kind] = sent.get(c.kind, 0) + c.sent * c.times
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_only_exchanges_of_columns_for_heads_grow_with_the_length(family):
    """What an update gathers and sums are weights, whose bytes do not depend on the length."""
    mesh, length = dict(data=2, sequence=4), PROMPT + RESPONSE
    short = sent_bytes(FAMILIES[family], RESPONSE, **mesh)
    long = sent_bytes(FAMILIES[family], RESPONSE + length, **mesh)
    assert long.pop("all-to-all") == 2 * short["all-to-all"]
    if family == "dense":
        # Queries, keys, values and outputs of two layers, and embeddings, all forward and backward.
        features = 2 * (2 * (8 + 4 + 4 + 8) * 8 + 32)
        tokens = ROWS * length / 8
        assert short["all-to-all"] == 3 / 4 * tokens * features * 4
    del short["all-to-all"]
    assert long == short


@pytest.mark.slow
def test_scores_equal_those_of_one_device():
    """Attention, DeltaNet and experts, on packed rows of both micro-batches."""
    traces = []
    for sizes in ({}, dict(data=2, sequence=2, expert=2)):
        programs = new_programs(HYBRID | {"train.pack": True}, **sizes)
        with jax.set_mesh(programs.mesh):
            model, batch = programs.init(jax.random.key(SEED)).model, new_batch(programs)
            assert np.max(batch.segment_ids) > 1
            traces.append(jax.device_get(programs.rescore(model, batch)))
    one, many = traces
    assert np.min(one.logp) < -1
    np.testing.assert_allclose(many.logp, one.logp, atol=1e-5)
    np.testing.assert_allclose(many.entropy, one.entropy, atol=1e-5)


def test_rows_are_rounded_up_to_what_the_mesh_divides():
    mesh = dict(data=2, sequence=4)
    programs = new_programs(DENSE | {"sampler.max_response_length": 7}, **mesh)
    assert programs.update_shape == (ROWS, 20)
    tokens = np.ones((ROWS, 17), np.int32)
    batch, layout = programs.batch(tokens, np.full(ROWS, 10), np.full(ROWS, 7), {})
    assert batch.tokens.shape == layout.shape == (ROWS, 20)
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape) == (ROWS // 2, 5)
    examples = programs.supervised_batch(tokens, np.full(ROWS, 10), np.full(ROWS, 7))
    assert examples.tokens.shape == (ROWS, 20)

    by_tokens = DENSE | {"train.micro_batch": 0, "train.micro_tokens": 64}
    assert new_programs(by_tokens, **mesh).update_shape[1] == 4 * PARTS[-1]
    with pytest.raises(
        ValueError, match="needs a row of 32 tokens .* multiple of 32.* at least 64"
    ):
        new_programs(by_tokens | {"train.micro_tokens": 63}, **mesh)


def test_heads_that_the_mesh_does_not_divide_are_named():
    with pytest.raises(ValueError, match="mesh.sequence = 8 cannot split 12 query heads .* of 24"):
        new_programs(DENSE | {"model.heads": 12, "model.kv_heads": 6}, data=1, sequence=8)
    with pytest.raises(ValueError, match=r"= 2 · 4 must divide the 4 key heads of a DeltaNet"):
        new_programs(HYBRID, data=1, sequence=4, tensor=2)
    with pytest.raises(ValueError, match="size 32, which is not divisible by the 6 parts"):
        new_programs(
            DENSE | {"model.heads": 12, "sampler.slots": 18},
            data=1,
            sequence=6,
            devices=jax.devices()[:6],
        )


def test_the_sampler_takes_no_mesh_with_a_sequence_axis():
    programs = new_programs(DENSE, data=2, sequence=4)
    assert programs.sampler_mesh.shape["data"] == 8
    sampler = Sampler(None, slots=8, prompt_length=8, mesh=make_mesh(data=2, sequence=4))
    with pytest.raises(ValueError, match="cannot use a mesh with sequence = 4"):
        sampler.load(programs.abstract_weights)
