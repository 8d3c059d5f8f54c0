"""Whole runs of the smallest config, shared by the tests of the loop."""

import contextlib
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

SMALLEST = str(Path(__file__).parent / "smallest.py")
# A dense model in place of the mixture of experts, without a warm start.
DENSE = {
    "model.experts": 0, "model.experts_per_token": 0, "model.expert_size": 0, "model.mlp_size": 32,
    "model.load_balance": 0.0, "sft.steps": 0,
}  # fmt: skip
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
def one_device(reward: Callable[..., float] | None = None) -> Iterator[None]:
    """Puts runs on one of the eight devices, because sharded programs compile slowly.

    Args:
      reward: the reward of the task, which an untrained model should earn; None: the task's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        if reward is not None:
            patch.setitem(rewards.REWARDS, "arithmetic", reward)
        yield


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
