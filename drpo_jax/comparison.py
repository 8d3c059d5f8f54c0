"""Several objectives on the same rollout: gradients, cosines, and the tokens that contribute to them.

All objectives are evaluated with the model as π and the engine's logprobs as µ, with the advantages and
the aggregation of one config. Each costs one gradient pass; only the score coefficients differ
(`inspection`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.config import flatten, objective_hyper
from drpo_jax.inspection import Analysis, Rollout, cosines, judge, norms
from drpo_jax.metrics import reduce_pairs
from drpo_jax.models import Transformer
from drpo_jax.objectives import OBJECTIVES, advantages, resolve_hyper, weight_summary
from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.diagnostics import MU_BINS

# Fields of the config that have no part in a comparison, and their values without effect.
LEFT_OUT = {
    "objective.baseline": "group",
    "objective.behavior": "sampler",
    "objective.correction": "none",
    "objective.kl": "none",
    "objective.kl_behavior": 0.0,
    "objective.entropy_bonus": 0.0,
    "model.load_balance": 0.0,
    "reward.format": 0.0,
    "reward.overlong_buffer": 0,
}
BINS = tuple(f"{low}-{high}" for low, high in zip(MU_BINS, MU_BINS[1:]))


@dataclasses.dataclass(frozen=True)
class Judgment:
    """The evaluation of an objective on a rollout.

    Attributes:
      name: name of the objective.
      hyper: its hyperparameters with their values.
      norm: L2 norm of its gradient.
      metrics: the means of `objectives.weight_summary`; NaN for means over no tokens.
      cosines: cosines with the gradients of all objectives by name, itself included; NaN if either is
        zero.
    """

    name: str
    hyper: Mapping[str, Any]
    norm: float
    metrics: Mapping[str, float]
    cosines: Mapping[str, float]

    @property
    def setting(self) -> str:
        """The hyperparameters as text, without those that are off."""
        values = {k: v for k, v in self.hyper.items() if v is not None and v is not False}
        return ", ".join(f"{k} {v:g}" if v is not True else k for k, v in values.items())


def comparable(
    names: Sequence[str] | None, config: FrozenConfigDict, per_token: bool = False
) -> list[str]:
    """Returns the objectives to compare.

    Args:
      names: the objectives; None: all that a rollout file suffices for, the config's objective first.
      config: a resolved config.
      per_token: whether the file has advantages that differ between the tokens of a response.

    Raises:
      ValueError: a name is unknown, occurs twice, or needs what the rollout file does not contain.
    """
    able = [
        name
        for name, row in OBJECTIVES.items()
        if "topk_logp" not in row.arrays and not (per_token and row.fixed_aggregation)
    ]
    if names is None:
        return sorted(able, key=lambda name: name != config.objective.name)
    for i, name in enumerate(names):
        if name not in OBJECTIVES:
            raise unknown("objective", name, OBJECTIVES)
        if "topk_logp" in OBJECTIVES[name].arrays:
            raise ValueError(
                f"The objective {name!r} needs the logprobs of the most likely tokens, which rollout "
                "files do not contain."
            )
        if name not in able:
            raise ValueError(
                f"The objective {name!r} needs one advantage for all tokens of a response, but those in "
                "the file differ."
            )
        if name in names[:i]:
            raise ValueError(f"The objective {name!r} is listed twice.")
    return list(names)


def left_out(config: FrozenConfigDict) -> str:
    """Returns the fields that the config sets and a comparison leaves out, as text; "" if none."""
    values = flatten(config)
    return ", ".join(f"{f} = {values[f]!r}" for f, off in LEFT_OUT.items() if values[f] != off)


def file_advantages(rollout: Rollout, config: FrozenConfigDict) -> np.ndarray:
    """Returns the advantages of a file, or those of its rewards by the config's `objective.advantage`.

    Args:
      rollout: from `rollout_checks`, with equally many responses to each problem.

    Returns:
      float32 [N, R] from the file, or [N] from the rewards.

    Raises:
      ValueError: the advantage compares the responses to a problem, and there is one to each.
    """
    if "advantage" in rollout:
        return rollout["advantage"]
    samples = int(np.sum(rollout["group"] == rollout["group"][0]))
    return np.asarray(advantages(config.objective.advantage, rollout["reward"], samples))


def hyper_of(name: str, config: FrozenConfigDict) -> dict[str, Any]:
    """Returns the hyperparameters of an objective for a comparison.

    A value that the config sets applies to every objective whose boundary limits the same quantity; the
    others use their defaults. A budget per token, δ_b, is reduced to the boundary if it exceeds it.
    """
    row = OBJECTIVES[name]
    same = row.boundary == OBJECTIVES[config.objective.name].boundary
    values = objective_hyper(config) if same else {}
    hyper = resolve_hyper(name, {k: v for k, v in values.items() if k in row.hyper})
    if "delta_b" in hyper:
        hyper["delta_b"] = min(hyper["delta_b"], hyper["delta"])
    return hyper


def compare_objectives(
    analysis: Analysis, model: Transformer, rollout: Rollout, names: Sequence[str]
) -> list[Judgment]:
    """Evaluates several objectives on a rollout.

    Keeps all gradients in memory at the same time, each as large as the float32 model.

    Args:
      analysis: the `Analysis` of the config whose aggregation and hyperparameters apply.
      model: the model to differentiate.
      rollout: from `Analysis.score`, with `advantage`. Without `old_logp`, π_old is the engine's µ.
      names: from `comparable`.
    """
    rollout = {"old_logp": rollout["behavior_logp"]} | rollout
    hyper = {name: hyper_of(name, analysis.config) for name in names}
    judged = {name: judge(rollout, name, **hyper[name]) for name in names}
    gradients = {name: analysis.gradient(model, judged[name]) for name in names}
    angles: dict[str, dict[str, float]] = {name: {} for name in names}
    for i, name in enumerate(names):
        for other in names[i:]:
            cosine = float(cosines(gradients[name], gradients[other])["total"])
            angles[name][other] = angles[other][name] = cosine
    return [
        Judgment(
            name=name,
            hyper=hyper[name],
            norm=float(norms(gradients[name])["total"]),
            metrics=_metrics(judged[name]),
            cosines={other: angles[name][other] for other in names},
        )
        for name in names
    ]


def _metrics(judged: Rollout) -> dict[str, float]:
    mask = judged["loss_mask"]
    advantage = np.broadcast_to(judged["advantage"].reshape(len(mask), -1), mask.shape)
    weight, logp, behavior_logp, coefficient = (
        jnp.asarray(judged[name]) for name in ("weight", "logp", "behavior_logp", "coefficient")
    )
    every = jnp.asarray(advantage), coefficient, jnp.asarray(mask)
    sums, _ = weight_summary(weight, logp, behavior_logp, *every)
    return reduce_pairs(jax.device_get(sums))


def plain(value: Any) -> Any:
    """Returns nested mappings and lists with None, JSON's null, for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Returns the judgments as JSON, with null for numbers that are not finite."""
    return [plain(dataclasses.asdict(judgment)) for judgment in judgments]


def table(judgments: Sequence[Judgment]) -> str:
    """Returns the judgments as tables for the console."""
    width = max(len(j.name) for j in judgments) + 2
    first = judgments[0].name
    lines = [
        f"{'':<{width}}{'norm':>10}{'corrected':>11}{'masked':>9}{'mean w':>9}{f'cos {first}':>18}"
    ]
    for j in judgments:
        corrected, masked = (100 * j.metrics[f"weight/{k}"] for k in ("corrected", "masked"))
        lines.append(
            f"{j.name:<{width}}{j.norm:>10.4g}{corrected:>9.2f} %{masked:>7.2f} %"
            f"{j.metrics['weight/mean']:>9.4f}{j.cosines[first]:>18.5f}  {j.setting}"
        )
    lines += ["", "Σ|c| by µ, %", f"{'':<{width}}" + "".join(f"{name:>11}" for name in BINS)]
    tokens = [judgments[0].metrics[f"by_mu/{name}/tokens"] for name in BINS]
    rows = {"tokens": tokens}
    rows |= {j.name: [j.metrics[f"by_mu/{name}/gradient"] for name in BINS] for j in judgments}
    lines += [
        f"{name:<{width}}" + "".join(f"{100 * value:>11.2f}" for value in values)
        for name, values in rows.items()
    ]
    return "\n".join(lines)
