"""Runs whose sampler divides the eight devices differently from the learner (`sampler_mesh`)."""

import jax
import pytest

from benchmarks.meshes import FAMILIES, new_programs
from drpo_jax import rewards
from drpo_jax.costs.counts import collectives
from drpo_jax.costs.hlo import Module
from tests.runs import DENSE, check_resume, odd, smallest
from tests.test_programs import OWN, OWN_DENSE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """With FP8 codes in the sampler and rollouts that are sampled a step ahead."""
    monkeypatch.setitem(rewards.REWARDS, "arithmetic", odd)
    settings = smallest(
        DENSE, mesh__data=1, mesh__fsdp=8, sampler_mesh__fsdp=4, sampler_mesh__tensor=2,
        train__steps=2, train__staleness=1, evaluate__every=0, precision__sampler_weights="codes",
        checkpoint__every=1,
    )  # fmt: skip
    check_resume(settings, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_sync_gathers_no_whole_model(family):
    """From eight shards along the model width to the sampler's layout, by exchanges of shards."""
    own = OWN_DENSE if family == "dense" else OWN
    programs = new_programs(FAMILIES[family] | own, data=1, fsdp=8)
    with jax.set_mesh(programs.mesh):
        compiled = programs.sync.lower(programs.abstract_state.model).compile()
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(programs.abstract_weights))
    sent = sum(c.sent * c.times for c in collectives(Module(compiled.as_text(), 1, "")))
    # Gathering all weights takes 7/8 of them to every device.
    assert sent < whole / 2
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
