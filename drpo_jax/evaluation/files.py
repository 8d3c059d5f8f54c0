"""The directory of an evaluation: its settings, the responses so far, its results."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.errors import BadInput
from drpo_jax.evaluation.accuracy import ProblemResult, estimates
from drpo_jax.evaluation.response import Response
from drpo_jax.evaluation.tables import problem_table
from drpo_jax.parallel import multihost
from drpo_jax.problems import encode
from drpo_jax.run import Run
from drpo_jax.storage import Lines


def evaluation_settings(run: Run, checkpoint: str, step: int) -> dict[str, Any]:
    """Returns everything that determines the responses. Other settings make another evaluation."""
    config = run.config
    return {
        "checkpoint": checkpoint,
        "step": step,
        "sets": config.evaluate.sets or "held out",
        "k": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "greedy": config.evaluate.greedy,
        "max_response_length": config.sampler.max_response_length,
        "reward": config.reward.name,
        "seed": config.seed,
        "prompts": _prompts_hash(run),
    } | _precision(config)


def _precision(config: FrozenConfigDict) -> dict[str, Any]:
    """Returns the section precision if evaluations use it. For "exact", older files match, too."""
    if config.evaluate.precision == "exact":
        return {}
    return {"precision": config.precision.to_dict()}


def _prompts_hash(run: Run) -> str:
    """A hash of the problems: ids, answers, prompts as token ids, and the stop tokens."""
    prompts = encode(run.config, run.tokenizer, run.heldout)
    problems = [[p.id, p.answer, ids] for p, ids in zip(run.heldout, prompts)]
    text = json.dumps([problems, run.tokenizer.stop_ids])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_name(settings: Mapping[str, Any]) -> str:
    """Returns a name unique to the settings, such as step_000300-aime24_aime25-1a2b3c4d."""
    sets = re.sub(r"[^a-zA-Z0-9]+", "_", settings["sets"])[-40:].strip("_")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"step_{settings['step']:06d}-{sets}-{digest}"


def shard_places(shard: str, problems: int) -> range:
    """Returns the indices of the problems that a shard "i/n" evaluates.

    Raises:
      BadInput: `shard` is not of this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise BadInput(f"--shard={shard}: must be a part and the number of parts, such as 1/4")
    return range((i - 1) * problems // n, i * problems // n)


def _complete_groups(file, settings):
    """Returns {(mode, problem id): responses} of a file, without problems that lack responses."""
    samples = {"avg": settings["k"], "greedy": 1}
    groups: dict[tuple[str, str], list[Response]] = {}
    # The last line may be cut off.
    for line in file.read_text().split("\n")[:-1] if file.exists() else ():
        response = Response(**json.loads(line))
        groups.setdefault((response.mode, response.id), []).append(response)
    return {key: group for key, group in groups.items() if len(group) == samples[key[0]]}


def _to_lines(responses):
    """The lines of responses.jsonl."""
    return "".join(json.dumps(response._asdict()) + "\n" for response in responses)


class ResponseFile:
    """The responses of an evaluation on disk, from which an interrupted one resumes.

    With several processes, the first reads and writes; the others receive the responses from it.

    Args:
      folder: directory of the evaluation.
      shard: "i/n", the part of the problems that is evaluated and has its own file; "": all.
      settings: `evaluation_settings`.

    Attributes:
      responses: the responses so far, of this evaluation and of its shards.
    """

    def __init__(self, folder: Path, shard: str, settings: Mapping[str, Any]):
        suffix = "-" + shard.replace("/", "-of-") if shard else ""
        path, text, self._lines = folder / f"responses{suffix}.jsonl", "", None
        if multihost.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            own = _complete_groups(path, settings)
            groups = dict(own)
            for file in set(folder.glob("responses*.jsonl")) - {path}:
                groups |= _complete_groups(file, settings)
            self._lines = Lines(path, _to_lines(itertools.chain.from_iterable(own.values())))
            text = _to_lines(itertools.chain.from_iterable(groups.values()))
        code = np.frombuffer(text.encode(), np.uint8)
        text = multihost.gather("responses so far", text=code)[0]["text"].tobytes().decode()
        self.responses = [Response(**json.loads(line)) for line in text.splitlines()]

    def add(self, new: Sequence[Response]) -> None:
        """Appends the responses to one problem."""
        self.responses += new
        if self._lines:
            self._lines.write(_to_lines(new))

    def __enter__(self) -> "ResponseFile":
        return self

    def __exit__(self, *_) -> None:
        if self._lines:
            self._lines.close()


def write_results(
    workdir: Path,
    folder: Path,
    settings: Mapping[str, Any],
    responses: Sequence[Response],
    problems: Sequence[ProblemResult],
) -> dict[str, Any]:
    """Writes evaluate.json, result.json and problems.tsv.

    Args:
      responses: all responses of the evaluation.
      problems: the responses grouped by `accuracy.by_problem`.

    Returns:
      The contents of evaluate.json.
    """
    result = dict(settings) | {
        "mean_tokens": float(np.mean([response.tokens for response in responses])),
        "cut_off": float(np.mean([not response.finished for response in responses])),
        "accuracy": estimates(problems),
    }
    text = json.dumps(result, indent=2) + "\n"
    (workdir / "evaluate.json").write_text(text)
    (folder / "result.json").write_text(text)
    (folder / "problems.tsv").write_text(problem_table(problems))
    return result
