"""Tokenizers: characters for the procedural tasks, and those of Hugging Face directories.

The surface is all that the sampler, the learner and the data need of one: `encode`, `prompt`, `decode`,
`stop_ids`, `eos_id` and `vocab_size`. Token ids are the record of a run; text is derived from them.
"""

import itertools
import os

from drpo_jax.hub import TEXT_FILES, local_directory

_CHARACTERS = "0123456789+-*/= #().,;:?<>[]x\n"


class CharTokenizer:
    """A fixed vocabulary of 32 tokens: padding, end of sequence and 30 characters.

    The vocabulary is a power of two so that the usual meshes divide it.
    """

    pad_id = 0
    eos_id = 1
    stop_ids = (eos_id,)
    vocab_size = 2 + len(_CHARACTERS)

    def __init__(self):
        self._texts = ("", "", *_CHARACTERS)
        self._ids = {c: i for i, c in enumerate(_CHARACTERS, start=2)}

    def encode(self, text):
        """Token ids (list of int) of `text`; no special token is added.

        Raises: ValueError naming the first character outside of the vocabulary and its position.
        """
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            position = next(i for i, c in enumerate(text) if c not in self._ids)
            raise ValueError(
                f"character {ascii(text[position])} at position {position} is not in the "
                f"vocabulary of the character tokenizer, which has {_CHARACTERS!r}."
            ) from None

    def prompt(self, problem):
        """Token ids of a problem as the model is asked it: its text."""
        return self.encode(problem)

    def decode(self, ids):
        """The text of `ids` (integers, a list or an array with one axis), special tokens left out.

        Nothing ends the text: ids after an end of sequence are decoded too. An id that the
        vocabulary lacks (a model may have more rows than it) becomes the replacement character.
        """
        known = range(self.vocab_size)
        return "".join(self._texts[i] if i in known else "\ufffd" for i in map(int, ids))

    def piece(self, i):
        """The text of one token for people: special tokens by their names."""
        return {self.pad_id: "<pad>", self.eos_id: "<eos>"}.get(i) or self.decode([i])


class TextTokenizer:
    """The tokenizer of a Hugging Face directory, with its chat template.

    tokenizer.json is used as it stands: the tokenizer classes that transformers 5 knows by name
    rebuild it, and for some checkpoints (DeepSeek's) differently.

    Args:
      path: a directory with tokenizer.json and tokenizer_config.json, or a hub id.
      chat: problems are asked through the chat template, as the message of a user.
      thinking: `enable_thinking` of templates that know it: "on", "off" (Qwen3: an empty thought
        stands before the answer), or "default", which leaves it to the template.
      system: message that opens the chat; "" leaves it to the template.

    Attributes:
      eos_id: the tokenizer's end of sequence.
      stop_ids: ends of a response: eos_id, those of generation_config.json, and in a chat the token
        with which the template closes the assistant's turn.
      vocab_size: the largest id + 1; a model may have more rows.

    Raises:
      ValueError: no tokenizer there, no end of sequence, or no chat template for a chat.
    """

    def __init__(self, path, chat=False, thinking="default", system=""):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
        from transformers import GenerationConfig, PreTrainedTokenizerFast

        path = local_directory(path, TEXT_FILES)
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"{path}: there is no tokenizer.json in it")
        inner = PreTrainedTokenizerFast.from_pretrained(path, clean_up_tokenization_spaces=False)
        if inner.eos_token_id is None:
            raise ValueError(f"{path}: its tokenizer_config.json names no eos_token")
        if chat and not inner.chat_template:
            raise ValueError(f"{path}: the tokenizer has no chat template; set data.chat = False")
        self._inner, self._chat = inner, chat
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

    def encode(self, text):
        """Token ids (list of int) of `text`; no special token is added."""
        return self._inner.encode(text, add_special_tokens=False)

    def prompt(self, problem):
        """Token ids of a problem (its text) as the model is asked it: through the chat template, or
        plainly, behind the beginning of sequence of tokenizers that have one."""
        if not self._chat:
            ids = self._inner.encode(problem)
            return ids if ids[:1] == self._bos else self._bos + ids
        return self.encode(self._render([{"role": "user", "content": problem}], True))

    def _render(self, messages, prompt):
        return self._inner.apply_chat_template(
            self._opening + messages,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._thinking,
        )

    def decode(self, ids):
        """The text of `ids`, special tokens left out.

        An id that the vocabulary lacks (a model may have more rows than it) becomes the replacement
        character, as does a piece of a character that lacks the others.
        """
        texts = []
        for known, run in itertools.groupby(map(int, ids), lambda i: 0 <= i < self.vocab_size):
            run = list(run)
            texts.append(
                self._inner.decode(run, skip_special_tokens=True) if known else "\ufffd" * len(run)
            )
        return "".join(texts)

    def piece(self, i):
        """The text of one token for people: special tokens by their names."""
        return self._inner.decode([i]) if 0 <= i < self.vocab_size else "\ufffd"


def make_tokenizer(settings, path=""):
    """The tokenizer that `config.data` asks for.

    Args:
      settings: the fields tokenizer, chat, thinking and system.
      path: of the model's directory, whose tokenizer it is unless another one is named; "": none.
    """
    if path := settings["tokenizer"] or path:
        return TextTokenizer(path, settings["chat"], settings["thinking"], settings["system"])
    return CharTokenizer()
