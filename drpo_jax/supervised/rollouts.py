"""Rejection sampling: the correct responses in the saved rollouts of a run."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from drpo_jax.learner.record import load_rollout, saved_rollouts
from drpo_jax.storage import path_of


class Sampled(NamedTuple):
    """A sampled response.

    Attributes:
      prompt, response: token ids; the response includes its stop token.
      learned: per token of the response, whether the model sampled it.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    learned: tuple[bool, ...]


def right_responses(config: ConfigDict, tokenizer: Any) -> tuple[list[Sampled], dict[str, int]]:
    """Returns the correct responses of the run in `sft.rollouts`.

    These are the finished responses with a reward of at least `sft.min_reward`, without duplicates, and
    at most `sft.per_problem` for each prompt. The seed selects these, so neither early nor short
    responses are preferred. The tokens are the sampled ones.

    Returns:
      The responses by prompt, in the order in which the prompts were first sampled; and the number of
      responses and of those dropped for each reason, by name.

    Raises:
      ValueError: the directory has no saved rollouts, they were sampled with another tokenizer, or no
        response is kept.
    """
    directory, sft = path_of(config.sft.rollouts), config.sft
    if not (files := saved_rollouts(directory)):
        hint = "give the workdir of a run with train.save_rollout_every > 0"
        if saved_rollouts(directory.parent):
            hint = f"did you mean {directory.parent}?"
        raise ValueError(
            f"sft.rollouts = {sft.rollouts!r}: there is no rollouts/step_….npz below it; {hint}"
        )
    names = ("responses", "wrong", "unfinished", "repeated", "beyond sft.per_problem")
    counts = dict.fromkeys(names, 0)
    groups: dict[tuple[int, ...], dict[tuple[int, ...], Sampled]] = {}
    for path in files.values():
        rollout = load_rollout(path)
        right, finished = rollout["reward"] >= sft.min_reward, rollout["finished"].astype(bool)
        counts["responses"] += len(right)
        counts["wrong"] += int(np.sum(~right))
        counts["unfinished"] += int(np.sum(right & ~finished))
        rows = np.flatnonzero(right & finished)
        _check_tokenizer(tokenizer, rollout, rows, path)
        for sampled in _sampled(rollout, rows):
            group = groups.setdefault(sampled.prompt, {})
            counts["repeated"] += sampled.response in group
            group.setdefault(sampled.response, sampled)
    kept: list[Sampled] = []
    for group in groups.values():
        order = sorted(group.values(), key=lambda sampled: _draw(config.seed, sampled))
        kept += order[: sft.per_problem or None]
    counts["beyond sft.per_problem"] = sum(map(len, groups.values())) - len(kept)
    if not kept:
        raise ValueError(
            f"sft.rollouts = {sft.rollouts!r}: none of {counts['responses']:,} responses in "
            f"{len(files)} saved rollouts is finished and has a reward of at least sft.min_reward = "
            f"{sft.min_reward:g}"
        )
    return kept, counts


def _sampled(rollout: Mapping[str, np.ndarray], rows: np.ndarray) -> Iterator[Sampled]:
    """Yields the responses in some rows of a saved rollout."""
    for row in rows:
        start = int(rollout["prompt_lengths"][row])
        length = int(rollout["response_lengths"][row])
        tokens = rollout["tokens"][row, : start + length].tolist()
        learned = rollout["response_mask"][row, :length].tolist()
        yield Sampled(tuple(tokens[:start]), tuple(tokens[start:]), tuple(learned))


def _draw(seed: int, sampled: Sampled) -> bytes:
    """Returns the sort key of a response, a hash of the seed and its tokens."""
    return hashlib.sha256(repr((seed, sampled.prompt, sampled.response)).encode()).digest()


def _check_tokenizer(
    tokenizer: Any, rollout: Mapping[str, np.ndarray], rows: np.ndarray, path: Path
) -> None:
    """Raises ValueError if the tokenizer decodes a response differently than its run did."""
    for sampled in _sampled(rollout, rows[:1]):
        text, saved = tokenizer.decode(sampled.response), str(rollout["response"][rows[0]])
        if text != saved:
            raise ValueError(
                f"{path}: the response {saved[:60]!r} reads {text[:60]!r} in this config's tokenizer; "
                "use the model.path or data.tokenizer of the run that sampled it"
            )
