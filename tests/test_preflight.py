"""Preflight of a small sharded config, on eight CPU devices and, with libtpu, on a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from drpo_jax import calls, costs, loop, preflight
from drpo_jax import config as C
from drpo_jax.cli import load_config
from drpo_jax.costs.chips import has_libtpu, libtpu_requirement
from drpo_jax.learner import TokenTrace
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs
from tests.runs import SMALLEST, smallest

ROOT = Path(__file__).parents[1]
MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2}
KINDS = {"arguments", "resident", "results", "temporaries", "total"}


def run(*arguments, **environment):
    """Runs preflight on the smallest config: (exit code, stdout, stderr)."""
    # Preflight itself sets the number of devices.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    command = [sys.executable, "-m", "drpo_jax.preflight", f"--config={SMALLEST}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags} | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def config(**fields):
    """The smallest config on the mixed mesh, with some fields changed (a__b for a.b)."""
    return smallest(MESH, **fields)


def new_programs(**fields):
    resolved = config(**fields)
    return Programs(resolved, make_mesh(**resolved.mesh), stop=(1,))


@pytest.mark.slow
def test_eight_cpu_devices(tmp_path):
    """Every program compiles, fits, and sends no more bytes than expected."""
    file = tmp_path / "figures.json"
    fields = [f"--config.{name}={size}" for name, size in (MESH | {"sft.steps": 0}).items()]
    code, out, err = run(
        "--topology=cpu:8", f"--json={file}", *fields, JAX_DISABLE_MOST_OPTIMIZATIONS="1"
    )
    assert code == 0, err
    assert "cpu:8: 8 devices" in out and "mesh fsdp 2 · expert 2 · tensor 2" in out
    assert "It fits" in out and "lower bound on the time of a step is unknown" in out
    figures = json.loads(file.read_text())
    assert figures["devices"] == 8 and figures["fits"] is True
    sampler = ["prefill", "first_tokens", "admit", "decode"]
    assert list(figures["programs"]) == ["sync", "rescore", "update", *sampler]
    for name, program in figures["programs"].items():
        assert f"compiling {name} … " in out and program["fits"] and not program["problem"]
        assert set(program["memory"]) == KINDS

    programs = new_programs()
    state = programs.abstract_state
    update = figures["programs"]["update"]
    memory = update["memory"]
    assert memory["arguments"]["learner state"] == costs.device_bytes(state)
    assert figures["programs"]["sync"]["memory"]["resident"] == {
        "optimizer state": costs.device_bytes(state.opt_state)
    }
    assert memory["total"] > costs.device_bytes(state) and memory["results"] < memory["total"]
    # Bytes of programs whose collectives were inspected. More means an unnecessary gather.
    for name, most in (("sync", 24e3), ("rescore", 105e3), ("update", 291e3)):
        sent = figures["programs"][name]["sent"]
        assert 0 < sum(sent.values()) < 1.2 * most, (name, sent)


def test_partial_rollouts_prefill_prompt_and_response():
    """Prefilled rows grow by the response, and so does their memory."""
    whole, partial = (
        {p.name: p for p in preflight.program_list(new_programs(train__partial_tokens=tokens))}
        for tokens in (0, 8)
    )
    assert list(whole) == list(partial)
    sizes = [costs.device_bytes(p["prefill"].arguments["prompts"]) for p in (whole, partial)]
    assert sizes[1] > 1.5 * sizes[0]
    assert partial["decode"].resident["prompts"] is partial["prefill"].arguments["prompts"]


@pytest.mark.slow
def test_one_of_four_widths_counts(tmp_path):
    """The update by tokens has four widths; its FLOPs are those of the widest, rows of 32 tokens."""
    flops = []
    for rows, tokens in ((8, 0), (0, 8 * 32)):
        file = tmp_path / f"{tokens}.json"
        sizes = {"train.micro_batch": rows, "train.micro_tokens": tokens, "sft.steps": 0}
        sizes["sampler.max_response_length"] = 26  # with a prompt of 6
        fields = [f"--config.{name}={size}" for name, size in (MESH | sizes).items()]
        code, out, err = run(
            "--topology=cpu:8", "--programs=update", f"--json={file}", *fields,
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        )  # fmt: skip
        assert code == 0 and "8 rows at a time" in out, err
        flops.append(json.loads(file.read_text())["programs"]["update"]["flops"]["compiled"])
    assert flops[1] == pytest.approx(flops[0], rel=0.05)


def test_what_does_not_fit(monkeypatch, capsys):
    """The advice for a chip that is too small, by the largest part of memory."""
    fields = dict(sft__steps=0, precision__recipe="rollout")
    sync = preflight.program_list(new_programs(**fields))[0]
    monkeypatch.setattr(preflight, "program_list", lambda _: [sync])
    small = costs.Chip("small", 1e4, {}, 0.0, 0.0)
    monkeypatch.setattr(costs, "get_devices", lambda _: (jax.devices(), small))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "update", lambda *_: None)  # other tests share its cache
        assert preflight.main(config(**fields), "made:up") == 1
    out = capsys.readouterr().out
    assert "sync does not fit: " in out and "KiB too much" in out and "It fits" not in out

    def advice(largest, program="update", remedy="less", problem="", **more):
        resolved, mesh = config(**more), SimpleNamespace(shape={"data": more.pop("mesh__data", 1)})
        known = costs.Program(program, None, {}, remedy=remedy)
        parts = {"temporaries": 1.0, "results": 0.0} | largest
        own = {name: parts.pop(name) for name in ("temporaries", "results")}
        cost = costs.Cost(known, 0.0, parts, {}, available=2.0, work=None, problem=problem, **own)
        return preflight.advice(cost, resolved, mesh)

    text = advice({"temporaries": 3 * 2**30}, remedy="a smaller train.micro_batch")
    assert "update does not fit: 3 GiB too much" in text
    assert "temporaries takes the most, 3 GiB. Try a smaller train.micro_batch." in text
    unread = advice({}, problem="RESOURCE_EXHAUSTED: vmem")
    assert unread == "update does not compile: RESOURCE_EXHAUSTED: vmem"
    assert "fewer sampler.slots" in advice({"caches": 5.0})
    weights = advice({"sampler weights": 5.0}, precision__recipe="rollout")
    split = "a larger sampler_mesh.tensor or sampler_mesh.fsdp or sampler_mesh.expert, with"
    assert split in weights and "'codes'" in weights
    assert split in advice({"results": 5.0}, program="sync")
    assert "mesh.fsdp = -1" in advice({"learner state": 5.0})
    copies = advice({"learner state": 5.0}, mesh__data=2, mesh__fsdp=1)
    assert "mesh.fsdp instead of mesh.data = 2" in copies


def test_remedies_for_large_temporaries():
    known = new_programs(train__micro_batch=8)
    assert preflight.smaller(known, "train") == "compute.remat = 'full'"
    below = "train.micro_batch below 8, a multiple of 4"
    assert preflight.smaller(known, "train", backward=False) == below
    known = new_programs(train__micro_batch=0, train__micro_tokens=300, compute__remat="full")
    below = "train.micro_tokens below 256, at least 128"
    assert preflight.smaller(known, "train") == below
    known = new_programs(train__micro_batch=4, compute__remat="full")
    assert "already computes one row at a time" in preflight.smaller(known, "train")
    assert preflight.smaller(known, "sft") == "sft.micro_batch below 16, a multiple of 4"


CASES = {
    "drpo": {},
    "top-k, rescored": dict(objective__name="dppo_topk_tv", objective__behavior="rescored"),
    "minirl, k3": dict(objective__name="minirl", objective__kl="k3", objective__kl_coefficient=0.1),
    "routes": dict(train__routing_replay=True),
    "by tokens": dict(train__micro_batch=0, train__micro_tokens=300),
    "corrected": dict(
        objective__behavior="rescored", objective__correction="tis", objective__name="grpo"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_are_those_of_the_loop(case, monkeypatch):
    fields = {"objective__delta": None} | CASES[case]
    programs = new_programs(**fields)
    n, r = 16, programs.config.sampler.max_response_length
    prompt, top = programs.config.sampler.max_prompt_length, programs.config.sampler.top_logprobs
    logp = np.full((n, r), -1.0, np.float32)
    ids = np.zeros((n, r, top), np.int32)
    rollouts = SimpleNamespace(
        tokens=np.zeros((n, prompt + r), np.int32),
        prompt_lengths=np.full(n, prompt, np.int32),
        response_lengths=np.full(n, r, np.int32),
        full_logp=logp,
        sampled_logp=logp,
        top_ids=ids,
        top_logp=ids.astype(np.float32),
        routes=np.zeros((n, prompt + r, 2, 2), np.int16),
        mask=lambda: np.ones((n, r), bool),
    )
    scored = []

    def score(run, model, rollouts, step, inputs, replay=True):
        scored.append(set(inputs))
        return TokenTrace(logp, logp, logp, logp, ids.astype(np.float32), logp[..., None])

    monkeypatch.setattr(loop.learn, "score", score)
    fake = SimpleNamespace(config=programs.config, programs=programs, reference=None)
    reward = np.arange(n) % 2.0
    inputs, _, _ = loop.learn.objective_inputs(
        fake, None, rollouts, reward.astype(np.float32), 0, False
    )
    rows = np.arange(8)
    batch, _ = programs.rollout_batch(rollouts, rows, inputs)
    names, replay = calls.update_inputs(programs), programs.config.train.routing_replay
    expected = calls.abstract_batch(programs, programs.update_shape, names, replay)
    assert jax.tree.structure(batch) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(expected)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)

    listed = {program.name: program for program in preflight.program_list(programs)}
    assert listed["rescore"].calls == 2 * len(scored)
    assert listed["update"].calls == 2 and listed["warm start"].calls == 0
    old = [names for names in scored if names] or [set()]
    assert set(listed["rescore"].arguments["batch"].inputs) == old[0]
    assert ("reference model" in listed["update"].resident) == ("k3" in case)


# own.py is left out: it names a checkpoint of the hub, whose config.json is its architecture.
CONFIGS = sorted(path for path in ROOT.glob("configs/*.py") if path.stem != "own")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_need_no_checkpoint(path):
    C.resolve(preflight.without_text(load_config(str(path))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology=SLICE is missing"),
        (("--topology=v5p:4x4",), "unknown topology 'v5p:4x4'"),
        (("--topology=cpu:6", "--config.mesh.fsdp=4"), "needs 4 devices, there are 6"),
        (
            ("--topology=cpu:1", "--programs=updat"),
            "no updat among warm start, sync, rescore, update,",
        ),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.slow
def test_a_tpu(tmp_path):
    """The chip's rates give a bound, and all trip counts but those of the head are known."""
    if not has_libtpu():
        pytest.skip(f"needs the TPU compiler: pip install --no-deps '{libtpu_requirement()}'")
    file = tmp_path / "figures.json"
    changed = MESH | {"sft.steps": 0, "compute.dtype": "bfloat16", "train.pack": True}
    fields = [f"--config.{name}={value}" for name, value in changed.items()]
    code, out, err = run("--topology=v5e:2x4", "--lengths=mean:8", f"--json={file}", *fields)
    assert code == 0, err
    assert "s of a rollout step or more" in out and "It fits" in out
    figures = json.loads(file.read_text())
    assert figures["chip"]["name"] == "v5e" and 0 < figures["step"]["mfu"] < 1
    for name, program in figures["programs"].items():
        assert 0 < program["memory"]["total"] < figures["chip"]["memory"]
        assert program["seconds"]["memory"] > 0
        if name == "decode":  # its loop ends with its rows
            continue
        unsure = {c["source"] for c in program["largest_sent"] if not c["certain"]}
        assert all("shard_map/while" in source for source in unsure), unsure
    update = figures["programs"]["update"]
    assert update["flops"]["compiled"] > 0.8 * update["flops"]["needed"]

    # Of a call with empty micro-batches, the optimizer's traffic is left.
    idle = update["idle_seconds"]
    assert idle["compute"] == 0 and 0 < idle["memory"] < update["seconds"]["memory"]
    forecast = figures["forecast"]
    assert 0 < forecast["step_seconds"] < sum(forecast["worst_case"].values())
    assert sum(forecast["worst_case"].values()) == pytest.approx(figures["step"]["seconds"])
    assert "Forecast for 16 responses" in out


NO_EXPERTS = {"model.experts": 0, "model.experts_per_token": 0, "model.expert_size": 0}
DELTA_NET = {
    "model.full_attention_every": 2, "model.linear_key_heads": 4, "model.linear_value_heads": 8,
    "model.linear_key_dim": 64, "model.linear_value_dim": 64, "model.linear_conv_kernel": 4,
}  # fmt: skip


DENSE = NO_EXPERTS | {"model.mlp_size": 16384}
FAMILIES = [DENSE, {"model.experts": 16, "model.expert_size": 2048}, DENSE | DELTA_NET]
NAMES = ["dense", "mixture", "hybrid"]
# Two layers whose weights outweigh the activations of a few tokens, which stay in a core's memory.
WIDE = {
    "sft.steps": 0, "compute.dtype": "bfloat16", "precision.recipe": "none",
    "model.load_balance": 0, "model.hidden_size": 2048, "model.vocab_size": 4096, "model.heads": 16,
    "model.kv_heads": 4, "model.head_dim": 128,
}  # fmt: skip


def hbm_bytes(tmp_path, topology, fields, *names):
    """The HBM traffic of the programs `names` of a model of two layers, by program."""
    if not has_libtpu():
        pytest.skip(f"needs the TPU compiler: pip install --no-deps '{libtpu_requirement()}'")
    file = tmp_path / "figures.json"
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    only = f"--programs={','.join(names)}"
    code, _, err = run(f"--topology={topology}", only, f"--json={file}", *changed)
    assert code == 0, err
    programs = json.loads(file.read_text())["programs"]
    return {name: programs[name]["hbm_bytes"] for name in names}


@pytest.mark.slow  # Compiles two programs for each family.
@pytest.mark.parametrize(
    "family", [*FAMILIES, DENSE | {"precision.kv_cache": "e4m3"}], ids=[*NAMES, "float8 caches"]
)
def test_sampling_moves_the_bytes_of_the_equations(family, tmp_path):
    """Weights and prompts are read once, of the rings the blocks of a row; states are also written."""
    changed = WIDE | family | {
        "sampler.slots": 64, "sampler.max_prompt_length": 1024,
        "sampler.max_response_length": 8192, "sampler.prefill_chunk": 16,
    }  # fmt: skip
    resolved = smallest(changed)
    programs = Programs(resolved, make_mesh(**resolved.mesh, devices=jax.devices()[:1]), stop=(1,))
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(programs.abstract_weights))
    float8 = resolved.precision.kv_cache == "e4m3"
    moved = costs.decode_bytes(programs.model_config, weights, float8_cache=float8)

    counted = hbm_bytes(tmp_path, "v5e:2x2", changed, "prefill", "decode")
    # A device has a quarter of the slots, and of the 16 prompts. Half of a response is in the rings on
    # average, and a row begins anywhere in its first block of 512 columns.
    step = moved.step(64 / 4, 1024 + 8192 / 2 + 511)
    assert counted["decode"] == pytest.approx(32 * step, rel=0.05)
    head = 2 * 2048 * 4096
    assert counted["prefill"] == pytest.approx(moved.step(16 / 4, 1024) - head, rel=0.1)


@pytest.mark.slow  # Compiles an update for each family.
@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_an_update_moves_the_bytes_of_its_passes(family, tmp_path):
    """Every pass over the parameters, of which there are many more bytes than activations.

    Bytes per parameter: a bfloat16 copy is made of the float32 weights (4 + 2). A micro-batch reads it
    forward and backward (2 + 2) and adds a float32 gradient to the sum (4 + 4). If layers are scanned,
    which takes two of a kind, it writes zeros and the gradient and reads the gradient again (4 + 4 + 4).
    For the experts' kernels, a layer's weights are copied out of the stack, into another layout, and
    transposed for the backward pass (4 each); their gradient is first written on its own (4 + 4).
    AdamW reads weight, gradient and two moments, and writes all but the gradient (16 + 12). The norms of
    the gradient, of the change and of the new weights read them again (4 + 12).
    """
    changed = WIDE | family | {
        "sampler.max_prompt_length": 6, "sampler.max_response_length": 26, "train.micro_batch": 4
    }  # fmt: skip
    resolved = smallest(changed)
    programs = Programs(resolved, make_mesh(**resolved.mesh, devices=jax.devices()[:1]), stop=(1,))
    assert programs.micro_batches == 2 and not resolved.train.pack
    parameters = sum(a.size for a in jax.tree.leaves(programs.abstract_state.model))
    model = programs.model_config
    experts = model.layers * model.experts * 3 * model.hidden_size * model.expert_size
    scanned = 0 if model.full_attention_every == 2 else 4 + 4 + 4
    micro_batch = ((2 + 2) + (4 + 4) + scanned) * parameters + (3 * 4 + (4 + 4)) * experts
    once = (4 + 2) + (16 + 12) + (4 + 12)
    counted = hbm_bytes(tmp_path, "v5e:1x1", changed, "update")
    assert counted["update"] == pytest.approx(2 * micro_batch + once * parameters, rel=0.1)
