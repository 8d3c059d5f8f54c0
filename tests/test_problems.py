"""The problems of a run: held-out parts and sets, filters, checks, and token ids."""

import json

import pytest

from drpo_jax import problems
from drpo_jax.data import TEMPLATES, Problem, make_tokenizer, normalized_text
from drpo_jax.rewards import REWARDS, Reward
from tests.pretrained import config, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, compile_quickly):
    """The directory of a tiny model and its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory)
    return directory


def resolved(checkpoint, tmp_path, train, heldout=(), **fields):
    """Writes files with these (prompt, answer) pairs and returns a config that names them."""
    names = []
    for name, pairs in (("train", train), ("test", heldout)):
        lines = [
            json.dumps({"prompt": p, "answer": a, "id": f"{name}{i}"})
            for i, (p, a) in enumerate(pairs)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        names.append(str(tmp_path / f"{name}.jsonl"))
    settings = dict(data__task="math", data__problems=names[0], evaluate__problems=2) | fields
    if heldout:
        settings["evaluate__sets"] = names[1]
    return config(checkpoint, **settings)


def load(config, train=True):
    return problems.load(config, make_tokenizer(config.data, config.model.path), train)


def math(*args, **fields):
    """Returns `problems.load` for the config of `resolved`."""
    math_config = resolved(*args, **fields)
    assert math_config.reward.name == "math"
    return load(math_config)


GOOD = [(f"Find {i} + {i}.", str(2 * i)) for i in range(8)]


def test_held_out_problems_are_a_part_of_the_file_or_a_set(checkpoint, tmp_path):
    loaded = math(checkpoint, tmp_path, GOOD)
    assert len(loaded.heldout) == 2 and len(loaded.train) == 6
    # Neither a filter nor a further problem moves a problem from one side to the other.
    more = math(checkpoint, tmp_path, [*GOOD, ("Find 9.", "9")], data__filter="clean")
    assert len(more.heldout) == 2 and len({p.id for p in more.heldout + loaded.heldout}) <= 3
    assert {p.id for p in loaded.heldout}.isdisjoint(p.id for p in loaded.train)
    loaded = math(checkpoint, tmp_path, GOOD, [("Find 50.", "50"), ("Find a.", r"\frac{a}{2}")])
    assert [p.id for p in loaded.heldout] == ["test0", "test1"] and len(loaded.train) == 8


@pytest.mark.parametrize("filter_name", ["none", "clean"])
def test_a_split_is_by_problem_and_not_by_row(checkpoint, tmp_path, filter_name):
    """Rows that differ only in layout are one problem; evaluate.problems counts problems, not rows."""
    rows = [(p.replace(" ", " " * n), a) for n in (1, 2, 3) for p, a in GOOD]
    fields = dict(data__filter=filter_name, evaluate__problems=3)
    loaded = math(checkpoint, tmp_path, rows, **fields)

    def texts(side):
        return [normalized_text(p.prompt) for p in side]

    assert len(loaded.heldout) == len(set(texts(loaded.heldout))) == 3
    assert not set(texts(loaded.heldout)) & set(texts(loaded.train))
    assert len(loaded.train) == (15 if filter_name == "none" else 5)
    assert ("6 repetitions of held-out problems" in loaded.report) == (filter_name == "none")
    back = math(checkpoint, tmp_path, rows[::-1], **fields)
    assert set(texts(back.heldout)) == set(texts(loaded.heldout))
    # Exact repetitions do not move a problem to the other side.
    once, thrice = (math(checkpoint, tmp_path, GOOD * n, **fields) for n in (1, 3))
    assert set(texts(once.heldout)) == set(texts(thrice.heldout))


def test_no_length_in_characters_drops_a_prompt(checkpoint, tmp_path):
    rows = [*((f"{p} Count every one.", a) for p, a in GOOD), ("word " * 600 + "?", "7")]
    fields = dict(data__filter="dapo", sampler__max_prompt_length=4096)
    loaded = math(checkpoint, tmp_path, rows, **fields)
    assert len(loaded.train) + len(loaded.heldout) == 9
    assert "7 of 9 problems to train on, 2 held out" in loaded.report
    assert "own selection is Jiawei415/DPAO_filter" in loaded.report


def test_a_list_of_ids_chooses_the_problems(checkpoint, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"train{i}" for i in (0, 2, 4, 5, 7)))
    loaded = math(checkpoint, tmp_path, GOOD, data__ids=str(ids))
    assert {p.id for p in [*loaded.train, *loaded.heldout]} == set(ids.read_text().split())
    assert "5 of them listed in" in loaded.report and "3 of 5 problems to train" in loaded.report
    ids.write_text("train1\ntrain99\n")
    with pytest.raises(
        ValueError, match="1 of 2 ids are not in .*'train99'; its ids look like 'tra"
    ):
        math(checkpoint, tmp_path, GOOD, data__ids=str(ids))
    with pytest.raises(ValueError, match="data.ids = 'nowhere': there is no such file"):
        math(checkpoint, tmp_path, GOOD, data__ids="nowhere")


def test_an_instruction_of_the_source_fits_the_reward_and_the_other_sets(
    checkpoint, tmp_path, monkeypatch, caplog
):
    wrapper = TEMPLATES["answer_line"]
    rows = [(wrapper.replace("{problem}", p), a) for p, a in GOOD]
    fields = dict(sampler__max_prompt_length=600)
    boxed = math(checkpoint, tmp_path, rows, data__instruction="boxed", **fields)
    bare = math(checkpoint, tmp_path, GOOD, data__instruction="boxed", **fields)
    assert [p.token_ids for p in boxed.train] == [p.token_ids for p in bare.train]
    assert problems.same_problems(boxed.report, bare.report)
    unwrapped = math(checkpoint, tmp_path, rows, data__instruction="{problem}", **fields)
    assert problems.same_problems(unwrapped.report, bare.report)
    with pytest.raises(
        ValueError, match="a last line 'Answer: …', which the reward 'math' of this"
    ):
        math(checkpoint, tmp_path, rows, data__instruction="none", **fields)
    monkeypatch.setitem(REWARDS, "line", Reward(lambda p, r, a: r.endswith(a), template="{answer}"))
    fields["reward__name"] = "line"
    kept = resolved(checkpoint, tmp_path, rows, GOOD[:2], data__instruction="none", **fields)
    loaded = load(kept)
    assert "the prompts of" in caplog.text and "'answer_line' gives all of them" in caplog.text
    tokenizer = make_tokenizer(kept.data, checkpoint)
    assert list(loaded.train[0].token_ids) == tokenizer.prompt(rows[0][0])
    assert not problems.same_problems(loaded.report, boxed.report)


@pytest.mark.parametrize("filter_name", ["none", "clean"])
def test_prompts_are_tokenized_once(checkpoint, tmp_path, filter_name):
    """Loaded problems carry the ids of the whole prompt; `encode` does not tokenize them again."""
    math_config = resolved(
        checkpoint, tmp_path, GOOD, data__filter=filter_name, data__instruction="Q: {problem}"
    )
    loaded = load(math_config)
    tokenizer = make_tokenizer(math_config.data, checkpoint)
    everything = [*loaded.train, *loaded.heldout]
    expected = [tokenizer.prompt(f"Q: {p.prompt}") for p in everything]
    assert problems.encode(math_config, None, everything) == expected
    plain = [Problem(p.prompt, p.answer, p.kind, p.id) for p in everything]
    assert problems.encode(math_config, tokenizer, plain) == expected


def test_a_filter_drops_unusable_problems_and_reports_them(checkpoint, tmp_path):
    bad = [("Find 1 + 1.", "3"), ("Say why.", "{"), ("x" * 60, "1"), ("Find  2 + 2.", "4")]
    with pytest.raises(ValueError, match=r"1 of 12 prompts .*max_prompt_length = 40 tokens"):
        math(checkpoint, tmp_path, GOOD + bad)
    loaded = math(checkpoint, tmp_path, GOOD + bad, data__filter="clean")
    kept = {p.id for p in loaded.train} | {p.id for p in loaded.heldout}
    assert kept == {f"train{i}" for i in (0, 2, 3, 4, 5, 6, 7)}
    assert dropped(loaded.report, "duplicates disagree") == 2
    assert dropped(loaded.report, "over 40 tokens") == 1
    assert "answer that 'math' never rewards: 1 dropped" in loaded.report


def dropped(report, reason):
    (line,) = [line for line in report.splitlines() if line.startswith(reason)]
    return int(line.removeprefix(reason).split()[0])


def test_training_problems_that_are_held_out_are_dropped(checkpoint, tmp_path):
    words = "a lazy fox jumps over one brown dog and then it sleeps for long"
    fields = dict(data__filter="clean", sampler__max_prompt_length=120)
    loaded = math(checkpoint, tmp_path, [*GOOD, (words, "5")], [(words, "5")], **fields)
    assert len(loaded.train) == 8 and "1 training problems contain half" in loaded.report


def test_an_answer_that_can_never_be_rewarded_is_an_error(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"problem 'train8': the answer '\{' could never be"):
        math(checkpoint, tmp_path, [*GOOD, ("Why?", "{")])


def test_several_sets_keep_their_problems_apart(checkpoint, tmp_path):
    """Both sets have a problem with the id 1."""
    for name in ("a", "b"):
        line = {"prompt": f"Find {name}.", "answer": "1", "id": 1}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    sets = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    loaded = load(config(checkpoint, evaluate__sets=sets, reward__name="math"), train=False)
    assert loaded.train is None and len({p.id for p in loaded.heldout}) == 2
    assert {p.kind for p in loaded.heldout} == {f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"}


def test_a_hash_identifies_the_problems(checkpoint, tmp_path):
    """A report with other words but the same hash describes the same problems."""
    report = math(checkpoint, tmp_path, GOOD).report
    assert problems.same_problems(report, f"Another wording.\n{report} More words.")
    other = math(checkpoint, tmp_path, [*GOOD[1:], ("Find 9.", "9")]).report
    assert not problems.same_problems(report, other)


def test_text_problems_are_verified_as_math(checkpoint):
    fields = dict(data__task="arithmetic", data__problems="gsm8k")
    assert config(checkpoint, **fields).reward.name == "math"


def sources(checkpoint, tmp_path, text, **fields):
    """Returns `load` for data.problems = text, in which {a} and {b} stand for two files."""
    names = {}
    for name, pairs in (("a", GOOD), ("b", [(f"Solve {i} + 1.", str(i + 1)) for i in range(6)])):
        lines = [
            json.dumps({"prompt": p, "answer": a, "id": f"p{i}"}) for i, (p, a) in enumerate(pairs)
        ]
        names[name] = tmp_path / f"{name}.jsonl"
        names[name].write_text("\n".join(lines))
    settings = dict(data__task="math", data__problems=text.format(**names), evaluate__problems=2)
    return load(config(checkpoint, **settings | fields)), {k: str(v) for k, v in names.items()}


def test_several_sources(checkpoint, tmp_path):
    loaded, names = sources(checkpoint, tmp_path, "{a},{b}")
    assert len(loaded.train) == 12 and len(loaded.heldout) == 2
    # Both files call their first problem p0.
    assert {p.id.rpartition(": ")[0] for p in loaded.train} == set(names.values())
    mixed, _ = sources(checkpoint, tmp_path, "{a}:3,{b}:1")
    assert mixed.train.weights == (3, 1)
    assert [p for part in mixed.train.sources for p in part] == loaded.train
    for part, name, weight in zip(mixed.train.sources, names.values(), (3, 1)):
        assert all(p.id.startswith(f"{name}: ") and p.token_ids for p in part)
        assert f"{len(part)} of them from {name}, weight {weight}\n" in mixed.report
    ids = tmp_path / "ids.txt"
    ids.write_text("p3\np4\np5\n" + f"{names['a']}: p1\n")
    listed, _ = sources(checkpoint, tmp_path, "{a},{b}", data__ids=str(ids))
    kept = {p.id for p in [*listed.train, *listed.heldout]}
    assert kept == {f"{n}: p{i}" for n in names.values() for i in (3, 4, 5)} | {f"{names['a']}: p1"}


def test_wrong_sources_are_named(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match="data.problems = .*the weight of .*b.jsonl must be a positive"
    ):
        sources(checkpoint, tmp_path, "{a}:3,{b}:-1")
    with pytest.raises(ValueError, match="there is no data set 'gsm9k'. Did you mean 'gsm8k'"):
        sources(checkpoint, tmp_path, "{a},gsm9k")
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"{tmp_path / 'a.jsonl'}: p{i}" for i in range(8)))
    with pytest.raises(ValueError, match="b.jsonl: no problem remains to train on; leave it out"):
        sources(checkpoint, tmp_path, "{a}:3,{b}:1", data__ids=str(ids))
