"""The result of sampling: responses, and what was recorded for every token.

Axis letters: N responses, P prompt tokens, R response tokens, K most likely tokens, L layers, k experts
per token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Decoder(Protocol):
    """The part of a tokenizer that turns token ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Rollouts:
    """Sampled responses. The N = prompts · samples rows are ordered by prompt, then by sample.

    Attributes:
      tokens: int32 [N, P + R], prompt and response without a gap between them, then zeros.
      prompt_lengths, response_lengths: int32 [N], in tokens. A response's length includes its stop
        token. Masks follow from lengths and versions, never from token ids.
      sampled_logp: float32 [N, R], logprob of each response token under the distribution it was drawn
        from, with temperature, top-k and top-p applied. It equals full_logp for greedy tokens and
        without filters. Zero after the response. `logp` is an alias.
      full_logp: float32 [N, R], logprob under the full softmax at the sampling temperature (1 for
        greedy tokens), before top-k and top-p. This is the default log µ of the objective.
      entropy: float32 [N, R], entropy in nats of the distribution of full_logp.
      finished: bool [N], whether the response ended with a stop token rather than at its limit.
      top_ids, top_logp: int32 and float32 [N, R, K], ids and full_logp of the K most likely tokens at
        each step, with K = SamplingParams.top_logprobs. The sampled token is always among them.
      routes: int16 [N, P + R, L, k], the experts that each token visited in each layer; −1 where the
        model did not read the token (the last token of a response, and padding). k = 0 unless
        SamplingParams.routes.
      version: int32 [N, R], version of the weights that sampled each token, see `Sampler.load`; −1
        where the model sampled nothing: after the response, and at tokens that an environment inserted.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    sampled_logp: np.ndarray
    full_logp: np.ndarray
    entropy: np.ndarray
    finished: np.ndarray
    top_ids: np.ndarray
    top_logp: np.ndarray
    routes: np.ndarray
    version: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        """For example: Rollouts(16 responses to 2 prompts, 9.3 tokens on average, 14 finished)."""
        if not len(self):
            return "Rollouts(no responses)"
        prompts = {
            tuple(row[:length]) for row, length in zip(self.tokens, self.prompt_lengths.tolist())
        }
        return (
            f"Rollouts({_count(len(self), 'response')} to {_count(len(prompts), 'prompt')}, "
            f"{self.response_lengths.mean():.1f} tokens on average, {self.finished.sum()} finished)"
        )

    @property
    def logp(self) -> np.ndarray:
        """Alias of `sampled_logp`."""
        return self.sampled_logp

    @classmethod
    def concatenate(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """Returns the rows of several Rollouts, whose arrays must have equal trailing shapes."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def mask(self) -> np.ndarray:
        """Returns bool [N, R], True for the response tokens that the model sampled."""
        return self._inside() & (self.version >= 0)

    def append(self, inserted: Sequence[Sequence[int]]) -> "Rollouts":
        """Returns the responses with appended tokens that the model did not sample.

        The model reads these tokens when the responses are continued (argument `begun` of
        `Sampler.stream`). Their version is −1, so they are not part of `mask` and carry no loss.

        Args:
          inserted: token ids for each of the N responses, such as the output of a tool. [] leaves a
            response unchanged; any other response is no longer finished.

        Raises:
          ValueError: a response would exceed R tokens; the message names it.
        """
        result = dataclasses.replace(
            self,
            tokens=self.tokens.copy(),
            response_lengths=self.response_lengths.copy(),
            finished=self.finished.copy(),
        )
        room = self.sampled_logp.shape[1]
        for row, ids in enumerate(inserted):
            start, end = self.response_lengths[row], self.response_lengths[row] + len(ids)
            if end > room:
                raise ValueError(
                    f"response {row} has {start} tokens, and {len(ids)} more exceed max_tokens = {room}"
                )
            prompt = self.prompt_lengths[row]
            result.tokens[row, prompt + start : prompt + end] = ids
            result.response_lengths[row] = end
            result.finished[row] &= not len(ids)
        return result

    def finish_reasons(self) -> np.ndarray:
        """Returns str [N]: "stop" for a response that ended with a stop token, "length" for others."""
        return np.where(self.finished, "stop", "length")

    def response(self, row: int) -> list[int]:
        """Returns the token ids of one response, without its stop token."""
        start = self.prompt_lengths[row]
        end = start + self.response_lengths[row] - self.finished[row]
        return self.tokens[row, start:end].tolist()

    def pieces(self, tokenizer: Decoder) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distinct response tokens: ids, int32 [U], ascending, and texts, str [U]."""
        rows, columns = np.nonzero(self._inside())
        ids = np.unique(self.tokens[rows, self.prompt_lengths[rows] + columns])
        return ids, np.array([tokenizer.decode([i]) for i in ids], dtype=str)

    def texts(self, tokenizer: Decoder) -> list[str]:
        """Returns the N responses as text, without stop tokens."""
        return [tokenizer.decode(self.response(row)) for row in range(len(self))]

    def _inside(self) -> np.ndarray:
        """Returns bool [N, R], True for response tokens, sampled or inserted."""
        return np.arange(self.version.shape[1]) < self.response_lengths[:, None]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
