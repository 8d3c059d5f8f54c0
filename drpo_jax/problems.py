"""The problems of a run: what it trains on, what it is evaluated on, and the checks before it starts."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from drpo_jax import data, rewards
from drpo_jax.data import (
    CharTokenizer,
    EncodedProblem,
    Mixture,
    Problem,
    ProceduralTask,
    TextTokenizer,
)

Tokenizer = CharTokenizer | TextTokenizer

_HASH = "hash of the problems: "


class Problems(NamedTuple):
    """The problems of a run.

    Attributes:
      train: a procedural task, a list of problems, or several lists with weights; None if not needed.
      heldout: the problems to evaluate on.
      report: what was dropped and why, the n-grams that training and held-out problems share, and a
        hash of all problems, as text; empty for a procedural task.
    """

    train: ProceduralTask | list[EncodedProblem] | Mixture | None
    heldout: list[EncodedProblem]
    report: str

    def digest(self) -> str:
        """Returns a SHA-256 of the token ids and answers of all problems that are not generated."""
        train = self.train
        lists = [train] if isinstance(train, list) else getattr(train, "sources", [])
        digest = hashlib.sha256()
        for part in (*lists, self.heldout):
            digest.update(f"{len(part)}".encode())
            for problem in part:
                digest.update(repr((problem.token_ids, problem.answer)).encode())
        return digest.hexdigest()


def load(config: ConfigDict, tokenizer: Tokenizer, train: bool = True) -> Problems:
    """Loads and checks the problems that `config.data` and `config.evaluate` name.

    Prompts are encoded here, once. `encode` returns the token ids that the problems carry.

    Args:
      config: a resolved config.
      tokenizer: the tokenizer of the model.
      train: whether training problems are needed. With `evaluate.sets` and without `train`, they
        are not even read.

    Raises:
      ValueError: a malformed file (with file, line and field), too few problems, or a problem that
        cannot be used (too long, or with an answer that no response can match) and that
        `data.filter` does not drop.
      OSError: a file cannot be read.
    """
    sets = {
        name: _checked(config, tokenizer, problems, name, "fix or remove the problem")
        for name, problems in _evaluation_sets(config).items()
    }
    heldout = [problem for problems in sets.values() for problem in problems]
    if sets and not train:
        _check_instruction(config, sets)
        return Problems(None, heldout, "")
    if config.data.problems:
        return _load_training_file(config, tokenizer, sets)
    task = data.TASKS[config.data.task](config.data)
    if not sets:
        sampled = task.sample(config.seed, 0, config.evaluate.problems, "heldout")
        heldout = _checked(config, tokenizer, sampled, "the held-out problems", "change the task")
    return Problems(task, heldout, "")


def encode(
    config: ConfigDict, tokenizer: Tokenizer, problems: Iterable[Problem]
) -> list[list[int]]:
    """Returns the token ids of the prompts that the model receives.

    Problems from `load` already carry them. Others, such as a batch of a procedural task, are
    encoded now.
    """
    return [
        list(p.token_ids if isinstance(p, EncodedProblem) else _token_ids(config, tokenizer, p))
        for p in problems
    ]


def same_problems(report: str, other: str) -> bool:
    """Returns whether two reports of `load` describe the same problems, whatever their wording."""
    return _fingerprint(report) == _fingerprint(other)


def _fingerprint(report):
    return report.rpartition(_HASH)[2].split()[:1]


# -------------------------------------------------------------------------------- files and data sets


def _load_training_file(config, tokenizer, sets) -> Problems:
    """Loads `data.problems`.

    Args:
      sets: {name: problems} of `evaluate.sets`. If empty, a part of the file is held out instead.
    """
    name = config.data.problems
    weights = _sources(name)
    problems, sources = _read_sources(weights)
    report = f"{name}: {len(problems):,} problems\n"
    if config.data.ids:
        problems = _listed(config, problems, weights)
        report += f"{len(problems):,} of them listed in {config.data.ids}\n"
    total = len(problems)
    usable, filtered = _usable(config, tokenizer, problems)
    _check_instruction(config, {name: usable} | sets)
    report += filtered
    if sets:
        train, overlap = _without_copies(config, usable, sets)
        heldout = [problem for problems in sets.values() for problem in problems]
        report += overlap
    else:
        train, heldout, repeated = _hold_out(config, problems, usable)
        if repeated:
            report += (
                f"{repeated} repetitions of held-out problems: not trained on, not evaluated\n"
            )
    if len(train) < config.train.prompts or not heldout:
        raise ValueError(
            f"{name} has {total} problems, of which {len(train)} remain to train on and "
            f"{len(heldout)} to evaluate. Training needs {config.train.prompts} per rollout "
            "(train.prompts) and evaluation at least one (evaluate.problems are held out)"
        )
    kept = data.keeps_source(config.data.instruction)
    text = repr([(p.id, (kept and p.wrapped) or p.prompt, p.answer) for p in [*train, *heldout]])
    report += f"\n{_HASH}{hashlib.sha256(text.encode()).hexdigest()[:16]}\n"
    report += f"{len(train):,} of {total:,} problems to train on, {len(heldout):,} held out\n"
    lists = {name: [p for p in train if sources[p.id] == name] for name, w in weights.items() if w}
    if len(lists) < 2:
        return Problems(train, heldout, report)
    for name, remaining in lists.items():
        if not remaining:
            raise ValueError(
                f"{name}: no problem remains to train on; leave it out of data.problems"
            )
        report += f"{len(remaining):,} of them from {name}, weight {weights[name]}\n"
    mixture = Mixture(tuple(lists.values()), tuple(w for w in weights.values() if w))
    return Problems(mixture, heldout, report)


def _sources(text: str) -> dict[str, Fraction | None]:
    """Returns the sources of `data.problems` and their weights, see `data.parse_sources`."""
    try:
        return data.parse_sources(text)
    except ValueError as error:
        raise ValueError(f"data.problems = {text!r}: {error}") from None


def _read_sources(names: Iterable[str]) -> tuple[list[Problem], dict[str, str]]:
    """Reads the sources of `data.problems`.

    Returns:
      All problems, and the source of each by its id. With several sources, ids begin with the source.
    """
    lists = {name: _read(name, "data.problems") for name in names}
    if len(lists) > 1:
        lists = {
            name: [dataclasses.replace(p, id=f"{name}: {p.id}") for p in problems]
            for name, problems in lists.items()
        }
    problems = [p for part in lists.values() for p in part]
    return problems, {p.id: name for name, part in lists.items() for p in part}


def _evaluation_sets(config) -> dict[str, list[Problem]]:
    """Returns {name: problems} of `evaluate.sets`.

    With several sets, a set's name becomes the kind of its problems and the prefix of their ids.
    """
    names = [name.strip() for name in config.evaluate.sets.split(",") if name.strip()]
    sets = {name: _read(name, "evaluate.sets") for name in names}
    if len(sets) > 1:
        sets = {
            name: [dataclasses.replace(p, kind=name, id=f"{name}: {p.id}") for p in problems]
            for name, problems in sets.items()
        }
    return sets


def _read(name, field):
    """Reads a file or data set. `field` of the config names it."""
    try:
        return data.load_set(name)
    except FileNotFoundError:
        raise ValueError(f"{field} = {name!r}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"{field} = {name!r}: {error}") from None


def _listed(config, problems, sources):
    """Returns the problems whose ids `data.ids` lists, with or without the name of their source."""
    file = config.data.ids

    def spellings(id):
        for source in sources:
            if id.startswith((f"{source}: ", f"{source}/")):
                inner = id[len(source) + 1 :].strip()
                return id, *spellings(inner)
        return (id,)

    try:
        ids = set(data.read_ids(file))
    except FileNotFoundError:
        raise ValueError(f"data.ids = {file!r}: there is no such file") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"data.ids = {file!r}: {error}") from None
    listed = [p for p in problems if not ids.isdisjoint(spellings(p.id))]
    known = {text for p in listed for text in spellings(p.id)}
    if unknown := sorted(ids - known):
        raise ValueError(
            f"data.ids = {file!r}: {len(unknown)} of {len(ids)} ids are not in {config.data.problems}, "
            f"for example {unknown[0]!r}; its ids look like {problems[0].id!r}"
        )
    return listed


def _hold_out(config, problems, usable):
    """Splits the usable problems into those to train on and those to evaluate on.

    All problems with the same text are on the same side. A hash of seed and prompt decides which, so
    that no filter and no other field moves a problem to the other side.

    Args:
      problems: all problems.
      usable: those that the filter kept.

    Returns:
      The training problems; those of the `evaluate.problems` held-out problems that are usable, each
      once; and the number of their repetitions.
    """
    texts = {p.prompt: data.normalized_text(p.prompt) for p in problems}
    keys: dict[str, bytes] = {}
    for prompt, text in texts.items():
        key = hashlib.sha256(f"{config.seed} {prompt}".encode()).digest()
        keys[text] = min(key, keys.get(text, key))
    chosen = set(sorted(keys, key=keys.__getitem__)[: config.evaluate.problems])
    train = [p for p in usable if texts[p.prompt] not in chosen]
    rows = [p for p in usable if texts[p.prompt] in chosen]
    first = {texts[p.prompt]: p for p in reversed(rows)}
    heldout = [p for p in rows if first[texts[p.prompt]] is p]
    return train, heldout, len(rows) - len(heldout)


def _without_copies(config, train, sets):
    """Drops training problems that contain half of a held-out problem, unless `data.filter` is "none".

    Returns:
      The training problems, and a text on the overlap.
    """
    overlap = data.overlap_report(train, sets)
    report = (
        f"\nn-grams of {overlap.n} words shared with the held-out problems\n{overlap.table()}\n"
    )
    copied = overlap.train_ids()
    if config.data.filter != "none":
        report += f"{len(copied)} training problems contain half of a held-out problem: dropped\n"
        return [p for p in train if p.id not in copied], report
    if copied:
        logging.warning(
            "%d of the %d training problems contain half or all of a held-out problem; "
            "data.filter = 'clean' drops them",
            len(copied),
            len(train),
        )
    return train, report


# -------------------------------------------------------------------------------- usable problems


def _usable(config, tokenizer, problems) -> tuple[list[EncodedProblem], str]:
    """Returns the usable training problems, and a text on those that `data.filter` dropped.

    Raises:
      ValueError: a problem cannot be used and `data.filter` is "none".
    """
    name = config.data.problems
    if config.data.filter == "none":
        advice = "fix or remove the problem, or let data.filter drop it"
        return _checked(config, tokenizer, problems, name, advice), ""
    dapo = config.data.filter == "dapo"
    kept, filtered = data.filter_problems(
        _encoded(config, tokenizer, problems, name),
        integer_answers=dapo,
        chinese=not dapo,
        min_characters=10 if dapo else 1,
        count_tokens=lambda problem: len(problem.token_ids),
        max_tokens=config.sampler.max_prompt_length,
        rollouts=config.data.rollouts or None,
        pass_rate=(config.data.pass_low, config.data.pass_high),
    )
    rewardable = _rewardable(config, kept)
    report = f"{filtered.table()}\n"
    if dapo:
        report += (
            f"The paper's own selection is {data.RELEASED} on the Hugging Face hub; its rule is not "
            "published. To use it, set data.problems to its files and data.filter to 'none'.\n"
        )
    report += f"answer that {config.reward.name!r} never rewards: {sum(~rewardable)} dropped\n"
    return [p for p, ok in zip(kept, rewardable) if ok], report


def _checked(config, tokenizer, problems, where, advice) -> list[EncodedProblem]:
    """Returns the problems with their token ids.

    Args:
      where: the source of the problems, for messages.
      advice: what to do about a problem that cannot be used, for messages.

    Raises:
      ValueError: a prompt is too long or cannot be encoded, or no response can match an answer.
    """
    encoded = _encoded(config, tokenizer, problems, where)
    limit = config.sampler.max_prompt_length
    lengths = [len(p.token_ids) for p in encoded]
    if too_long := [i for i, length in enumerate(lengths) if length > limit]:
        i = too_long[0]
        raise ValueError(
            f"{where}: {len(too_long)} of {len(encoded)} prompts are longer than "
            f"sampler.max_prompt_length = {limit} tokens; the longest has {max(lengths)}. The first "
            f"is problem {encoded[i].id!r} with {lengths[i]}: {encoded[i].prompt[:60]!r}. Raise the "
            f"limit to {max(lengths)}, or {advice}"
        )
    for problem, ok in zip(encoded, _rewardable(config, encoded)):
        if not ok:
            raise ValueError(
                f"{where}, problem {problem.id!r}: the answer {problem.answer!r} could never be "
                f"rewarded by {config.reward.name!r}, which needs the bare answer; {advice}"
            )
    return encoded


def _encoded(config, tokenizer, problems, where) -> list[EncodedProblem]:
    encoded = []
    for problem in problems:
        try:
            token_ids = _token_ids(config, tokenizer, problem)
        except ValueError as error:
            raise ValueError(
                f"{where}: the prompt of problem {problem.id!r} cannot be encoded: {error}"
            ) from None
        encoded.append(EncodedProblem.of(problem, token_ids))
    return encoded


def _token_ids(config, tokenizer, problem):
    return tokenizer.prompt(data.with_instruction(problem, config.data.instruction).prompt)


def _rewardable(config, problems: Sequence[Problem], template: str | None = None) -> np.ndarray:
    """Returns whether a response with the known answer is rewarded, bool [problems].

    For a reward without a template, returns whether the texts can be known answers.

    Args:
      template: the response, containing {answer}. None: the reward's own.
    """
    reward = rewards.get_reward(config.reward.name, config.reward.extract)
    readable = np.array([reward.is_answer(problem.answer) for problem in problems], bool)
    if reward.template is None:
        return readable
    template = template or reward.template
    prompts, answers = [p.prompt for p in problems], [p.answer for p in problems]
    responses = [template.replace("{answer}", answer) for answer in answers]
    tokens = [[response] for response in responses] if reward.per_token else None
    return readable & (rewards.submit(reward, prompts, responses, answers, tokens).result() == 1)


def _check_instruction(config, sets: Mapping[str, Sequence[Problem]]) -> None:
    """Checks that the instructions that come with the problems fit the reward and each other.

    Args:
      sets: {name: problems}, the training problems included.

    Raises:
      ValueError: `data.instruction` keeps an instruction that asks for a form that is never rewarded.
    """
    instructed = {name: [p for p in problems if p.wrapped] for name, problems in sets.items()}
    if not data.keeps_source(config.data.instruction) or not any(instructed.values()):
        return
    name, first = next((name, wrapped[:1]) for name, wrapped in instructed.items() if wrapped)
    if not _rewardable(config, first, "Answer: {answer}").all():
        raise ValueError(
            f"{name}: its prompts ask for a last line 'Answer: …', which the reward "
            f"{config.reward.name!r} of this config does not accept; replace the instruction "
            "(data.instruction = 'boxed'), or set reward.extract = 'anywhere' or 'answer_line'"
        )
    if bare := [name for name, problems in sets.items() if not all(p.wrapped for p in problems)]:
        logging.warning(
            "data.instruction = %r: the prompts of %s come with an instruction, those of %s do not; "
            "data.instruction = 'answer_line' gives all of them the same one",
            config.data.instruction,
            name,
            ", ".join(bare),
        )
