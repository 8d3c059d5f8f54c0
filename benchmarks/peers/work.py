"""The work of the benchmark: shapes, the files of a shape, and the reward. Imports NumPy alone.

Every contender reads the same files, which `prepare` writes:

    model/            weights in float32, config.json and a tokenizer, as `transformers` loads them
    problems.jsonl    {"prompt": "w3 w81 …", "answer": "64"} per line; the answer is R
    batch.npz         the arrays of an update, see `Batch`

Axis letters: N sequences, P prompt tokens, R response tokens.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VOCABULARY = 128
PROBLEMS = 64

# The optimizer of every contender. The learning rate is so high that the second loss shows whether the
# first update was the same.
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0
EPSILON = 0.2  # PPO's clip, which GRPO uses.


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batches.

    Attributes:
      hidden_size, layers, heads, kv_heads, head_dim: sizes of a Qwen3 model.
      mlp_size: inner width of the MLP; 0 in a mixture.
      experts, experts_per_token, expert_size: sizes of a mixture.
      prompts: prompts of a batch.
      samples: responses to each prompt.
      prompt: P, tokens of every prompt.
      response: R, tokens of every response.
      micro_batches: the numbers of sequences per forward and backward pass that are tried.
    """

    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp_size: int = 768
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    prompts: int = 16
    samples: int = 8
    prompt: int = 16
    response: int = 64
    micro_batches: tuple[int, ...] = (8, 32, 128)

    @property
    def sequences(self) -> int:
        """N, sequences of a batch."""
        return self.prompts * self.samples

    @property
    def model(self) -> dict[str, int]:
        """The fields of the config section `model`."""
        names = [field.name for field in dataclasses.fields(self)]
        sizes = names[: names.index("prompts")]
        return {name: getattr(self, name) for name in sizes} | {"vocab_size": VOCABULARY}

    def tokens(self, work: str) -> int:
        """Returns the tokens of one piece of work: prompt and response in an update, else response."""
        return self.sequences * (self.response + (self.prompt if work == "update" else 0))


SHAPES = {
    "dense": Shape(),
    "mixture": Shape(
        hidden_size=288, mlp_size=0, experts=32, experts_per_token=4, expert_size=64
    ),
    "long": Shape(prompts=8, samples=4, prompt=256, response=256, micro_batches=(4, 8, 32)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batch:
    """The given tokens of an update.

    Attributes:
      tokens: int64 [N, P + R].
      old_logp: float32 [N, R], log µ: the model's own logprobs, disturbed, so that ratios differ from 1.
      advantage: float32 [N].
    """

    tokens: np.ndarray
    old_logp: np.ndarray
    advantage: np.ndarray

    @classmethod
    def load(cls, directory: Path) -> "Batch":
        """Reads `batch.npz` of a shape."""
        with np.load(directory / "batch.npz") as arrays:
            return cls(**arrays)


def read_prompts(directory: Path) -> list[str]:
    """Returns the prompts in `problems.jsonl`."""
    lines = (directory / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def word(token: int) -> str:
    """Returns the text of a token: one word each."""
    return f"w{token}"


def token_ids(text: str) -> list[int]:
    """Returns the tokens of a text of words."""
    return [int(w.removeprefix("w")) for w in text.split()]


LOWER_HALF = frozenset(map(word, range(VOCABULARY // 2)))


def reward(response: str, length: int) -> float:
    """Returns how many words of a response belong to the lower half of the vocabulary, per token.

    Args:
      response: the text of the response.
      length: its length in tokens.
    """
    return sum(text in LOWER_HALF for text in response.split()) / length


def judge(prompt: str, response: str, answer: str) -> float:
    """`reward` in the form of `reward.path`; the answer of a problem is the length of its responses."""
    return reward(response, int(answer))


class Rewards:
    """Computes rewards, and keeps what a step is checked by.

    Args:
      length: tokens of every response.
    """

    def __init__(self, length: int) -> None:
        self._length, self._tokens = length, 0
        self._values: list[float] = []

    def __call__(self, responses: Sequence[str]) -> list[float]:
        """Returns the rewards of responses."""
        values = [reward(response, self._length) for response in responses]
        self._values += values
        self._tokens += sum(len(response.split()) for response in responses)
        return values

    def read(self) -> dict[str, float]:
        """Returns the sampled tokens and the mean reward since the last call."""
        result = {"tokens": self._tokens, "reward": float(np.mean(self._values))}
        self._tokens, self._values = 0, []
        return result
