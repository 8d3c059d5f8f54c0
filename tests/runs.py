"""Whole runs of the smallest config, shared by the tests of the loop."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from drpo_jax import config as C
from drpo_jax import loop, rewards
from drpo_jax.cli import load_config
from drpo_jax.metrics import read_metrics
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs

SMALLEST = str(Path(__file__).parent / "smallest.py")
# A dense model in place of the mixture of experts, without a warm start, and with a single sampler.
DENSE = {
    "model.experts": 0, "model.experts_per_token": 0, "model.expert_size": 0, "model.mlp_size": 32,
    "model.load_balance": 0.0, "sft.steps": 0, "evaluate.precision": "sampler",
}  # fmt: skip
# Prefixes of fields that no compiled program depends on. (A schedule would depend on train.steps.)
UNCOMPILED = (
    "reward.", "evaluate.", "checkpoint.", "data.", "log.", "sampler.parity", "train.staleness",
    "train.steps", "train.save_rollout_every", "train.max_skipped",
)  # fmt: skip
# Prefixes of metrics that differ between equal runs.
CLOCKS = ("time/", "compile/", "tokens_per_second")


def smallest(fields: Mapping[str, Any] | None = None, **changed: Any) -> FrozenConfigDict:
    """Returns the smallest config, resolved.

    Args:
      fields: changed fields by their dotted names.
      **changed: more changed fields, a__b for a.b.
    """
    flat = C.flatten(load_config(SMALLEST)) | dict(fields or {})
    return C.resolve(C.from_dict(flat | {k.replace("__", "."): v for k, v in changed.items()}))


@contextlib.contextmanager
def one_device(reward: Callable[..., float] | None = None, share: bool = True) -> Iterator[None]:
    """Puts runs on one of the eight devices, because sharded programs compile slowly.

    Args:
      reward: the reward of the task, which an untrained model should earn; None: the task's own.
      share: runs whose configs compile to the same programs share them, and all samplers share theirs.
        Otherwise a run that resumes in this process traces and compiles all programs again, as a new
        process does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        if share:
            patch.setattr("drpo_jax.run.Programs", _shared_programs())
            # jax.jit traces and compiles an object once; a sampler makes new ones on purpose.
            patch.setattr("drpo_jax.sampler.engine.partial", functools.cache(partial))
        if reward is not None:
            patch.setitem(rewards.REWARDS, "arithmetic", reward)
        yield


def _shared_programs() -> Callable[..., Programs]:
    """Returns a substitute for `Programs` that builds equal programs once."""
    built: dict[str, Programs] = {}

    def programs(config, mesh, stop, **options):
        assert config.optimizer.schedule == "constant"
        fields = {f: x for f, x in C.flatten(config).items() if not f.startswith(UNCOMPILED)}
        key = json.dumps([fields, list(stop), options])
        if key not in built:
            built[key] = Programs(config, mesh, stop, **options)
        built[key].config = config
        return built[key]

    return programs


def odd(prompt: str, text: str, answer: str) -> float:
    """A reward that about half of all responses earn: 1 if the length is odd."""
    return float(len(text) % 2)


def logged(workdir: Path, *without: str) -> list[dict[str, float]]:
    """Returns the records of a run except `CLOCKS` and the metrics with the prefixes `without`."""
    return [
        {name: x for name, x in record.items() if not name.startswith((*CLOCKS, *without))}
        for record in read_metrics(workdir)
    ]


def checkpoint_bytes(config: FrozenConfigDict, workdir: Path, step: int) -> list[bytes]:
    """Returns the arrays in the checkpoint of a step as bytes."""
    run = loop.Run.create(config, workdir)
    with run.checkpoints() as checkpoints:
        state = checkpoints.restore(step, run.programs.abstract_state)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


class Killed(Exception):
    """Ends a run in place of a signal that cannot be caught."""


@contextlib.contextmanager
def killed_at(module: Any, name: str, step: int) -> Iterator[None]:
    """Expects `Killed`, which `module.name` raises in place of its call with `step` as last argument."""
    original = getattr(module, name)

    def function(*arguments, **keywords):
        if arguments[-1] == step:
            raise Killed
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, function)
        yield


def check_resume(config: FrozenConfigDict, directory: Path) -> None:
    """Checks that a run of two steps, killed in the second one, resumes to the same bits."""
    loop.train(config, directory / "unbroken")
    with killed_at(loop.loop, "rl_step", 1):
        loop.train(config, directory / "killed")
    loop.train(config, directory / "killed")
    assert logged(directory / "killed") == logged(directory / "unbroken")
    ours, theirs = (checkpoint_bytes(config, directory / d, 2) for d in ("killed", "unbroken"))
    assert ours == theirs
