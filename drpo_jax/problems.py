"""The problems of a run: what it trains on, what it is evaluated on, and the checks before it starts."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from drpo_jax import data, rewards
from drpo_jax.data import CharTokenizer, EncodedProblem, Problem, ProceduralTask, TextTokenizer

Tokenizer = CharTokenizer | TextTokenizer

_HASH = "hash of the problems: "


class Problems(NamedTuple):
    """The problems of a run.

    Attributes:
      train: a procedural task, or the problems of a file or data set; None if they were not needed.
      heldout: the problems to evaluate on.
      report: what was dropped and why, the n-grams that training and held-out problems share, and a
        hash of all problems, as text; empty for a procedural task.
    """

    train: ProceduralTask | list[EncodedProblem] | None
    heldout: list[EncodedProblem]
    report: str


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
    problems = _read(name, "data.problems")
    heldout_ids = set() if sets else _heldout_ids(config, problems)
    usable, filtered = _usable(config, tokenizer, problems)
    report = f"{name}: {len(problems):,} problems\n{filtered}"
    if sets:
        train, overlap = _without_copies(config, usable, sets)
        heldout = [problem for problems in sets.values() for problem in problems]
        report += overlap
    else:
        train = [p for p in usable if p.id not in heldout_ids]
        heldout = [p for p in usable if p.id in heldout_ids]
    if len(train) < config.train.prompts or not heldout:
        raise ValueError(
            f"{name} has {len(problems)} problems, of which {len(train)} remain to train on and "
            f"{len(heldout)} to evaluate. Training needs {config.train.prompts} per rollout "
            "(train.prompts) and evaluation at least one (evaluate.problems are held out)"
        )
    text = repr([(p.id, p.prompt, p.answer) for p in [*train, *heldout]])
    report += f"\n{_HASH}{hashlib.sha256(text.encode()).hexdigest()[:16]}\n"
    report += f"{len(train):,} problems to train on, {len(heldout):,} held out\n"
    return Problems(train, heldout, report)


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


def _heldout_ids(config, problems):
    """Returns the ids of the `evaluate.problems` problems to hold out.

    A hash of seed and prompt decides, so that no filter and no other field moves a problem from one
    side to the other.
    """

    def key(problem):
        return hashlib.sha256(f"{config.seed} {problem.prompt}".encode()).digest()

    return {p.id for p in sorted(problems, key=key)[: config.evaluate.problems]}


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
        characters=(10, 2000) if dapo else (1, 10**9),
        count_tokens=lambda problem: len(problem.token_ids),
        max_tokens=config.sampler.max_prompt_length,
        rollouts=config.data.rollouts or None,
        pass_rate=(config.data.pass_low, config.data.pass_high),
    )
    rewardable = _rewardable(config, kept)
    report = f"{filtered.table()}\n"
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
                f"rewarded by {config.reward.name!r}; {advice}"
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


def _rewardable(config, problems: Sequence[Problem]) -> np.ndarray:
    """Returns whether a response that gives the answer is rewarded, bool [problems].

    A reward without a template is not checked: all of its problems count as rewardable.
    """
    reward = rewards.get_reward(config.reward.name, config.reward.extract)
    if reward.template is None:
        return np.ones(len(problems), bool)
    prompts, answers = [p.prompt for p in problems], [p.answer for p in problems]
    responses = [reward.template.replace("{answer}", answer) for answer in answers]
    return rewards.submit(reward, prompts, responses, answers).result() == 1
