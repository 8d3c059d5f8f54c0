"""Several sources of problems: their names and weights in a config, and their proportions."""

from fractions import Fraction

import pytest

from drpo_jax.data import Mixture, Problem, ProblemStream, parse_sources


def problems(name, count):
    return [Problem(f"{name}{i}=", str(i), "", f"{name}{i}") for i in range(count)]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.jsonl", {"a.jsonl": None}),
        ("gsm8k", {"gsm8k": None}),
        ("train/*.parquet", {"train/*.parquet": None}),
        ("a.jsonl:3, gsm8k:1", {"a.jsonl": 3, "gsm8k": 1}),
        ("a.jsonl,math_test", {"a.jsonl": None, "math_test": None}),
        ("math:0.5,math500:1/4", {"math": Fraction(1, 2), "math500": Fraction(1, 4)}),
        # Commas and colons inside paths are not separators.
        ("x,y/a,b.jsonl", {"x,y/a,b.jsonl": None}),
        (
            "gs://bucket/a,b.jsonl:2,c:d/e.parquet:1",
            {"gs://bucket/a,b.jsonl": 2, "c:d/e.parquet": 1},
        ),
        # Unknown names stay whole for the error message.
        ("gsm9k", {"gsm9k": None}),
        ("a.jsonl,gsm9k", {"a.jsonl": None, "gsm9k": None}),
    ],
)
def test_sources_in_a_config(text, sources):
    assert list(parse_sources(text).items()) == list(sources.items())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a.jsonl:0,b.jsonl:1", "the weight of a.jsonl must be a positive number"),
        ("a.jsonl:x", "such as 3 or 0.5, not 'x'"),
        ("a.jsonl:inf,gsm8k:1", "not 'inf'"),
        ("a.jsonl:3,b.jsonl", "b.jsonl has no weight, but other sources have one; write b.jsonl:1"),
        ("gsm8k,gsm8k", "gsm8k is named twice"),
        ("a.jsonl:3,mth:1", r"'mth:1' is neither a file \(.*\) nor a data set .* mean 'math'"),
    ],
)
def test_wrong_weights_say_what_would_be_right(text, right):
    with pytest.raises(ValueError, match=right):
        parse_sources(text)


@pytest.mark.parametrize(
    "weights", [(3, 1), (1, 1, 1), (Fraction(1, 10), Fraction(7, 10), 2), (1,)]
)
def test_sources_take_turns_in_their_proportions(weights):
    weights = tuple(map(Fraction, weights))
    mixture = Mixture((problems("a", 1),) * len(weights), weights)
    counts = [0] * len(weights)
    for position in range(300):
        source, place = mixture.place(position)
        assert place == counts[source]  # Each source is read without gaps.
        counts[source] += 1
        for count, weight in zip(counts, weights):
            assert abs(count - (position + 1) * weight / sum(weights)) <= max(len(weights) - 1, 1)
    assert mixture.place(10**9)[1] == int(10**9 * weights[0] / sum(weights)) or len(weights) > 1


def test_the_stream_of_a_mixture_is_a_function_of_the_step():
    lists = problems("a", 5), problems("b", 7)
    mixture = Mixture(lists, (Fraction(3), Fraction(1)))
    stream = ProblemStream(mixture, seed=3)
    batches = [stream.batch(step, 8) for step in range(20)]
    for batch in batches:
        assert [p.id[0] for p in batch].count("a") == 6
    assert ProblemStream(mixture, seed=3).batch(11, 8) == batches[11]
    assert ProblemStream(mixture, seed=4).batch(11, 8) != batches[11]
    read = [p for batch in batches for p in batch]
    for source, name in zip(lists, "ab"):
        ids = [p.id for p in read if p.id[0] == name]
        for start in range(0, len(ids) - len(source), len(source)):  # Each epoch has every problem.
            assert sorted(ids[start : start + len(source)]) == [p.id for p in source]
    # The first source is shuffled as if it were alone.
    alone = [p for step in range(15) for p in ProblemStream(lists[0], seed=3).batch(step, 8)]
    assert [p for p in read if p.id[0] == "a"] == alone
