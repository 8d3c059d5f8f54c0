"""The distance between an engine's logprobs of a rollout and a model's own, as a dict and as text.

The engine's µ and this model's π are probabilities of the same token. If the engine had the model's
weights, every difference is numerical, but an update would treat it as a change of the policy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.config import objective_hyper, objective_summary
from drpo_jax.objectives import OBJECTIVES, by_token, gradient_weight, mismatch_weight
from drpo_jax.objectives.diagnostics import MU_BINS

Rollout = Mapping[str, np.ndarray]

WORST = 10  # Number of tokens that the report lists.
CONTEXT = 8  # Number of tokens shown before each of them.


@np.errstate(over="ignore", invalid="ignore")  # An engine may record any finite log µ.
def mismatch_report(
    rollout: Rollout,
    advantage: np.ndarray,
    config: FrozenConfigDict,
    piece: Callable[[int], str],
) -> dict[str, Any]:
    """Compares the engine's logprobs of a rollout with a model's.

    Args:
      rollout: the arrays of `learner.rollout_file`, with the model's `logp`.
      advantage: float32 [N] or [N, R], Â; tokens with Â = 0 have no gradient.
      config: a resolved config, whose objective is applied to the tokens.
      piece: function that returns the text of a token id.

    Returns:
      tokens, responses; logp, shift and ratio, with their statistics; kl (k3, nats);
      effective_sample_size, a fraction of the tokens; by_mu, one entry per bin of µ; objective, the
      tokens that the objective masks or corrects solely because of the mismatch; correction; worst, the
      tokens with the largest |Δlogp|. The dict is JSON-serializable.
    """
    mask = rollout["response_mask"]
    mu, pi = (rollout[name].astype(np.float64) for name in ("full_logp", "logp"))
    gap = np.where(mask, pi - mu, 0.0)
    shift = np.abs(np.exp(pi) - np.exp(mu))
    ratio = np.exp(gap)
    tokens = int(mask.sum())
    return {
        "tokens": tokens,
        "responses": len(mask),
        "logp": _statistics(np.abs(gap)[mask]),
        "shift": _statistics(shift[mask]),
        "ratio": _statistics(ratio[mask]),
        "kl": float(np.mean((np.expm1(gap) - gap)[mask])),
        "effective_sample_size": float(
            ratio[mask].sum() ** 2 / (tokens * (ratio[mask] ** 2).sum())
        ),
        "by_mu": _by_mu(mask, np.exp(mu), np.abs(gap), shift, ratio),
        "objective": _objective(rollout, advantage, config),
        "correction": _correction(rollout, config),
        "worst": _worst(rollout, gap, piece),
    }


def _statistics(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p99": float(np.quantile(values, 0.99)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _by_mu(mask, mu, gap, shift, ratio) -> list[dict[str, Any]]:
    """Returns an entry for each bin LOW < µ ≤ HIGH; the first includes µ = 0."""
    entries = []
    for low, high in zip(MU_BINS, MU_BINS[1:]):
        last = high == MU_BINS[-1]  # µ may exceed 1 by rounding.
        inside = mask & ((mu > float(low)) | (low == "0")) & ((mu <= float(high)) | last)
        entry: dict[str, Any] = {"bin": f"{low}-{high}", "tokens": int(inside.sum())}
        if inside.any():
            entry |= {
                "logp": float(gap[inside].mean()),
                "logp_max": float(gap[inside].max()),
                "shift": float(shift[inside].mean()),
                "ratio": float(ratio[inside].mean()),
            }
        entries.append(entry)
    return entries


def _objective(rollout: Rollout, advantage: np.ndarray, config: FrozenConfigDict) -> dict[str, Any]:
    """Compares the weights w of a first update under the engine's µ and under the model's own.

    π is the model. With its own µ, it has not moved, so a mask that differs between the two is due to
    the mismatch alone.
    """
    name = config.objective.name
    result: dict[str, Any] = {"name": objective_summary(config)}
    row = OBJECTIVES[name]
    if "topk_logp" in row.arrays:
        return result | {
            "note": "needs the logprobs of the most likely tokens, which rollout files do not contain"
        }
    advantage = by_token(advantage)
    mask = rollout["loss_mask"] & (advantage != 0)
    if not mask.any():
        return result | {"note": "no token with a loss has Â ≠ 0"}
    arrays = {"mask": rollout["loss_mask"], "old_logp": rollout["logp"]}
    needed = {key: value for key, value in arrays.items() if key in row.arrays}

    def weight(behavior_logp):
        hyper = objective_hyper(config)
        w = gradient_weight(name, rollout["logp"], behavior_logp, advantage, **hyper, **needed)
        return np.asarray(w)[mask]

    engine, own = weight(rollout["full_logp"]), weight(rollout["logp"])
    return result | {
        "tokens": int(mask.sum()),
        "flipped": int(((engine <= 0) != (own <= 0)).sum()),
        "masked": int((engine == 0).sum()),
        "corrected": int((engine < 0).sum()),
        "weight_change": float(np.abs(engine - own).mean()),
    }


def _correction(rollout: Rollout, config: FrozenConfigDict) -> dict[str, Any] | None:
    """Counts tokens whose importance weight ρ is 0 or at the cap; without a mismatch, ρ is 1."""
    objective = config.objective
    if objective.correction == "none":
        return None
    weights = mismatch_weight(
        objective.correction,
        rollout["logp"],
        rollout["full_logp"],
        rollout["response_mask"],
        level=objective.correction_level,
        cap=objective.correction_cap,
        floor=objective.correction_floor,
    )
    rho = np.asarray(weights)[rollout["response_mask"]]
    return {
        "name": objective.correction,
        "level": objective.correction_level,
        "mean": float(rho.mean()),
        "dropped": int((rho == 0).sum()),
        "capped": int((rho >= objective.correction_cap).sum()),
    }


def _worst(rollout: Rollout, gap: np.ndarray, piece: Callable[[int], str]) -> list[dict[str, Any]]:
    """Returns the tokens with the largest |Δlogp|, the largest first."""
    order = np.argsort(-np.abs(gap), axis=None, kind="stable")[:WORST]
    entries = []
    for row, position in zip(*np.unravel_index(order, gap.shape)):
        if not rollout["response_mask"][row, position]:
            continue
        place = int(rollout["prompt_lengths"][row] + position)
        before = rollout["tokens"][row, max(place - CONTEXT, 0) : place]
        token = int(rollout["tokens"][row, place])
        entries.append(
            {
                "row": int(row) + 1,
                "token": int(position) + 1,
                "id": token,
                "text": piece(token),
                "before": "".join(piece(int(i)) for i in before),
                "full_logp": float(rollout["full_logp"][row, position]),
                "logp": float(rollout["logp"][row, position]),
            }
        )
    return entries


def mismatch_text(report: Mapping[str, Any]) -> str:
    """Returns the report as tables for the console."""
    lines = [
        f"{report['tokens']:,} tokens of {report['responses']:,} responses: µ of the engine, π of this "
        "model",
        "",
        f"{'':<10}" + "".join(f"{name:>11}" for name in report["logp"]),
    ]
    titles = {"logp": "|Δlogp|", "shift": "|π − µ|", "ratio": "π/µ"}
    lines += [
        f"{title:<10}" + "".join(f"{value:>11.4g}" for value in report[name].values())
        for name, title in titles.items()
    ]
    share = report["effective_sample_size"]
    lines += [f"KL {report['kl']:.3g} nats, effective sample size {100 * share:.2f} %", ""]
    lines.append(f"{'µ':>10}{'tokens':>10}{'|Δlogp|':>11}{'largest':>11}{'|π − µ|':>11}{'π/µ':>11}")
    for entry in report["by_mu"]:
        values = [entry[name] for name in ("logp", "logp_max", "shift", "ratio") if name in entry]
        cells = "".join(f"{value:>11.4g}" for value in values)
        lines.append(f"{entry['bin']:>10}{entry['tokens']:>10,}{cells}")
    lines += ["", _objective_text(report["objective"])]
    if correction := report["correction"]:
        lines.append(
            f"correction {correction['name']} by {correction['level']}: mean ρ "
            f"{correction['mean']:.4f}, {correction['dropped']:,} tokens dropped, "
            f"{correction['capped']:,} at the cap or above"
        )
    lines += ["", "largest |Δlogp|:", f"{'row':>6}{'token':>7}{'µ':>11}{'π':>11}  text"]
    for entry in report["worst"]:
        probabilities = "".join(f"{np.exp(entry[name]):>11.4g}" for name in ("full_logp", "logp"))
        text = f"{entry['before']!r} → {entry['text']!r}"
        lines.append(f"{entry['row']:>6}{entry['token']:>7}{probabilities}  {text}")
    return "\n".join(lines)


def _objective_text(objective: Mapping[str, Any]) -> str:
    if "note" in objective:
        return f"{objective['name']}: {objective['note']}"
    share = 100 * objective["flipped"] / objective["tokens"]
    return (
        f"{objective['name']}: the mismatch flips the mask of {objective['flipped']:,} of "
        f"{objective['tokens']:,} tokens with Â ≠ 0 ({share:.2f} %; {objective['masked']:,} masked, "
        f"{objective['corrected']:,} corrected); mean |Δw| {objective['weight_change']:.4f}"
    )
