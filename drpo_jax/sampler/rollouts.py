"""What sampling leaves: responses, and what was recorded of every token.

Axis letters: N responses, P prompt tokens, R response tokens, K most likely tokens, L layers, k experts
per token.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Sampled responses; N = prompts · samples rows, the samples of a prompt next to each other.

    Attributes:
      tokens: int32 [N, P + R], prompt and response without a gap, zeros behind.
      prompt_lengths, response_lengths: int32 [N]; the stop token counts. Masks come from these, never
        from token ids.
      sampled_logp: float32 [N, R], logprob of each response token under the distribution it was drawn
        from: temperature, top-k and top-p applied. Equal to full_logp for greedy tokens and where
        nothing is filtered. Zeros behind the response. `logp` is another name for it.
      full_logp: float32 [N, R], logprob under the full softmax at the sampling temperature (1 for
        greedy tokens), before top-k and top-p. This is the default log µ of the objective.
      entropy: float32 [N, R], of the distribution that full_logp is of, in nats.
      finished: bool [N], the response ended with a stop token (and was not cut at max_tokens).
      top_ids, top_logp: int32 and float32 [N, R, K], the most likely tokens of the full
        distribution at each step, the sampled one among them, K = SamplingParams.top_logprobs.
      routes: int16 [N, P + R, L, k], the experts that each token visited in each layer; −1 where none
        did (the last token of a response, and behind it). k = 0 unless SamplingParams.routes.
      version: int32 [N], of the weights, see `Sampler.load`.
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

    def __len__(self):
        return len(self.tokens)

    @property
    def logp(self):
        """`sampled_logp`."""
        return self.sampled_logp

    @classmethod
    def concatenate(cls, parts):
        """The rows of several Rollouts of the same shapes as one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def mask(self):
        """bool [N, R]: the response tokens."""
        return np.arange(self.sampled_logp.shape[1]) < self.response_lengths[:, None]

    def finish_reasons(self):
        """ "stop" or "length" of every response."""
        return np.where(self.finished, "stop", "length")

    def response(self, row):
        """Token ids of one response, the stop token left out."""
        start = self.prompt_lengths[row]
        end = start + self.response_lengths[row] - self.finished[row]
        return self.tokens[row, start:end].tolist()

    def pieces(self, tokenizer):
        """(ids int32 [U], texts unicode [U]) of the distinct response tokens, ids ascending."""
        rows, columns = np.nonzero(self.mask())
        ids = np.unique(self.tokens[rows, self.prompt_lengths[rows] + columns])
        return ids, np.array([tokenizer.decode([i]) for i in ids], dtype=str)

    def texts(self, tokenizer):
        """The responses as text (derived: the token ids are the record)."""
        return [tokenizer.decode(self.response(row)) for row in range(len(self))]
