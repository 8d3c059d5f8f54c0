"""One problem on its way from the data to the gradient, as text that a person can check.

    python -m drpo_jax.train --config=… --workdir=… --explain_batch

samples responses to the first `train.mini_batch_prompts` problems, makes one update on them, prints this
page, and leaves nothing behind.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from drpo_jax.config import objective_summary
from drpo_jax.learner.record import response_advantages
from drpo_jax.objectives import by_token, token_weights
from drpo_jax.rewards import reward_summary

MAX_TOKENS = 60  # Longer prompts and responses are listed without their middle.


def explain(
    rollout: Mapping[str, np.ndarray], tokenizer: Any, config: Any, row: int | None = None
) -> str:
    """Returns the problem of one sequence of a saved rollout, its group of responses, and its tokens.

    Args:
      rollout: the arrays of `learner.record`.
      tokenizer: the run's tokenizer.
      config: the run's resolved config.
      row: the row of the sequence; None: the first with a token that has a loss and Â ≠ 0.
    """
    learned = (rollout["loss_mask"] & (by_token(rollout["advantage"]) != 0)).any(1)
    if row is None:
        row = int(np.argmax(learned))
    samples = config.train.samples
    group = slice(row // samples * samples, row // samples * samples + samples)
    weights, _ = token_weights(
        config.objective.aggregation, rollout["loss_mask"], config.objective.horizon
    )
    start, length = (int(rollout[f"{part}_lengths"][row]) for part in ("prompt", "response"))
    warning = ""
    if not learned.any():
        warning = "\n\nNo problem has responses with different rewards, so there is no gradient."
    elif not rollout["loss_mask"][row].any():
        warning = "\n\nThis response carries no loss."
    end = "ended with a stop token" if rollout["finished"][row] else "ended by the length limit"
    sections = [
        f"PROBLEM {rollout['id'][row]}",
        _indent(str(rollout["prompt"][row])),
        f"ANSWER {rollout['answer'][row]}   (reward {reward_summary(config.reward)})",
        f"PROMPT, {start} tokens: inputs of the model, without a loss",
        _prompt_table(rollout["tokens"][row, :start], tokenizer),
        f"RESPONSES, {samples}: {_advantages(config.objective)} from their rewards",
        _group_table(rollout, group, row) + warning,
        f"RESPONSE {row - group.start}, {length} tokens ({end}): {objective_summary(config)}, "
        f"aggregation {config.objective.aggregation!r}",
        _token_table(rollout, row, start, length, tokenizer, np.asarray(weights)[row]),
        "loss = −Σ share·J over the mini-batch, divided by its sequences (token-mean: by its tokens).\n"
        "The gradient reaches the model through share·c, only at the positions that predict the tokens\n"
        f"above: {start - 1} to {start + length - 2} of this sequence.",
    ]
    return "\n\n".join(sections)


def _advantages(objective: Any) -> str:
    if objective.baseline == "group":
        return f"advantages {objective.advantage!r}"
    return f"mean advantages of the tokens, baseline {objective.baseline!r},"


def _prompt_table(ids: np.ndarray, tokenizer: Any) -> str:
    lines = [f"{'position':>10} {'id':>8}  text"]
    lines += [f"{i:>10} {token:>8}  {_text(token, tokenizer)}" for i, token in enumerate(ids)]
    return "\n".join(_cut(lines))


def _group_table(rollout: Mapping[str, np.ndarray], group: slice, row: int) -> str:
    advantage = response_advantages(rollout)
    lines = [f"{'':>10} {'reward':>8} {'advantage':>10} {'tokens':>7}  text"]
    for i in range(group.start, group.stop):
        mark = "->" if i == row else ""
        text = " ".join(str(rollout["response"][i]).split())
        lines.append(
            f"{mark:>4} {i - group.start:>5} {rollout['reward'][i]:>8.2f} "
            f"{advantage[i]:>+10.3f} {rollout['response_lengths'][i]:>7}  "
            + (text if len(text) <= 60 else text[:59] + "…")
        )
    return "\n".join(lines)


def _token_table(
    rollout: Mapping[str, np.ndarray],
    row: int,
    start: int,
    length: int,
    tokenizer: Any,
    weights: np.ndarray,
) -> str:
    names = ("µ", "π", "r", "w", "c", "share", "share·c")
    lines = [f"{'position':>10} {'id':>8}  " + "".join(f"{n:>11}" for n in names) + "  text"]
    ids = rollout["tokens"][row]
    mu, pi = (np.exp(rollout[name][row]) for name in ("behavior_logp", "logp"))
    for t in range(length):
        c, share = rollout["coefficient"][row, t], weights[t]
        values = (mu[t], pi[t], pi[t] / mu[t], rollout["weight"][row, t], c, share, share * c)
        lines.append(
            f"{start + t:>10} {ids[start + t]:>8}  "
            + "".join(f"{value:>11.4g}" for value in values)
            + f"  {_text(ids[start + t], tokenizer)}"
        )
    return "\n".join(_cut(lines))


def _text(token: int, tokenizer: Any) -> str:
    return repr(tokenizer.piece(int(token)))


def _cut(lines: list[str]) -> list[str]:
    """The lines, with the middle of a long table left out."""
    if len(lines) <= MAX_TOKENS:
        return lines
    half = MAX_TOKENS // 2
    return [*lines[:half], f"{'…':>10} {len(lines) - 2 * half} more", *lines[-half:]]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
