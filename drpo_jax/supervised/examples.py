"""Examples as token ids: the training examples in order, and the held-out ones."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from drpo_jax import data
from drpo_jax.errors import BadInput
from drpo_jax.storage import write_whole
from drpo_jax.supervised.files import Chat, Pair, read_texts
from drpo_jax.supervised.rollouts import right_responses

FACTS = "examples.json"  # In the warm start's directory.


class Example(NamedTuple):
    """A prompt and the response to learn.

    Attributes:
      prompt, response: int32 token ids; the response includes the token that ends it.
      learned: bool per token of the response, whether it carries a loss; None: all do.
    """

    prompt: np.ndarray
    response: np.ndarray
    learned: np.ndarray | None = None

    @classmethod
    def of(
        cls, prompt: Sequence[int], response: Sequence[int], learned: Sequence[bool] = ()
    ) -> "Example":
        """Returns an example from token ids; without `learned`, all response tokens carry a loss."""
        mask = None if all(learned) else np.array(learned, bool)
        return cls(np.array(prompt, np.int32), np.array(response, np.int32), mask)


@dataclass(frozen=True)
class Examples:
    """The examples of a supervised run.

    Attributes:
      train: the examples to learn from.
      heldout: the examples on which the held-out loss is measured.
      counts: number of examples, and numbers of dropped examples, by name of the reason.
      seed: determines the order of every epoch.
      size: examples per update.
      updates: number of updates.
      epochs: number of passes over `train`; 0: only `updates` bounds the passes.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    counts: dict[str, int]
    seed: int
    size: int
    updates: int
    epochs: int

    def batch(self, update: int) -> list[Example]:
        """Returns the `size` examples of update 0, 1, 2, …; the last update may have fewer.

        Batches may span epochs, each of which has its own order.
        """
        length, first = len(self.train), update * self.size
        last = first + self.size
        if self.epochs:
            last = min(last, self.epochs * length)
        epochs = range(first // length, (last - 1) // length + 1)
        order = {epoch: data.epoch_order(self.seed, epoch, length) for epoch in epochs}
        places = (divmod(position, length) for position in range(first, last))
        return [self.train[order[epoch][place]] for epoch, place in places]

    def report(self) -> str:
        """Describes the examples in one line."""
        read, *dropped = self.counts.items()
        losses = ", ".join(f"{count:,} {name}" for name, count in dropped if count)
        epochs = self.updates * self.size / len(self.train)
        return (
            f"{read[1]:,} {read[0]}"
            + (f" (dropped: {losses})" if losses else "")
            + f": {len(self.train):,} to learn from, {len(self.heldout):,} held out; "
            + f"{self.updates:,} updates of {self.size}, {epochs:.3g} epochs"
        )

    def claim(self, directory: Path) -> None:
        """Writes `examples.json` into the directory of the warm start, unless it is already there.

        Raises:
          BadInput: the warm start in the directory began with different examples.
        """
        digest = self.digest()
        facts = {"updates": self.updates, "hash": digest, "counts": self.counts}
        path = directory / FACTS
        if path.exists() and json.loads(path.read_text())["hash"] != digest:
            raise BadInput(
                f"the examples differ from those that the warm start began with ({path}): restore "
                "the files, or choose another --workdir"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts, indent=2) + "\n")

    def digest(self) -> str:
        """Returns the first 16 hexadecimal digits of a SHA-256 of all examples."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            digest.update(f"{len(part)}".encode())
            for prompt, response, learned in part:
                digest.update(f"{len(prompt)} {len(response)} {learned is not None}".encode())
                for array in (prompt, response, *([] if learned is None else [learned])):
                    digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def recorded_updates(directory: Path) -> int | None:
    """Returns the number of updates of the warm start in a directory; None with demonstrations."""
    path = directory / FACTS
    return json.loads(path.read_text())["updates"] if path.exists() else None


def load(config: ConfigDict, tokenizer: Any) -> Examples | None:
    """Returns the examples that the section `sft` names; None if it names none.

    Raises:
      ValueError: a file is malformed (the message has file, line and field), or no example remains.
      OSError: a file cannot be read.
    """
    sft = config.sft
    if not (sft.files or sft.rollouts):
        return None
    if sft.rollouts:
        sampled, counts = right_responses(config, tokenizer)
        source, examples = sft.rollouts, [Example.of(*row) for row in sampled]
    else:
        source = sft.files
        examples = list(_encoded(config, tokenizer, sft.files, "sft.files"))
        counts = {"examples": len(examples)}
    examples, counts["too long"] = _short_enough(config, examples, source)
    train, heldout = _split(config, examples)
    if sft.heldout_files:
        heldout = list(_encoded(config, tokenizer, sft.heldout_files, "sft.heldout_files"))
        heldout, counts["too long, held out"] = _short_enough(config, heldout, sft.heldout_files)
    updates = sft.steps or math.ceil(sft.epochs * len(train) / sft.batch)
    return Examples(train, heldout, counts, config.seed, sft.batch, updates, sft.epochs)


def _encoded(config, tokenizer, path, field) -> Iterator[Example]:
    """Yields the examples in the rows of the file that the config's `field` names."""
    try:
        for text in read_texts(path):
            try:
                yield from _of_text(config, tokenizer, text)
            except ValueError as error:
                raise ValueError(f"{text.where}: {error}") from None
    except FileNotFoundError as error:
        raise ValueError(f"{field} = {path!r}: there is no such file") from error


def _of_text(config, tokenizer, text: Pair | Chat) -> Iterator[Example]:
    """Yields the example of a pair, or one example for each selected assistant turn of a chat."""
    if isinstance(text, Pair):
        problem = data.Problem(text.prompt, "", "", "")
        prompt = data.with_instruction(problem, config.data.instruction).prompt
        if config.data.chat:
            ids, response = tokenizer.turn([{"role": "user", "content": prompt}], text.response)
        else:
            ids, response = tokenizer.prompt(prompt), tokenizer.response(text.response)
        yield Example.of(ids, response)
        return
    if not config.data.chat:
        raise ValueError(
            "the line is a chat, which needs a tokenizer with a chat template: set data.chat = True, "
            "and model.path or data.tokenizer"
        )
    turns = [i for i, m in enumerate(text.messages) if m["role"] == "assistant"]
    for i in turns if config.sft.turns == "all" else turns[-1:]:
        yield Example.of(*tokenizer.turn(text.messages[:i], text.messages[i]["content"]))


def _short_enough(config, examples: Sequence[Example], source) -> tuple[list[Example], int]:
    """Returns the examples that fit into a row, and the number of those that do not fit.

    Raises:
      ValueError: none fits.
    """
    limit = config.sft.max_length or (
        config.sampler.max_prompt_length + config.sampler.max_response_length
    )
    kept = [example for example in examples if len(example.prompt) + len(example.response) <= limit]
    if not kept:
        shortest = min(len(example.prompt) + len(example.response) for example in examples)
        raise ValueError(
            f"{source}: all {len(examples):,} examples are longer than {limit:,} tokens, the shortest "
            f"has {shortest:,}; raise sft.max_length (0: sampler.max_prompt_length + "
            "sampler.max_response_length)"
        )
    return kept, len(examples) - len(kept)


def _split(config, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Splits off the fraction `sft.heldout`; examples with the same prompt stay together.

    A hash of seed and prompt decides, so the side of an example does not depend on other examples.

    Raises:
      ValueError: one of the two parts is empty.
    """
    share = config.sft.heldout
    sides: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        text = f"{config.seed} ".encode() + example.prompt.tobytes()
        digest = hashlib.sha256(text).digest()
        sides[int.from_bytes(digest[:8]) < share * 2**64].append(example)
    if not sides[0] or (share and not sides[1]):
        side = "learns from" if not sides[0] else "holds out"
        raise ValueError(
            f"sft.heldout = {share:g} of {len(examples):,} examples {side} none of them; choose "
            "another fraction, or set sft.heldout_files"
        )
    return sides
