"""The problems that every source returns, and the interface of procedural sources."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and its answer.

    Attributes:
      prompt: the text of the problem, without an instruction or a chat template around it.
      answer: the answer that the reward compares a response with.
      kind: groups problems in tables of accuracy, for example the operation or the level; may be
        empty.
      id: unique within a data set.
      wrapped: the prompt with the instruction that comes with the problem; empty if there is none.
    """

    prompt: str
    answer: str
    kind: str
    id: str
    wrapped: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True)
class EncodedProblem(Problem):
    """A problem with the prompt that the model receives.

    Attributes:
      token_ids: ids of the whole prompt: instruction and chat template included.
    """

    token_ids: tuple[int, ...] = dataclasses.field(repr=False, kw_only=True)

    @classmethod
    def of(cls, problem: Problem, token_ids: list[int]) -> "EncodedProblem":
        """Returns `problem` with the token ids of its prompt."""
        fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)}
        return cls(**fields, token_ids=tuple(token_ids))


class ProceduralTask(Protocol):
    """A source of problems that are drawn from a seed."""

    def sample(self, seed: int, index: int, count: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems of a split, as a pure function of its arguments.

        Any index can be sampled without the earlier ones, and the problems of a smaller count are
        the first ones of a larger count. Held-out problems are distinct within a call, because they
        form an evaluation set. Training problems are independent draws.

        Args:
          seed, index: non-negative integers, for example the seed of the run and the rollout step.
          count: number of problems.
          split: "train" or "heldout". No problem is in both, whatever the seed, the index or the
            settings.

        Raises:
          ValueError: a wrong argument, or the held-out split has fewer than `count` problems.
        """
        ...
