"""A character tokenizer for the procedural tasks: one token per character."""

_CHARACTERS = "0123456789+-*/= #().,;:?<>[]x\n"


class CharTokenizer:
    """A fixed vocabulary of 32 tokens: padding, end of sequence and 30 characters.

    The surface is all that the sampler, the learner and the data need of a tokenizer: `encode`,
    `decode`, `eos_id`, `pad_id` and `vocab_size`. The vocabulary is a power of two so that the
    usual meshes divide it.
    """

    pad_id = 0
    eos_id = 1
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

    def decode(self, ids):
        """The text of `ids` (integers, a list or an array with one axis), special tokens left out.

        Nothing ends the text: ids after an end of sequence are decoded too. An id that the
        vocabulary lacks (a model may have more rows than it) becomes the replacement character.
        """
        known = range(self.vocab_size)
        return "".join(self._texts[i] if i in known else "\ufffd" for i in map(int, ids))
