"""One response to a held-out problem."""

from typing import NamedTuple


class Response(NamedTuple):
    """One response to a held-out problem; its fields are those of responses.jsonl.

    Attributes:
      id, kind: ID and kind of the problem.
      mode: "avg", sampled at evaluate.temperature, or "greedy".
      prompt, response, answer: text.
      reward: the verifier's verdict.
      tokens: length of the response, the stop token included.
      finished: whether the response ended with a stop token rather than at the limit.
    """

    id: str
    kind: str
    mode: str
    prompt: str
    response: str
    answer: str
    reward: float
    tokens: int
    finished: bool
