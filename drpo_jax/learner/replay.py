"""Rollouts from files instead of sampling: the files of a directory as one stream of groups.

The files (`rollout_file`) are read in the order of their names. Step t takes the next train.prompts
groups, across file boundaries, and after the last group the stream starts over. The rollout of a step
is therefore a function of the files and the step. The files are checked when the run starts, and
`replay.json` in the workdir records their digests.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict

from drpo_jax.learner.rollout_checks import Limits, padded_arrays
from drpo_jax.learner.rollout_file import SUFFIXES, Rollout, advantages_differ, load_table
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.storage import write_whole

FILE = "replay.json"
FLAG = "--replay=DIR"


@dataclasses.dataclass(frozen=True)
class Replay:
    """The checked rollout files of a directory; see `Replay.open`.

    Attributes:
      directory: directory of the files.
      limits: the limits that the files respect.
      digests: SHA-256 of each file by name, in the order of the stream.
      groups: number of groups of each file by name.
      advantages: whether the files contain advantages.
      per_token: whether these differ between the tokens of a response.
    """

    directory: Path
    limits: Limits
    digests: Mapping[str, str]
    groups: Mapping[str, int]
    advantages: bool
    per_token: bool

    @classmethod
    def open(cls, directory: Path, limits: Limits, prompts: int) -> "Replay":
        """Reads and checks all files of a directory.

        Args:
          limits: limits of the config, including `samples`.
          prompts: train.prompts.

        Raises:
          ValueError: there are no files, a file fails its checks (`rollout_checks`), the files
            together have fewer groups than a step needs, or only some contain advantages.
          OSError: a file cannot be read.
        """
        digests, groups, advantages, per_token = {}, {}, {}, False
        for path in _files(directory):
            content = path.read_bytes()
            digests[path.name] = hashlib.sha256(content).hexdigest()
            arrays = _arrays(path, digests[path.name], limits)
            groups[path.name] = len(np.unique(arrays["group"]))
            advantages[path.name] = "advantage" in arrays
            per_token |= advantages_differ(arrays)
        if (total := sum(groups.values())) < prompts:
            raise ValueError(
                f"{directory}: its files have {total} groups, but a step learns from train.prompts = "
                f"{prompts}; add files, or lower train.prompts"
            )
        if len(set(advantages.values())) > 1:
            names = ", ".join(name for name, present in advantages.items() if not present)
            raise ValueError(
                f"{directory}: the column advantage is missing in {names}, but other files have it; add "
                "it to all files, or remove it from all"
            )
        return cls(directory, limits, digests, groups, any(advantages.values()), per_token)

    def rollout(self, step: int, prompts: int) -> Rollout:
        """Returns the rollout of a step, with `prompts` groups.

        Args:
          step: number of completed steps.
          prompts: train.prompts.

        Raises:
          ValueError: a file has changed since the run started.
        """
        names = [name for name, count in self.groups.items() for _ in range(count)]
        within = [i for count in self.groups.values() for i in range(count)]
        parts = []
        for number in range(step * prompts, (step + 1) * prompts):
            name, place = names[number % len(names)], within[number % len(names)]
            arrays = _arrays(self.directory / name, self.digests[name], self.limits)
            size = len(arrays["group"]) // self.groups[name]
            rows = slice(place * size, (place + 1) * size)
            parts.append({key: array[rows] for key, array in arrays.items()})
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: np.concatenate([part[key] for part in parts]) for key in shared}

    def claim(self, workdir: Path) -> None:
        """Writes the digests to the workdir, or compares them with those already there.

        Raises:
          ValueError: the run began with other files; the message names those that differ.
        """
        path = workdir / FILE
        record = {"files": dict(self.digests)}
        if path.exists():
            begun = json.loads(path.read_text())["files"]
            if list(begun.items()) != list(self.digests.items()):
                names = sorted({*begun, *self.digests})
                differing = [n for n in names if begun.get(n) != self.digests.get(n)]
                raise ValueError(
                    f"{self.directory} no longer holds the files that the run began with ({path}): "
                    f"{', '.join(differing)}; restore them, or choose another --workdir"
                )
        write_whole(path, json.dumps(record, indent=2) + "\n")

    def __str__(self) -> str:
        files, groups = len(self.digests), sum(self.groups.values())
        advantages = ", advantages included" * self.advantages
        return f"{groups:,} groups in {files:,} file{'s' * (files != 1)} of {self.directory}{advantages}"


def check_replayable(config: FrozenConfigDict, topk: bool, per_token: bool) -> None:
    """Checks that rollout files contain what a run needs; warns of fields that only sampling uses.

    Args:
      config: a resolved config.
      topk: whether the objective needs the logprobs of the most likely tokens.
      per_token: whether the reward rewards tokens.

    Raises:
      ValueError: the config needs what no file of rollouts holds.
    """
    if config.train.routing_replay:
        raise ValueError(
            "train.routing_replay = True: rollout files do not contain the experts that the sampler "
            "chose; set it to False, or train without --replay"
        )
    if topk:
        raise ValueError(
            f"objective.name = {config.objective.name!r}: it needs the logprobs of the most likely "
            "tokens, which rollout files do not contain; choose another, or train without --replay"
        )
    if per_token:
        raise ValueError(
            f"reward.path = {config.reward.path!r}: it rewards tokens, but rollout files contain the "
            "rewards of whole responses; choose another, or train without --replay"
        )
    fields, train = ("staleness", "dynamic_sampling", "partial_tokens"), config.train
    if idle := [f"train.{field} = {train[field]}" for field in fields if train[field]]:
        logging.warning("%s: without effect, because --replay samples nothing", ", ".join(idle))


def check_advantages(config: FrozenConfigDict, per_token: bool) -> None:
    """Checks that a config works with advantages from files; warns of fields without effect.

    Args:
      config: a resolved config.
      per_token: whether the advantages differ between the tokens of a response.

    Raises:
      ValueError: the config changes rewards or the baseline, but the files contain the advantages; or
        the objective needs one advantage for all tokens of a response.
    """
    objective, train = config.objective, config.train
    if per_token and OBJECTIVES[objective.name].fixed_aggregation:
        raise ValueError(
            f"objective.name = {objective.name!r}: it needs one advantage for all tokens of a response, "
            "but those in the rollout files differ; choose another objective, or change the column "
            "advantage"
        )
    for field, value, right in (
        ("objective.kl", objective.kl == "k1" and "k1", "another estimator or 'none'"),
        ("objective.baseline", objective.baseline == "otb" and "otb", "'group'"),
        ("train.shuffle_rewards", train.shuffle_rewards, "False"),
    ):
        if value:
            raise ValueError(
                f"{field} = {value!r}: it changes what advantages are computed from, but the rollout "
                f"files contain the advantages; set it to {right}, or remove the column advantage"
            )
    reward = config.reward
    terms = {"format": reward.format, "overlong_buffer": reward.overlong_buffer}
    if idle := [f"reward.{name} = {value}" for name, value in terms.items() if value]:
        logging.warning(
            "%s: without effect, because the rollout files contain the advantages", ", ".join(idle)
        )


def check_source(workdir: Path, replays: bool, begun: bool) -> None:
    """Checks that a run from files is resumed with --replay, and a run that samples without it.

    Args:
      workdir: directory of the run.
      replays: whether the command has --replay.
      begun: whether the run has a checkpoint.

    Raises:
      ValueError: the run began the other way.
    """
    recorded = (workdir / FILE).exists()
    if recorded and not replays:
        raise ValueError(f"{workdir}: this run learns from files ({FILE}); {FLAG} is missing")
    if begun and replays and not recorded:
        raise ValueError(f"{workdir}: this run samples; resume it without {FLAG}")


def _files(directory: Path) -> list[Path]:
    """Returns the rollout files in a directory, ordered by name."""
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: no such directory; {FLAG} takes a directory of rollout files"
        )
    paths = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    kinds = {path.suffix for path in paths}
    if not paths:
        inner = directory / "rollouts"
        hint = f"; did you mean {inner}?" if inner.is_dir() else ""
        raise ValueError(f"{directory}: there is no file *{' or *'.join(SUFFIXES)}{hint}")
    if len(kinds) > 1:
        raise ValueError(
            f"{directory}: it contains *{' and *'.join(sorted(kinds))}; keep one kind, so that no "
            "rollout is used twice"
        )
    return paths


@lru_cache(maxsize=2)  # A step may take groups from two files.
def _arrays(path: Path, digest: str, limits: Limits) -> Rollout:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path}: the file changed while the run was reading it; restore it")
    return padded_arrays(load_table(content, path, limits.samples), path, limits)
