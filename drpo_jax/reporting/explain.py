"""One problem on its way from the data to the gradient, in a form that a person can check.

    python -m drpo_jax.train --config=… --workdir=… --explain_batch

samples responses to the first `train.mini_batch_prompts` problems, makes one update on them, prints this
page, and leaves nothing behind.
"""

import numpy as np

from drpo_jax.objectives import token_weights

MAX_TOKENS = 60  # of a prompt or a response that are listed


def explain(rollout, tokenizer, config, row=None) -> str:
    """The problem of one sequence of a saved rollout, its group of responses, and its tokens.

    Args:
      rollout: the arrays of `learner.record`.
      tokenizer: the run's.
      config: the run's, resolved.
      row: of the sequence; None: the first whose advantage is not 0.
    """
    if row is None:
        row = int(np.argmax(rollout["advantage"] != 0))
    samples = config.train.samples
    group = slice(row // samples * samples, row // samples * samples + samples)
    weights, _ = token_weights(
        config.objective.aggregation, rollout["response_mask"], config.objective.horizon
    )
    start, length = (int(rollout[f"{part}_lengths"][row]) for part in ("prompt", "response"))
    sections = [
        f"PROBLEM {rollout['id'][row]}",
        _indent(str(rollout["prompt"][row])),
        f"ANSWER {rollout['answer'][row]}   (reward: {config.reward.name})",
        f"PROMPT, {start} tokens: the model reads them, none has a loss",
        _prompt_table(rollout["tokens"][row, :start], tokenizer),
        f"RESPONSES, {samples}: advantage {config.objective.advantage!r} of their rewards",
        _group_table(rollout, group, row)
        + (
            ""
            if rollout["advantage"][row]
            else "\n\nNo problem had responses of different rewards: none has a gradient."
        ),
        f"RESPONSE {row - group.start}, {length} tokens ("
        + ("ended by itself" if rollout["finished"][row] else "cut off")
        + f"): {config.objective.name}, weights by {config.objective.aggregation!r}",
        _token_table(rollout, row, start, length, tokenizer, np.asarray(weights)[row]),
        "loss = −Σ share·J over the mini-batch, divided by its sequences (token-mean: its tokens).\n"
        "The gradient reaches the model through share·c, at the positions that predict a token\n"
        f"above: {start - 1} to {start + length - 2} of this sequence, and no other.",
    ]
    return "\n\n".join(sections)


def _prompt_table(ids, tokenizer):
    lines = [f"{'position':>10} {'id':>8}  text"]
    lines += [f"{i:>10} {token:>8}  {_shown(token, tokenizer)}" for i, token in enumerate(ids)]
    return "\n".join(_cut(lines))


def _group_table(rollout, group, row):
    lines = [f"{'':>10} {'reward':>8} {'advantage':>10} {'tokens':>7}  text"]
    for i in range(group.start, group.stop):
        mark = "->" if i == row else ""
        text = " ".join(str(rollout["response"][i]).split())
        lines.append(
            f"{mark:>4} {i - group.start:>5} {rollout['reward'][i]:>8.2f} "
            f"{rollout['advantage'][i]:>+10.3f} {rollout['response_lengths'][i]:>7}  "
            + (text if len(text) <= 60 else text[:59] + "…")
        )
    return "\n".join(lines)


def _token_table(rollout, row, start, length, tokenizer, weights):
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
            + f"  {_shown(ids[start + t], tokenizer)}"
        )
    return "\n".join(_cut(lines))


def _shown(token, tokenizer):
    return repr(tokenizer.piece(int(token)))


def _cut(lines):
    if len(lines) <= MAX_TOKENS:
        return lines
    half = MAX_TOKENS // 2
    return [*lines[:half], f"{'…':>10} {len(lines) - 2 * half} more", *lines[-half:]]


def _indent(text):
    return "\n".join(f"    {line}" for line in text.splitlines())
