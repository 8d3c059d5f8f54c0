"""The batches of a run: their shapes, and how sequences are laid out and placed on the mesh."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drpo_jax.config import has_warm_start
from drpo_jax.learner import PARTS, Batch, Layout, lay_out, lay_out_by_tokens, make_batch
from drpo_jax.parallel import batch_shards, named_sharding
from drpo_jax.sampler import Rollouts


class Batches:
    """Shapes and layout of the batches of a run.

    Rows are rounded up to a width that the mesh divides (`row_width`).

    Axis letters: N sequences of a batch, P rows that hold them, T tokens of a row, R response tokens,
    L layers, k experts per token.

    Attributes:
      config, mesh: what the batches are built from.
      sequences_per_update: N of a policy update.
      update_shape: (P, T) of a policy update with `sequences_per_update` sequences.
      micro_batch: rows of a micro-batch of a policy update.
      updates_per_epoch: mini-batches of a rollout.
      supervised_width: maximum tokens of an example of supervised learning.

    Args:
      config: a resolved config.
      mesh: from `parallel.make_mesh`.

    Raises:
      ValueError: the mesh does not divide a batch.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        train, sampler, shards = config.train, config.sampler, batch_shards(mesh)
        self.sequences_per_update = train.mini_batch_prompts * train.samples
        self.updates_per_epoch = train.prompts // train.mini_batch_prompts
        width = sampler.max_prompt_length + sampler.max_response_length
        self.supervised_width = config.sft.max_length or width
        self.micro_batch = train.micro_batch
        if has_warm_start(config):
            self._check_batch("sft.micro_batch")
        if not train.micro_tokens:
            self._check_batch("train.micro_batch")
            self.update_shape = self.sequences_per_update, self.row_width(width)
            return
        width = self.row_width(width, PARTS[-1])
        if train.micro_tokens < shards * width:
            raise ValueError(
                f"train.micro_tokens = {train.micro_tokens} is too small: each of the {shards} devices "
                f"over which the mesh {dict(mesh.shape)} splits a batch (data · fsdp · expert) "
                f"needs a row of {width} tokens (prompt and response, rounded up to a multiple of "
                f"{self.row_width(1, PARTS[-1])}). Set at least {shards * width}, or 0 with "
                "train.micro_batch"
            )
        largest = min(train.micro_tokens // width, self.sequences_per_update + shards - 1)
        self.micro_batch = largest // shards * shards
        micro_batches = -(-self.sequences_per_update // self.micro_batch)
        self.update_shape = micro_batches * self.micro_batch, width

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of a policy update."""
        return self.update_shape[0] // self.micro_batch

    def row_width(self, tokens: int, parts: int = 1) -> int:
        """Returns the columns T of rows that hold `tokens`: a multiple of parts · `mesh.sequence`."""
        multiple = parts * self.mesh.shape["sequence"]
        return -(-tokens // multiple) * multiple

    def layout(
        self,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        pack: bool = True,
        width: int | None = None,
    ) -> Layout:
        """Returns the layout of N sequences in a batch.

        Args:
          prompt_lengths, response_lengths: int [N], tokens.
          pack: see `batch`.
          width: tokens that a row must hold, unless train.micro_tokens packs the rows; default: those of
            a policy update.
        """
        train, micro_batches = self.config.train, self.micro_batches
        lengths = prompt_lengths, response_lengths
        if pack and train.micro_tokens:
            return lay_out_by_tokens(*lengths, self.update_shape, micro_batches)
        width = self.row_width(width or self.update_shape[1])
        return lay_out(*lengths, width, pack and train.pack, micro_batches)

    def batch(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        inputs: Mapping[str, np.ndarray],
        pack: bool = False,
        routes: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> tuple[Batch, Layout]:
        """Returns N sequences as a Batch on the mesh, split by rows and columns.

        Args:
          tokens: int32 [N, T], prompt and response without a gap.
          prompt_lengths, response_lengths: int32 [N], tokens.
          inputs: name → [N] or [N, R, …], see `learner.Batch`.
          pack: lay out the sequences as in policy updates: by `train.micro_tokens` if it is set, or
            several per row if `train.pack` is set.
          routes: int16 [N, T, L, k], see `learner.Batch`.
          loss_mask: bool [N, R], the response tokens that carry a loss; None: all of them.

        Returns:
          The Batch, and the Layout that maps its rows back to sequences.
        """
        layout = self.layout(prompt_lengths, response_lengths, pack, tokens.shape[1])
        return self._on_mesh(make_batch(layout, tokens, inputs, routes, loss_mask)), layout

    def supervised_batch(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        loss_mask: np.ndarray | None = None,
    ) -> Batch:
        """Returns N = sft.batch examples as a Batch on the mesh, packed if `sft.pack` is set.

        Args:
          tokens: int32 [N, supervised_width], prompt and response without a gap.
          prompt_lengths, response_lengths: int32 [N], tokens; 1 and 0 for rows without an example.
          loss_mask: bool [N, R], the response tokens that carry a loss; None: all of them.
        """
        sft = self.config.sft
        layout = lay_out(
            prompt_lengths,
            response_lengths,
            width=self.row_width(tokens.shape[1]),
            pack=sft.pack,
            micro_batches=sft.batch // sft.micro_batch,
        )
        return self._on_mesh(make_batch(layout, tokens, {}, loss_mask=loss_mask))

    def rollout_batch(
        self,
        rollouts: Rollouts,
        rows: np.ndarray,
        inputs: Mapping[str, np.ndarray],
        replay: bool = True,
        loss_mask: np.ndarray | None = None,
    ) -> tuple[Batch, Layout]:
        """Returns `batch` for some rows of a rollout.

        Args:
          rollouts: all N sequences.
          rows: int [n], the sequences to take.
          inputs: name → [N] or [N, R, …], for all sequences.
          replay: include the sampler's routes if `train.routing_replay` is set.
          loss_mask: bool [N, R], the tokens that carry a loss, for all sequences; None: the tokens that
            the model sampled.
        """
        loss_mask = rollouts.mask() if loss_mask is None else loss_mask
        replay = replay and self.config.train.routing_replay
        return self.batch(
            rollouts.tokens[rows],
            rollouts.prompt_lengths[rows],
            rollouts.response_lengths[rows],
            {name: values[rows] for name, values in inputs.items()},
            pack=True,
            routes=rollouts.routes[rows] if replay else None,
            loss_mask=loss_mask[rows],
        )

    def _on_mesh(self, batch: Batch) -> Batch:
        """Places a batch of NumPy arrays; every process places the parts that its own devices hold."""
        parts = named_sharding(self.mesh, ("batch", "length"))
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, parts, a.__getitem__), batch
        )

    def _check_batch(self, field):
        section, name = field.split(".")
        size, shards = self.config[section][name], batch_shards(self.mesh)
        if size % shards:
            raise ValueError(
                f"{field} = {size} is not a multiple of the {shards} devices over which the mesh "
                f"{dict(self.mesh.shape)} splits a batch (data · fsdp · expert)"
            )
