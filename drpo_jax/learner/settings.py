"""The sections `objective` and `optimizer`."""

import dataclasses

from drpo_jax.fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, Field, Range, field
from drpo_jax.objectives import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    KL,
    LEVELS,
    OBJECTIVES,
    THRESHOLDS,
    hyperparameters,
)


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What the policy maximizes. `hyperparameter_fields` adds the objectives' hyperparameters."""

    name: str = field("drpo", "Objective, a name in drpo_jax.objectives.OBJECTIVES.", OBJECTIVES)
    path: str = field(
        "",
        "Objective in a file or module, FILE.py:NAME or MODULE:NAME; sets name (docs/plugins.md).",
    )
    source: str = field(
        "", "Hash of the source of path, filled in automatically; a run may not change it."
    )
    advantage: str = field("dr_grpo", "Turns the rewards of a group into advantages.", ADVANTAGES)
    baseline: str = field(
        "group",
        "Baseline of the advantages. group: as in objective.advantage. otb: the optimal token baseline, "
        "for each token a mean over the group that is weighted by squared gradients of log π.",
        ("group", "otb"),
    )
    aggregation: str = field(
        "seq-mean-token-sum-norm", "Turns the token objectives into one loss.", AGGREGATIONS
    )
    horizon: int = field(
        0,
        "Tokens by which seq-mean-token-sum-norm divides; 0: sampler.max_response_length.",
        NOT_NEGATIVE,
    )
    behavior: str = field(
        "sampler",
        "Source of the behavior policy µ. sampler: recorded while sampling, before top_k and top_p. "
        "sampler_filtered: after them (the ratio is then off by the probability mass they keep). "
        "rescored: scored once by the learner.",
        ("sampler", "sampler_filtered", "rescored"),
    )
    correction: str = field(
        "none",
        "Importance weight that corrects for the sampler's mismatch under behavior = 'rescored'. tis: "
        "truncated at the cap. mis: 0 outside the range from floor to cap.",
        CORRECTIONS,
    )
    correction_level: str = field(
        "token", "Whether each token or each whole response has an importance weight.", LEVELS
    )
    correction_cap: float = field(2.0, "Largest importance weight.", POSITIVE)
    correction_floor: float = field(0.0, "Smallest importance weight (mis).", NOT_NEGATIVE)
    kl: str = field(
        "none", "KL penalty to the initial model: k2 or k3 as a loss, k1 in the reward.", KL
    )
    kl_coefficient: float = field(0.0, "Coefficient of the KL penalty.", NOT_NEGATIVE)
    kl_behavior: float = field(
        0.0,
        "Coefficient κ of the penalty κ·(log r)² on the distance to µ. prime-rl uses 1e-3.",
        NOT_NEGATIVE,
    )
    entropy_bonus: float = field(
        0.0, "Coefficient of the entropy that is added to the objective.", NOT_NEGATIVE
    )
    threshold: str = field(
        "",
        "Reading in drpo_jax.objectives.THRESHOLDS that sets delta or epsilon.",
        tuple(dict.fromkeys(name for readings in THRESHOLDS.values() for name in readings)),
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW after clipping by the gradient's global norm."""

    learning_rate: float = field(1e-6, "Peak learning rate.", POSITIVE, may_change=True)
    b1: float = field(0.9, "Decay of the first moment.", BELOW_ONE)
    b2: float = field(0.999, "Decay of the second moment.", BELOW_ONE)
    eps: float = field(1e-8, "Added to the square root of the second moment.", POSITIVE)
    weight_decay: float = field(0.01, "Decoupled weight decay.", NOT_NEGATIVE)
    decay_norms: bool = field(
        False,
        "Whether weight decay also applies to norms, biases, and the A_log and dt_bias of DeltaNets.",
        initial=True,
    )
    mu_dtype: str = field(
        "float32",
        "Dtype of the first moment. The second stays float32: bfloat16 has steps of 0.4 %, so a mean "
        "that changes by 1 - b2 = 0.1 % per update would hardly move.",
        ("float32", "bfloat16"),
    )
    clip_norm: float = field(1.0, "Largest global norm of the gradient.", POSITIVE)
    warmup_steps: int = field(
        0, "Optimizer updates during which the learning rate rises.", NOT_NEGATIVE
    )
    schedule: str = field(
        "constant",
        "Schedule of the learning rate after the warmup, stretched over train.steps.",
        ("constant", "linear", "cosine"),
    )
    final_fraction: float = field(
        0.0, "Fraction of learning_rate at the end of linear and cosine.", SHARE
    )


def hyperparameter_fields() -> list[Field]:
    """Returns a field for every hyperparameter in the signature of an objective.

    Their default is None, which stands for the default of the chosen objective.
    """
    return [
        Field(
            "objective",
            name,
            row.type,
            default=None,
            meaning=row.meaning,
            values=None if row.type is bool else Range(row.allowed, row.holds),
            optional=True,
        )
        for name, row in hyperparameters().items()
    ]
