"""The shapes of the sampler's programs, few in number because each one is compiled separately."""

from typing import NamedTuple

import jax

from drpo_jax.parallel import batch_shards
from drpo_jax.sampler.token import SamplingParams

# Maximum rows prefilled together; larger meshes have one per device that shares the batch.
MOST_PROMPTS = 16


def ring_sizes(longest: int, decode_steps: int) -> list[int]:
    """Returns the numbers of columns that the rings may have, in ascending order.

    Sizes are multiples of `decode_steps` up to eight times `decode_steps`, then double, up to `longest`.
    Sizes above 64 are rounded up to multiples of 16 because of `models.cache.block_columns`, those above
    512 to multiples of 128 and those above 4,096 to multiples of 512 because of `copied_columns`.

    Args:
      longest: maximum tokens of a sequence, prompt and response.
      decode_steps: decode steps per device call.
    """

    def rounded(n: int) -> int:
        multiple = next(m for most, m in ((64, 1), (512, 16), (4096, 128), (n, 512)) if n <= most)
        return -(-n // multiple) * multiple

    longest = rounded(longest)
    sizes = [min(rounded(decode_steps), longest)]
    while sizes[-1] < longest:
        grow = decode_steps if sizes[-1] < 8 * decode_steps else sizes[-1]
        sizes.append(min(rounded(sizes[-1] + grow), longest))
    return sizes


def row_widths(limit: int, chunk: int) -> list[int]:
    """Returns the possible widths of a prefilled row, in ascending order.

    Widths are 1, 2, 4, … chunks, up to the number of chunks that holds `limit` tokens.

    Args:
      limit: maximum tokens of a row.
      chunk: tokens of a row that are prefilled at once.
    """
    chunk = min(chunk, limit)
    widths: list[int] = []
    while not widths or widths[-1] < limit:
        widths.append(min(2 * widths[-1], -(-limit // chunk) * chunk) if widths else chunk)
    return widths


class Rows(NamedTuple):
    """The shapes of the programs that prefill several rows of tokens together.

    Attributes:
      together: number of rows.
      chunk: tokens of a row that are prefilled at once.
      widths: the possible numbers of columns of a row, multiples of `chunk`, in ascending order.
    """

    together: int
    chunk: int
    widths: list[int]

    def width(self, longest: int) -> int:
        """Returns the smallest width that fits `longest` tokens."""
        return next(width for width in self.widths if width >= longest)


class Shape:
    """The shapes of the programs of one call of the sampler.

    Args:
      slots: slots of the sampler.
      decode_steps: decode steps per device call.
      prefill_chunk: tokens of a prompt that are prefilled at once.
      params: how the call samples.
      limit: maximum tokens of a prompt.

    Attributes:
      prompts: the rows of prompts, each of which serves all samples of its group.
      continued: the rows of continued responses: prompt and earlier tokens of one sample each.
      sizes: numbers of columns that the rings may have.
    """

    def __init__(
        self, slots: int, decode_steps: int, prefill_chunk: int, params: SamplingParams, limit: int
    ):
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else batch_shards(mesh)
        longest = limit + params.max_tokens

        def rows(sequences: int, tokens: int) -> Rows:
            fill = min(sequences, max(MOST_PROMPTS, shards))
            chunk = min(prefill_chunk, tokens)
            return Rows(-(-fill // shards) * shards, chunk, row_widths(tokens, chunk))

        self.prompts = rows(-(-slots // params.samples), limit)
        # Prefill itself samples the next token.
        self.continued = rows(slots, longest - 1)
        self.sizes = ring_sizes(longest, decode_steps)
