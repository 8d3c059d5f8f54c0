"""Responses as HTML, with each token colored by its gradient weight.

A rollout is a dict of the arrays that `learner.record` describes. The colors are inline styles, because
notebooks drop style sheets.
"""

import html
import math
from collections.abc import Iterable, Mapping

import numpy as np

from drpo_jax.learner.record import pieces, response_advantages
from drpo_jax.objectives import by_token

# Colors of w and the smallest w of each: from orange to blue, which color-blind readers tell apart.
SHADES = dict(zip(
    "#8c2d04 #d9500b #fe9929 #fdb45f #fec98a #fee0bd #fdf0df #f1f2f4 #e3eef8 #c6dbef #9ecae1 #6baed6 "
    "#3182bd #08519c".split(),
    (-math.inf, -1, 0, 0.25, 0.5, 0.75, 0.9, 0.98, 1.02, 1.1, 1.25, 1.5, 2, 3),
))  # fmt: skip
DARK = ("#8c2d04", "#d9500b", "#3182bd", "#08519c")  # Backgrounds of white text.
PAPER = "background:#fff;color:#1d2129;padding:6px 8px;line-height:1.7"

Rollout = Mapping[str, np.ndarray]


def notable_rows(rollout: Rollout, count: int = 2) -> list[int]:
    """Returns the rows of the responses whose tokens have the largest mean |w − 1|.

    Args:
      rollout: the arrays by name.
      count: maximum number of right responses to return, and of wrong ones.

    Returns:
      Correct responses, then wrong ones, each to a different prompt. Responses without a token with a
      loss and Â ≠ 0 are omitted, unless there are no others.
    """
    mask = rollout["loss_mask"]
    informative = np.any(mask & (by_token(rollout["advantage"]) != 0), axis=1)
    moved = (abs(rollout["weight"] - 1) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    rows: list[int] = []
    for right in (True, False):
        prompts: dict[str, int] = {}
        for i in np.argsort(-moved):
            if (rollout["reward"][i] > 0) == right and (informative[i] or not informative.any()):
                prompts.setdefault(str(rollout["prompt"][i]), i)
        rows += [*prompts.values()][:count]
    return rows


def token_spans(rollout: Rollout, row: int, limit: int = 400) -> str:
    """Returns a response as HTML: tokens colored by w, with their numbers on hover.

    Args:
      rollout: the arrays by name.
      row: the row of the response.
      limit: maximum number of tokens to show, around the one whose w is farthest from 1.
    """
    names = ("behavior_logp", "logp", "weight", "coefficient", "entropy")
    length = int(rollout["response_lengths"][row])
    advantage = np.broadcast_to(by_token(rollout["advantage"]), rollout["response_mask"].shape)
    columns = (a[row][:length].tolist() for a in (*(rollout[name] for name in names), advantage))
    tokens = [*zip(pieces(rollout, row), *columns)]
    peak = max(range(len(tokens)), key=lambda i: abs(tokens[i][3] - 1), default=0)
    start = max(min(peak - limit // 2, len(tokens) - limit), 0)
    spans = [f"<u>{start:,} tokens </u>"] if start else []
    for piece, behavior_logp, logp, w, c, entropy, A in tokens[start : start + limit]:
        values = {
            "µ": math.exp(behavior_logp),
            "π": math.exp(logp),
            "r": math.exp(min(logp - behavior_logp, 20)),
            "w": w,
            "c": c,
            "Â": A,
            "entropy": entropy,
        }
        title = "&#10;".join(f"{name} {value:.4g}" for name, value in values.items())
        text = html.escape(piece or "∎").replace("\n", "↵\n")
        spans.append(f'<span style="{shade(w)}" title="{title} nats">{text}</span>')
    rest = len(tokens) - start - limit
    return "".join(spans) + (f"<u> {rest:,} tokens</u>" if rest > 0 else "")


def shade(w: float) -> str:
    """Returns the CSS of a token with weight w."""
    color = [color for color, begin in SHADES.items() if w >= begin][-1]
    return f"background:{color};color:{'#fff' if color in DARK else '#1d2129'}"


def shade_key() -> str:
    """Returns a key to the colors as HTML, from corrected to amplified."""
    begins = [f"{begin:g}".replace("-", "−") for begin in SHADES.values()]
    ranges = [f"&lt; {begins[1]}", *map("{} … {}".format, begins[1:], begins[2:])]
    names = {0: "corrected", 2: "attenuated", 7: "near 1", 8: "amplified"}
    return " ".join(
        (f"{names[i]} " if i in names else "")
        + f'<span style="{shade(begin)};padding:1px 5px;white-space:nowrap">{text}</span>'
        for i, (begin, text) in enumerate(zip(SHADES.values(), [*ranges, f"≥ {begins[-1]}"]))
    )


def responses_html(rollout: Rollout, rows: Iterable[int]) -> str:
    """Returns responses as HTML below a key to the colors, for `IPython.display.HTML`."""
    blocks, advantages = [], response_advantages(rollout)
    for row in rows:
        right = rollout["reward"][row] > 0
        blocks.append(
            f'<p style="margin:8px 0 2px"><b>{"right" if right else "wrong"}</b>, Â = '
            f"{advantages[row]:.3g}, answer {html.escape(str(rollout['answer'][row]))}</p>"
            f'<pre style="{PAPER};margin:0;white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{html.escape(str(rollout['prompt'][row]))}{token_spans(rollout, row)}</pre>"
        )
    return f'<div style="{PAPER};font-size:11px;line-height:2">{shade_key()}</div>{"".join(blocks)}'
