"""Objectives: what a token's gradient is worth, what its advantage is, and how tokens add up.

table        the equations: (logp, behavior_logp, advantage) -> objective, score coefficient
tokens       what an equation sees of a token
policy       the same objective under a custom_vjp that emits the coefficient
advantages   rewards of grouped samples -> advantages
aggregation  token objectives -> one loss, sums and denominators apart
diagnostics  what the log says about the weights
"""

from drpo_jax.objectives.advantages import ADVANTAGES, advantages, informative
from drpo_jax.objectives.aggregation import AGGREGATIONS, token_weights
from drpo_jax.objectives.diagnostics import weight_summary
from drpo_jax.objectives.policy import policy_objective
from drpo_jax.objectives.table import (
    OBJECTIVES,
    Objective,
    gradient_weight,
    resolve_hyper,
    token_objective,
)
from drpo_jax.objectives.tokens import Token, beyond_clip

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "OBJECTIVES",
    "Objective",
    "Token",
    "advantages",
    "beyond_clip",
    "gradient_weight",
    "informative",
    "policy_objective",
    "resolve_hyper",
    "token_objective",
    "token_weights",
    "weight_summary",
]
