"""Tokenizers: single characters for the arithmetic task, and the tokenizers of Hugging Face directories.

Both have the same interface: `encode`, `prompt`, `response`, `decode`, `piece`, `stop_ids`, `eos_id` and
`vocab_size`. Runs record token ids; text is derived from them.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from drpo_jax.hub import TEXT_FILES, local_directory

_CHARACTERS = "0123456789+-*/= #().,;:?<>[]x\n"
MARKS = "".join(map(chr, range(0x100, 0x1E0)))  # 224 letters, the marks of the task `marked`.


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
    characters = _CHARACTERS
    vocab_size = 2 + len(characters)

    def __init__(self):
        self._texts = ("", "", *self.characters)
        self._ids = {c: i for i, c in enumerate(self.characters, start=2)}

    def __repr__(self):
        return f"{type(self).__name__}()"

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
                f"vocabulary of the character tokenizer, which consists of {self.characters!r}"
            ) from None

    def prompt(self, problem: str) -> list[int]:
        """Returns the token ids of the prompt for a problem, which is its text."""
        return self.encode(problem)

    def response(self, text: str) -> list[int]:
        """Returns the token ids of a complete response: its text and the end of sequence."""
        return [*self.encode(text), self.eos_id]

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


class MarkTokenizer(CharTokenizer):
    """The character tokenizer with the marks of the task `marked`: 256 tokens."""

    characters = _CHARACTERS + MARKS
    vocab_size = 2 + len(characters)


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
      stop_ids: the ids that end a response: `eos_id`; those in generation_config.json, or else in
        config.json; and with `chat`, the token that closes the assistant's turn in the template.
      vocab_size: the largest id + 1. The embedding of a model may have more rows.

    Raises:
      ValueError: the directory has no tokenizer, the tokenizer has no end of sequence, or `chat` is
        set and there is no chat template, or one that fails or ignores the system message.
    """

    def __init__(
        self, path: str | Path, chat: bool = False, thinking: str = "default", system: str = ""
    ):
        # Silences the warning that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        path = local_directory(path, TEXT_FILES)
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"{path}: the directory has no tokenizer.json")
        inner = PreTrainedTokenizerFast.from_pretrained(path, clean_up_tokenization_spaces=False)
        ends = _generation_ends(path)
        if inner.eos_token_id is None and not ends:
            raise ValueError(
                f"{path}: tokenizer_config.json has no eos_token, and neither generation_config.json "
                "nor config.json has an eos_token_id"
            )
        if chat and not inner.chat_template:
            raise ValueError(f"{path}: the tokenizer has no chat template; set data.chat = False")
        self._path, self._inner, self._chat = path, inner, chat
        self._opening = [{"role": "system", "content": system}] if system else []
        self._thinking = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
        self._bos = [inner.bos_token_id] if inner.init_kwargs.get("add_bos_token") else []
        self.eos_id = ends[0] if inner.eos_token_id is None else inner.eos_token_id
        self.vocab_size = max(inner.get_vocab().values()) + 1
        self._end = self.eos_id
        if chat:
            self._check_system(system)
            turn_ends = self._turn_ends()
            ends += turn_ends
            self._end = (turn_ends or [self.eos_id])[0]
        self.stop_ids = tuple(sorted({self.eos_id, *ends}))

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

    def response(self, text: str) -> list[int]:
        """Returns the token ids of a complete response: its text and the token that ends it.

        With `chat`, this token closes the assistant's turn if the template has such a token; otherwise
        it is the end of sequence.
        """
        return [*self.encode(text), self._end]

    def turn(
        self, messages: Sequence[Mapping[str, str]], answer: str
    ) -> tuple[list[int], list[int]]:
        """Returns the token ids of a chat up to an assistant's turn, and those of the turn.

        The prompt is what the model receives when it generates this turn. The turn is `response` of the
        unchanged answer. The template's rendering is not used, because it may drop thinking. If the
        template opens the thinking block in the prompt (DeepSeek-R1) and the answer opens it again, the
        second opening is removed.

        Args:
          messages: the messages before the turn, with role and content. The tokenizer's `system` opens
            the chat unless the messages start with a system message.
          answer: content of the turn.

        Raises:
          ValueError: the tokenizer has no chat, or the template fails.
        """
        if not self._chat:
            raise ValueError("chats need the tokenizer's chat template; set data.chat = True")
        prompt = self._render([dict(message) for message in messages], True)
        if opening := re.search(r"<\w+>\s*$", prompt):
            rest = answer.removeprefix(opening[0])
            answer = answer.removeprefix(opening[0].rstrip()) if rest == answer else rest
        return self.encode(prompt), self.response(answer)

    def _render(self, messages, add_generation_prompt):
        from jinja2 import TemplateError  # Only chats need it.

        opened = bool(messages) and messages[0]["role"] == "system"
        try:
            return self._inner.apply_chat_template(
                messages if opened else self._opening + messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._thinking,
            )
        except (TemplateError, TypeError) as error:  # A template refuses by raising either.
            raise ValueError(f"{self._path}: the chat template failed: {error}") from None

    def _check_system(self, system):
        """Raises ValueError if the chat template refuses or ignores the system message."""
        user = [{"role": "user", "content": "?"}]
        opening, self._opening = self._opening, []
        self._render(user, True)  # Raises if the template also fails without a system message.
        self._opening = opening
        try:
            reason = "" if system.strip() in self._render(user, True) else "it ignores the message"
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ValueError(
                f"data.system = {system!r}: the chat template does not support a system message "
                f"({reason}); leave data.system empty, and put the text into data.instruction"
            )

    def _turn_ends(self):
        """Returns the id of the token that closes the assistant's turn; [] if the template has none.

        It is the first token after the response and white space, provided that it is an added token.
        Some templates close a turn only if another one follows.
        """
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        added = {token.content: i for i, token in self._inner.added_tokens_decoder.items()}
        opening = self._render([user], False).lstrip()
        for turns in ([user, answer], [user, answer, user]):
            _, answered, closing = self._render(turns, False).rpartition("!")
            closing = closing.lstrip()
            # The start of the next turn does not close this one.
            if not answered or closing == opening:
                continue
            if found := [text for text in added if closing.startswith(text)]:
                return [added[max(found, key=len)]]
        return []

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens and without those that end a response.

        Ids outside the vocabulary become replacement characters, and so do incomplete characters.
        """
        texts = []
        shown = (i for i in map(int, ids) if i not in self.stop_ids)
        for known, group in itertools.groupby(shown, lambda i: 0 <= i < self.vocab_size):
            run = list(group)
            texts.append(
                self._inner.decode(run, skip_special_tokens=True) if known else "\ufffd" * len(run)
            )
        return "".join(texts)

    def piece(self, i: int) -> str:
        """Returns the text of one token for display, special tokens included."""
        return self._inner.decode([i]) if 0 <= i < self.vocab_size else "\ufffd"


def _generation_ends(path: Path) -> list[int]:
    """Returns the ids of eos_token_id in generation_config.json, or else in config.json."""
    files = [path / name for name in ("generation_config.json", "config.json")]
    file = next((file for file in files if file.exists()), None)
    fields = json.loads(file.read_text()) if file else {}
    ends = fields.get("text_config", fields).get("eos_token_id", fields.get("eos_token_id"))
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
