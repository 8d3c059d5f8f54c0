"""The character tokenizer: round trip, special tokens, errors that name character and position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_jax.data import CharTokenizer

TOKENIZER = CharTokenizer()
CHARACTERS = TOKENIZER.decode(range(TOKENIZER.vocab_size))


def test_vocabulary():
    assert TOKENIZER.vocab_size == 32 and len(set(CHARACTERS)) == len(CHARACTERS) == 30
    assert set("0123456789+-*= #()/;,.\n") <= set(CHARACTERS)
    assert TOKENIZER.pad_id != TOKENIZER.eos_id
    assert TOKENIZER.encode("") == [] and TOKENIZER.decode([]) == ""
    # Saved checkpoints depend on these ids.
    assert TOKENIZER.encode("09+-*/= #") == [2, 11, 12, 13, 14, 15, 16, 17, 18]


@settings(deadline=None)
@given(st.text(CHARACTERS))
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text) and all(type(i) is int for i in ids)
    assert not {TOKENIZER.pad_id, TOKENIZER.eos_id} & set(ids)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(np.array(ids, np.int32)) == text


def test_decode_drops_special_tokens_and_continues_after_them():
    pad, eos = TOKENIZER.pad_id, TOKENIZER.eos_id
    one, two = TOKENIZER.encode("12")
    assert TOKENIZER.decode([pad, one, eos, two, eos, pad]) == "12"


@pytest.mark.parametrize(
    "text, character, position",
    [
        ("12+a", "'a'", 3),
        ("1\x00", r"'\\x00'", 1),
        ("٣", r"'\\u0663'", 0),
        ("\ud800", r"'\\ud800'", 0),
    ],
)
def test_unknown_character(text, character, position):
    with pytest.raises(ValueError, match=f"character {character} at position {position} is not"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("unknown", [-1, 32, 151935])
def test_an_id_outside_of_the_vocabulary_is_a_replacement_character(unknown):
    known = TOKENIZER.encode("5")[0]
    assert TOKENIZER.decode([known, unknown, known]) == "5\ufffd5"
