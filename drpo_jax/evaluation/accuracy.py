"""From responses to accuracy, by problem and by kind of problem."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from drpo_jax.evaluation.response import Response
from drpo_jax.evaluation.statistics import bootstrap_interval, majority, pass_at_k


def by_kind(items: Sequence[Any]) -> dict[str, list[Any]]:
    """Groups responses or problems by their `kind`.

    Returns:
      {"all": all of them}, followed by the kinds in order if there are several.
    """
    kinds = sorted({item.kind for item in items})
    groups = {kind: [item for item in items if item.kind == kind] for kind in kinds}
    return {"all": list(items)} | (groups if len(kinds) > 1 else {})


def eval_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """Returns the metrics that a run logs for an evaluation.

    Returns:
      eval/avg and eval/greedy, the mean reward in that mode, also as eval/MODE/KIND where there are
      several kinds of problems; eval/length in tokens and eval/truncated, the share that was cut off
      at the limit, both over the avg responses.
    """
    metrics = {}
    for mode in sorted({response.mode for response in responses}):
        in_mode = [response for response in responses if response.mode == mode]
        for kind, group in by_kind(in_mode).items():
            name = f"eval/{mode}" if kind == "all" else f"eval/{mode}/{kind}"
            metrics[name] = np.mean([response.reward for response in group])
        if mode == "avg":
            metrics["eval/length"] = np.mean([response.tokens for response in in_mode])
            metrics["eval/truncated"] = np.mean([not response.finished for response in in_mode])
    return {name: float(value) for name, value in metrics.items()}


@dataclasses.dataclass
class ProblemResult:
    """The responses to one problem.

    Attributes:
      id, kind, answer: ID, kind and right answer of the problem.
      avg, greedy: (extracted answer, reward) per response in that mode.
      tokens, cut: length of each response, and whether it was cut off at the limit.
    """

    id: str
    kind: str
    answer: str
    avg: list[tuple[Any, float]] = dataclasses.field(default_factory=list)
    greedy: list[tuple[Any, float]] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    cut: list[bool] = dataclasses.field(default_factory=list)


def by_problem(
    responses: Iterable[Response], extract: Callable[[str], str | None]
) -> list[ProblemResult]:
    """Groups responses by problem, in the order in which the problems first appear.

    Args:
      responses: from `heldout.sample_heldout`.
      extract: returns the answer in a response, None if it contains none.
    """
    problems: dict[str, ProblemResult] = {}
    for response in responses:
        fresh = ProblemResult(response.id, response.kind, response.answer)
        problem = problems.setdefault(response.id, fresh)
        votes = problem.avg if response.mode == "avg" else problem.greedy
        votes.append((extract(response.response), response.reward))
        problem.tokens.append(response.tokens)
        problem.cut.append(not response.finished)
    return list(problems.values())


def estimates(problems: Sequence[ProblemResult]) -> dict[str, dict[str, Any]]:
    """Returns the `accuracy` of evaluate.json.

    Returns:
      For "all" and for every kind of problem: the number of `problems`, and by metric (avg@k, pass@j
      for j = 2, 4, … and k, maj@k, greedy) {"mean", "low", "high"}, shares with the 95 % bootstrap
      interval.
    """
    return {
        kind: {"problems": len(group)} | _estimates(group)
        for kind, group in by_kind(problems).items()
    }


def _estimates(problems):
    right_NxK = np.array([[reward for _, reward in problem.avg] for problem in problems])
    k = right_NxK.shape[1]
    values = {f"avg@{k}": right_NxK.mean(1)}
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    values |= {f"pass@{j}": pass_at_k(right_NxK, j) for j in sizes if j > 1}
    values[f"maj@{k}"] = [majority(*zip(*problem.avg)) for problem in problems]
    if problems[0].greedy:
        values["greedy"] = [problem.greedy[0][1] for problem in problems]
    intervals = {name: bootstrap_interval(v) for name, v in values.items()}
    return {
        name: {"mean": float(np.mean(v)), "low": intervals[name][0], "high": intervals[name][1]}
        for name, v in values.items()
    }
