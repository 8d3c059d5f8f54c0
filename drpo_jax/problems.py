"""The problems of a run: what it trains on, what it is judged on, and the checks before it starts."""

import dataclasses
from typing import NamedTuple

import numpy as np

from drpo_jax import data, rewards

SPLIT = 3  # stream of randomness: which problems of a file are held out


class Problems(NamedTuple):
    """What `load` gives.

    Attributes:
      train: a procedural task, or a list of `Problem`.
      heldout: list of `Problem`.
      report: what was dropped and why, and what the training problems share with the held-out ones;
        "" for a procedural task.
    """

    train: object
    heldout: list
    report: str


def load(config, tokenizer) -> Problems:
    """The problems that `config.data` and `config.evaluate` name.

    Raises:
      ValueError: a bad file (with file, line and field), too few problems, a prompt that is too long
        or an answer that can never be rewarded (where `data.filter` does not drop such problems).
      OSError: a file that cannot be read.
    """
    asked = config.evaluate.problems
    heldout = _evaluation_sets(config)
    if not config.data.problems:
        train, report = data.TASKS[config.data.task](config.data), ""
        heldout = heldout or train.sample(config.seed, 0, asked, "heldout")
        _check(config, tokenizer, heldout, "the held-out problems")
        return Problems(train, heldout, report)
    where = config.data.problems
    train = data.load_set(where)
    report = f"{where}: {len(train):,} problems\n"
    if config.data.filter == "none":
        _check(config, tokenizer, train, where)
    else:
        train, report = _filtered(config, tokenizer, train, report)
    if heldout:
        _check(config, tokenizer, heldout, config.evaluate.sets)
        overlap = data.overlap_report(train, {config.evaluate.sets: heldout})
        report += f"\nn-grams of {overlap.n} words shared with the held-out problems\n"
        report += overlap.table() + "\n"
        if config.data.filter != "none":
            copied = overlap.train_ids()
            train = [p for p in train if p.id not in copied]
            report += f"{len(copied)} training problems hold half of a held-out one: dropped\n"
    needed = config.train.prompts + (0 if heldout else asked)
    if len(train) < needed:
        raise ValueError(
            f"{where} has {len(train)} problems"
            + ("" if config.data.filter == "none" else f" after the filter {config.data.filter!r}")
            + f"; {config.train.prompts} per rollout (train.prompts)"
            + ("" if heldout else f" and {asked} for evaluation (evaluate.problems)")
            + " are needed"
        )
    if not heldout:
        order = np.random.default_rng([config.seed, SPLIT]).permutation(len(train))
        heldout = [train[i] for i in order[:asked]]
        train = [train[i] for i in order[asked:]]
    return Problems(train, heldout, report + f"\n{len(train):,} problems to train on\n")


def encode(config, tokenizer, problems):
    """Token ids of the prompts: what the model is asked."""
    instruction = config.data.instruction
    texts = [instruction.replace("{problem}", problem.prompt) for problem in problems]
    return [tokenizer.prompt(text) for text in texts]


def _evaluation_sets(config):
    """The problems of `evaluate.sets`, `evaluate.problems` of them where there are more."""
    names = [name.strip() for name in config.evaluate.sets.split(",") if name.strip()]
    found = []
    for name in names:
        some = data.load_set(name)
        if len(names) > 1:  # a table by set
            some = [dataclasses.replace(problem, kind=name) for problem in some]
        found += some
    if len(found) > config.evaluate.problems:
        rng = np.random.default_rng([config.seed, SPLIT])
        chosen = rng.choice(len(found), config.evaluate.problems, replace=False)
        found = [found[i] for i in sorted(chosen)]
    return found


def _filtered(config, tokenizer, problems, report):
    """The problems that can be trained on, and the report with what was dropped."""
    dapo = config.data.filter == "dapo"
    kept, rules = data.filter_problems(
        problems,
        integer_answers=dapo,
        chinese=not dapo,
        characters=(10, 2000) if dapo else (1, 10**9),
        rollouts=config.data.rollouts or None,
        pass_rate=(config.data.pass_low, config.data.pass_high),
    )
    report += rules.table() + "\n"
    lengths = map(len, encode(config, tokenizer, kept))
    limit = config.sampler.max_prompt_length
    fits = np.array([length <= limit for length in lengths], bool)
    right = _rewardable(config, kept)
    report += f"prompt over {limit} tokens (sampler.max_prompt_length): {sum(~fits)} dropped\n"
    report += f"answer that {config.reward.name!r} never rewards: {sum(fits & ~right)} dropped\n"
    return [p for p, ok in zip(kept, fits & right) if ok], report


def _check(config, tokenizer, problems, where):
    """Raises ValueError for a prompt that is too long or an answer that is never rewarded."""
    limit = config.sampler.max_prompt_length
    lengths = []
    for problem in problems:
        try:
            lengths += map(len, encode(config, tokenizer, [problem]))
        except ValueError as error:
            raise ValueError(
                f"{where}: the prompt of problem {problem.id!r} cannot be encoded: {error}"
            ) from None
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long:
        first = long[0]
        raise ValueError(
            f"{where}: {len(long)} of {len(problems)} prompts are longer than "
            f"sampler.max_prompt_length = {limit} tokens, the longest has {max(lengths)}. The first "
            f"is that of problem {problems[first].id!r} with {lengths[first]}: "
            f"{problems[first].prompt[:60]!r}. Raise the limit, remove them, or let data.filter drop "
            "them"
        )
    for problem, right in zip(problems, _rewardable(config, problems)):
        if not right:
            raise ValueError(
                f"{where}, problem {problem.id!r}: the answer {problem.answer!r} could never be "
                f"rewarded by {config.reward.name!r}; mend it, remove it, or let data.filter drop it"
            )


def _rewardable(config, problems):
    """bool [N]: a response that gives the answer is rewarded."""
    given = rewards.GIVEN.get(config.reward.name)
    if given is None:  # a reward of the user's own
        return np.ones(len(problems), bool)
    answers = [problem.answer for problem in problems]
    return (
        rewards.submit(
            rewards.REWARDS[config.reward.name],
            [problem.prompt for problem in problems],
            [given.replace("{answer}", answer) for answer in answers],
            answers,
        ).result()
        == 1
    )
