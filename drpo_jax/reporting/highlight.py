"""Text of responses as HTML, each token coloured by its gradient weight.

A rollout is a dict of the arrays that `learner.record` describes. The colours are inline styles, which
notebooks keep where they drop style sheets.
"""

import html
import math

import numpy as np

from drpo_jax.learner.record import pieces

SHADES = dict(zip(  # of a token's w: colour -> where it begins; blue-orange, also for the colour-blind
    "#8c2d04 #d9500b #fe9929 #fdb45f #fec98a #fee0bd #fdf0df #f1f2f4 #e3eef8 #c6dbef #9ecae1 #6baed6 "
    "#3182bd #08519c".split(),
    (-math.inf, -1, 0, 0.25, 0.5, 0.75, 0.9, 0.98, 1.02, 1.1, 1.25, 1.5, 2, 3),
))  # fmt: skip
PAPER = "background:#fff;color:#1d2129;padding:6px 8px;line-height:1.7"
DARK = ("#8c2d04", "#d9500b", "#3182bd", "#08519c")  # those with white letters


def telling_rows(rollout, count=2):
    """Rows: `count` right responses, then `count` wrong ones, of different prompts, those whose
    tokens have the largest mean |w − 1|; with Â ≠ 0, where there are such."""
    mask, informative = rollout["response_mask"], rollout["advantage"] != 0
    moved = (abs(rollout["weight"] - 1) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    rows = []
    for right in (True, False):
        prompts = {}
        for i in np.argsort(-moved):
            if (rollout["reward"][i] > 0) == right and (informative[i] or not informative.any()):
                prompts.setdefault(str(rollout["prompt"][i]), i)
        rows += [*prompts.values()][:count]
    return rows


def token_spans(rollout, row, limit=400):
    """HTML: the tokens of a response coloured by w, their numbers on hovering; of a long response,
    `limit` tokens around the one whose w is farthest from 1."""
    names = ("behavior_logp", "logp", "weight", "coefficient", "entropy")
    mask = rollout["response_mask"][row]
    numbers = (rollout[name][row][mask].tolist() for name in names)
    tokens = [*zip(pieces(rollout, row), *numbers)]
    peak = max(range(len(tokens)), key=lambda i: abs(tokens[i][3] - 1), default=0)
    start = max(min(peak - limit // 2, len(tokens) - limit), 0)
    spans = [f"<u>{start:,} tokens </u>"] if start else []
    for piece, behavior_logp, logp, w, c, entropy in tokens[start : start + limit]:
        values = {
            "µ": math.exp(behavior_logp),
            "π": math.exp(logp),
            "r": math.exp(min(logp - behavior_logp, 20)),
            "w": w,
            "c": c,
            "Â": float(rollout["advantage"][row]),
            "entropy": entropy,
        }
        told = "&#10;".join(f"{name} {value:.4g}" for name, value in values.items())
        shown = html.escape(piece or "∎").replace("\n", "↵\n")
        spans.append(f'<span style="{shade(w)}" title="{told} nats">{shown}</span>')
    rest = len(tokens) - start - limit
    return "".join(spans) + (f"<u> {rest:,} tokens</u>" if rest > 0 else "")


def shade(w):
    """The CSS of a token of weight w."""
    colour = [colour for colour, begin in SHADES.items() if w >= begin][-1]
    return f"background:{colour};color:{'#fff' if colour in DARK else '#1d2129'}"


def shade_key():
    """HTML: what the colours mean, from corrected to amplified."""
    begins = [f"{begin:g}".replace("-", "−") for begin in SHADES.values()]
    ranges = [f"&lt; {begins[1]}", *map("{} … {}".format, begins[1:], begins[2:])]
    names = {0: "corrected", 2: "attenuated", 7: "near 1", 8: "amplified"}
    return " ".join(
        (f"{names[i]} " if i in names else "")
        + f'<span style="{shade(begin)};padding:1px 5px;white-space:nowrap">{text}</span>'
        for i, (begin, text) in enumerate(zip(SHADES.values(), [*ranges, f"≥ {begins[-1]}"]))
    )


def responses_html(rollout, rows):
    """HTML: responses with their tokens coloured by w, below a key; for `IPython.display.HTML`."""
    blocks = []
    for row in rows:
        right = rollout["reward"][row] > 0
        blocks.append(
            f'<p style="margin:8px 0 2px"><b>{"right" if right else "wrong"}</b>, Â = '
            f"{rollout['advantage'][row]:.3g}, answer {html.escape(str(rollout['answer'][row]))}</p>"
            f'<pre style="{PAPER};margin:0;white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{html.escape(str(rollout['prompt'][row]))}{token_spans(rollout, row)}</pre>"
        )
    return f'<div style="{PAPER};font-size:11px;line-height:2">{shade_key()}</div>{"".join(blocks)}'
