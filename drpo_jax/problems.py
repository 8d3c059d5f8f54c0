"""The problems of a run: what it trains on, what it is judged on, and the checks before it starts."""

import dataclasses
import hashlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from absl import logging

from drpo_jax import data, rewards


class Problems(NamedTuple):
    """What `load` gives.

    Attributes:
      train: a procedural task, or a list of `Problem`; None where it was not asked for.
      heldout: list of `Problem`.
      report: text: what was dropped and why, what the training problems share with the held-out ones,
        and a hash of them all; "" for a procedural task.
    """

    train: object
    heldout: list
    report: str


def load(config, tokenizer, train=True) -> Problems:
    """The problems that `config.data` and `config.evaluate` name.

    Args:
      train: False where only the held-out problems are needed: with `evaluate.sets`, the training
        problems are then not even read.

    Raises:
      ValueError: a bad file (with file, line and field), too few problems, a prompt that is too long
        or an answer that can never be rewarded (where `data.filter` does not drop such problems).
      OSError: a file that cannot be read.
    """
    asked, heldout = config.evaluate.problems, evaluation_sets(config)
    for name, some in heldout.items():
        _check(config, tokenizer, some, name, "mend it or remove it")
    listed = [problem for some in heldout.values() for problem in some]
    if heldout and not train:
        return Problems(None, listed, "")
    if not config.data.problems:
        task = data.TASKS[config.data.task](config.data)
        if not heldout:
            listed = task.sample(config.seed, 0, asked, "heldout")
            _check(config, tokenizer, listed, "the held-out problems", "change the task")
        return Problems(task, listed, "")
    where = config.data.problems
    found = _load(where, "data.problems")
    report = f"{where}: {len(found):,} problems\n"
    held_out = set() if heldout else _held_out(config, found)
    if config.data.filter == "none":
        _check(config, tokenizer, found, where, "mend it, remove it, or let data.filter drop it")
        kept = found
    else:
        kept, dropped = _filtered(config, tokenizer, found)
        report += dropped
    if heldout:
        overlap = data.overlap_report(kept, heldout)
        report += f"\nn-grams of {overlap.n} words shared with the held-out problems\n"
        report += overlap.table() + "\n"
        if config.data.filter != "none":
            copied = overlap.train_ids()
            kept = [p for p in kept if p.id not in copied]
            report += f"{len(copied)} training problems hold half of a held-out one: dropped\n"
        elif copied := overlap.train_ids():
            logging.warning(
                "%d of the %d training problems hold half of a held-out one or all of it; "
                "data.filter = 'clean' drops them",
                len(copied),
                len(kept),
            )
    else:
        listed = [p for p in kept if p.id in held_out]
        kept = [p for p in kept if p.id not in held_out]
    if len(kept) < config.train.prompts or not listed:
        raise ValueError(
            f"{where} has {len(found)} problems, of which {len(kept)} are left to train on and "
            f"{len(listed)} to evaluate; {config.train.prompts} per rollout (train.prompts) and one or "
            "more to evaluate (evaluate.problems are held out) are needed"
        )
    text = repr([(p.id, p.prompt, p.answer) for p in [*kept, *listed]])
    report += f"\nhash of the problems: {hashlib.sha256(text.encode()).hexdigest()[:16]}\n"
    return Problems(
        kept, listed, report + f"{len(kept):,} problems to train on, {len(listed):,} held out\n"
    )


def encode(config, tokenizer, problems):
    """Token ids of the prompts: what the model is asked."""
    instruction = config.data.instruction
    return [tokenizer.prompt(data.with_instruction(p, instruction).prompt) for p in problems]


def evaluation_sets(config):
    """{name: problems} of `evaluate.sets`. Of several sets, name and ids tell them apart."""
    names = [name.strip() for name in config.evaluate.sets.split(",") if name.strip()]
    sets = {name: _load(name, "evaluate.sets") for name in names}
    if len(sets) > 1:
        sets = {
            name: [dataclasses.replace(p, kind=name, id=f"{name}: {p.id}") for p in some]
            for name, some in sets.items()
        }
    return sets


def _load(name, field):
    try:
        return data.load_set(name)
    except FileNotFoundError:
        raise ValueError(f"{field} = {name!r}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"{field} = {name!r}: {error}") from None


def _held_out(config, problems):
    """The ids of the problems that are held out: a hash of seed and prompt decides, so that no filter
    and no other field moves a problem from one side to the other."""

    def key(problem):
        return hashlib.sha256(f"{config.seed} {problem.prompt}".encode()).digest()

    return {p.id for p in sorted(problems, key=key)[: config.evaluate.problems]}


def _filtered(config, tokenizer, problems):
    """The problems that can be used, and a text: how many were dropped, for which reason."""
    dapo = config.data.filter == "dapo"

    def asked(text):
        return encode(config, tokenizer, [data.Problem(text, "", "", "")])[0]

    kept, rules = data.filter_problems(
        problems,
        integer_answers=dapo,
        chinese=not dapo,
        characters=(10, 2000) if dapo else (1, 10**9),
        tokenizer=SimpleNamespace(encode=asked),
        max_tokens=config.sampler.max_prompt_length,
        rollouts=config.data.rollouts or None,
        pass_rate=(config.data.pass_low, config.data.pass_high),
    )
    right = _rewardable(config, kept)
    report = rules.table() + "\n"
    report += f"answer that {config.reward.name!r} never rewards: {sum(~right)} dropped\n"
    return [p for p, ok in zip(kept, right) if ok], report


def _check(config, tokenizer, problems, where, advice):
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
            f"{problems[first].prompt[:60]!r}. Raise the limit to {max(lengths)}, or {advice}"
        )
    for problem, right in zip(problems, _rewardable(config, problems)):
        if not right:
            raise ValueError(
                f"{where}, problem {problem.id!r}: the answer {problem.answer!r} could never be "
                f"rewarded by {config.reward.name!r}; {advice}"
            )


def _rewardable(config, problems):
    """bool [N]: a response that gives the answer is rewarded."""
    given = rewards.GIVEN.get(config.reward.name)
    if given is None:  # a reward of the user's own
        return np.ones(len(problems), bool)
    prompts, answers = [p.prompt for p in problems], [p.answer for p in problems]
    responses = [given.replace("{answer}", answer) for answer in answers]
    reward = rewards.REWARDS[config.reward.name]
    return rewards.submit(reward, prompts, responses, answers).result() == 1
