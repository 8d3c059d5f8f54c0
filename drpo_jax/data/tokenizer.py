"""Tokenizers: single characters for the arithmetic task, and the tokenizers of Hugging Face directories.

Both have the same interface: `encode`, `prompt`, `decode`, `piece`, `stop_ids`, `eos_id` and
`vocab_size`. Runs record token ids; text is derived from them.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drpo_jax.hub import TEXT_FILES, local_directory

_CHARACTERS = "0123456789+-*/= #().,;:?<>[]x\n"


class CharTokenizer:
    """A fixed vocabulary of 32 tokens: padding, end of sequence and 30 characters.

    The size of the vocabulary is a power of two, so that the usual meshes divide it.

    Attributes:
      pad_id, eos_id: ids of padding and of the end of sequence.
      stop_ids: the ids that end a response.
      vocab_size: number of tokens.
    """

    pad_id = 0
    eos_id = 1
    stop_ids = (eos_id,)
    vocab_size = 2 + len(_CHARACTERS)

    def __init__(self):
        self._texts = ("", "", *_CHARACTERS)
        self._ids = {c: i for i, c in enumerate(_CHARACTERS, start=2)}

    def __repr__(self):
        return "CharTokenizer()"

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without special tokens.

        Raises:
          ValueError: a character is not in the vocabulary; names the first one and its position.
        """
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            position = next(i for i, c in enumerate(text) if c not in self._ids)
            raise ValueError(
                f"character {ascii(text[position])} at position {position} is not in the "
                f"vocabulary of the character tokenizer, which consists of {_CHARACTERS!r}"
            ) from None

    def prompt(self, problem: str) -> list[int]:
        """Returns the token ids of the prompt for a problem, which is its text."""
        return self.encode(problem)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens.

        Ids after an end of sequence are decoded as well. Ids outside the vocabulary become
        replacement characters: the embedding of a model may have more rows than the vocabulary has
        tokens.
        """
        known = range(self.vocab_size)
        return "".join(self._texts[i] if i in known else "\ufffd" for i in map(int, ids))

    def piece(self, i: int) -> str:
        """Returns the text of one token for display; special tokens are shown by name."""
        return {self.pad_id: "<pad>", self.eos_id: "<eos>"}.get(i) or self.decode([i])


class TextTokenizer:
    """The tokenizer of a Hugging Face directory, with its chat template.

    It uses tokenizer.json unchanged. The tokenizer classes that transformers 5 selects by name
    would rebuild it, for some checkpoints (DeepSeek's) differently.

    Args:
      path: a directory with tokenizer.json and tokenizer_config.json, or a hub id.
      chat: whether `prompt` applies the chat template, with the problem as the user message.
      thinking: value of `enable_thinking` for templates that have it: "on", "off" (Qwen3 puts an
        empty thought before the answer), or "default", which leaves it to the template.
      system: system message that opens the chat; empty: the template's own.

    Attributes:
      eos_id: id of the end of sequence.
      stop_ids: the ids that end a response: `eos_id`, those of generation_config.json, and with
        `chat` the token that closes the assistant's turn in the template.
      vocab_size: the largest id + 1. The embedding of a model may have more rows.

    Raises:
      ValueError: the directory has no tokenizer, the tokenizer has no end of sequence, or `chat` is
        set and there is no chat template.
    """

    def __init__(
        self, path: str | Path, chat: bool = False, thinking: str = "default", system: str = ""
    ):
        # Silences the warning that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import GenerationConfig, PreTrainedTokenizerFast

        path = local_directory(path, TEXT_FILES)
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"{path}: the directory has no tokenizer.json")
        inner = PreTrainedTokenizerFast.from_pretrained(path, clean_up_tokenization_spaces=False)
        if inner.eos_token_id is None:
            raise ValueError(f"{path}: tokenizer_config.json has no eos_token")
        if chat and not inner.chat_template:
            raise ValueError(f"{path}: the tokenizer has no chat template; set data.chat = False")
        self._path, self._inner, self._chat = path, inner, chat
        self._opening = [{"role": "system", "content": system}] if system else []
        self._thinking = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
        self._bos = [inner.bos_token_id] if inner.init_kwargs.get("add_bos_token") else []
        self.eos_id, self.vocab_size = inner.eos_token_id, max(inner.get_vocab().values()) + 1
        stop = {self.eos_id}
        if (path / "generation_config.json").exists():
            ends = GenerationConfig.from_pretrained(path).eos_token_id
            stop.update(ends if isinstance(ends, list) else [ends] if ends is not None else [])
        if chat:
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            closing = self.encode(self._render(turn, False).rpartition("!")[2])
            stop.update(set(closing[:1]) & set(inner.all_special_ids))
        self.stop_ids = tuple(sorted(stop))

    def __repr__(self):
        return (
            f"TextTokenizer({str(self._path)!r}, chat={self._chat}, vocab_size={self.vocab_size})"
        )

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without special tokens."""
        return self._inner.encode(text, add_special_tokens=False)

    def prompt(self, problem: str) -> list[int]:
        """Returns the token ids of the prompt for a problem.

        With `chat`, the prompt is the rendered chat template. Otherwise it is the text of the
        problem, after the beginning-of-sequence token if the tokenizer adds one.
        """
        if not self._chat:
            ids = self._inner.encode(problem)
            return ids if ids[:1] == self._bos else self._bos + ids
        return self.encode(self._render([{"role": "user", "content": problem}], True))

    def _render(self, messages, add_generation_prompt):
        return self._inner.apply_chat_template(
            self._opening + messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._thinking,
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens.

        Ids outside the vocabulary become replacement characters, and so do incomplete characters.
        """
        texts = []
        for known, group in itertools.groupby(map(int, ids), lambda i: 0 <= i < self.vocab_size):
            run = list(group)
            texts.append(
                self._inner.decode(run, skip_special_tokens=True) if known else "\ufffd" * len(run)
            )
        return "".join(texts)

    def piece(self, i: int) -> str:
        """Returns the text of one token for display, special tokens included."""
        return self._inner.decode([i]) if 0 <= i < self.vocab_size else "\ufffd"


def make_tokenizer(
    data: Mapping[str, Any], model_path: str | Path = ""
) -> CharTokenizer | TextTokenizer:
    """Returns the tokenizer of a config.

    Args:
      data: the config section `data`, of which the fields tokenizer, chat, thinking and system are
        used.
      model_path: the directory of the model. Its tokenizer is used unless `data.tokenizer` names
        another directory. Without either, characters are tokens.
    """
    if path := data["tokenizer"] or model_path:
        return TextTokenizer(path, data["chat"], data["thinking"], data["system"])
    return CharTokenizer()
