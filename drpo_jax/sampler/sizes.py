"""Sizes of the sampler's programs: each is a compilation, so there are few."""

import jax

from drpo_jax.parallel import batch_shards

MOST_PROMPTS = 16  # prefilled together (a multiple of the devices, at least one on each)


def ring_sizes(longest, decode_steps):
    """Columns that the rings may have, each a compilation: multiples of `decode_steps` up to eight,
    then doubling, up to the `longest` sequence; each, beyond 64, a multiple of 16 (`block_columns`)."""

    def whole(n):
        return n if n <= 64 else -(-n // 16) * 16

    longest = whole(longest)
    sizes = [min(whole(decode_steps), longest)]
    while sizes[-1] < longest:
        grow = decode_steps if sizes[-1] < 8 * decode_steps else sizes[-1]
        sizes.append(min(whole(sizes[-1] + grow), longest))
    return sizes


def row_widths(limit, chunk):
    """Columns that a prompt's row may have, each a compilation: 1, 2, 4, … chunks, up to those that
    hold `limit` tokens."""
    chunk, widths = min(chunk, limit), []
    while not widths or widths[-1] < limit:
        widths.append(min(2 * widths[-1], -(-limit // chunk) * chunk) if widths else chunk)
    return widths


class Shape:
    """Sizes of the programs for prompts of up to `longest` tokens, of which `limit` could come.

    Attributes:
      chunk, width: tokens of a prompt's chunk; columns of its row, a multiple of it.
      together: prompts that are prefilled together.
      sizes: columns that the rings may have.
    """

    def __init__(self, sampler, params, limit, longest):
        self.chunk = min(sampler.prefill_chunk, limit)
        self.width = next(w for w in row_widths(limit, self.chunk) if w >= longest)
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else batch_shards(mesh)
        fill = min(-(-sampler.slots // params.samples), max(MOST_PROMPTS, shards))
        self.together = -(-fill // shards) * shards
        self.sizes = ring_sizes(limit + params.max_tokens, sampler.decode_steps)
