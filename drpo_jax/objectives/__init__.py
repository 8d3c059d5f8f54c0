"""Objectives: gradient weights of tokens, their advantages, and their aggregation into a loss.

The modules:

    table        the equations: (logp, behavior_logp, advantage) -> objective, score coefficient
    rows         the row types: what the project knows about an objective and a hyperparameter
    budget       CPPO's boundary, which depends on the earlier tokens of a response
    tokens       the form of a token that the equations take
    policy       the same objective under a custom_vjp that emits the coefficient
    advantages   rewards of grouped samples -> advantages
    token_rewards   rewards per token -> advantages per token
    aggregation  token objectives -> one loss, with sums and denominators kept separate
    correction   importance weights for the mismatch of sampler and learner
    penalty      penalties on the distance to a reference policy and to µ
    sequences    sums, maxima and quantiles over the tokens of a response
    diagnostics  metrics of the weights
    dynamics     exact gradients over whole distributions, and where ascent takes a policy
    by_path      objectives from files, as rows of the table
    check        the checks that every objective has to pass
"""

from drpo_jax.objectives.advantages import (
    ADVANTAGES,
    advantages,
    by_token,
    informative,
    optimal_token_baseline,
)
from drpo_jax.objectives.aggregation import AGGREGATIONS, token_weights
from drpo_jax.objectives.correction import CORRECTIONS, LEVELS, mismatch_weight
from drpo_jax.objectives.diagnostics import mismatch_summary, weight_summary, with_spread
from drpo_jax.objectives.penalty import KL, behavior_penalty, kl_penalty, reward_penalty
from drpo_jax.objectives.policy import policy_objective
from drpo_jax.objectives.table import (
    HYPERPARAMETERS,
    OBJECTIVES,
    THRESHOLDS,
    Hyperparameter,
    Objective,
    gradient_weight,
    hyperparameters,
    resolve_hyper,
    token_objective,
    token_terms,
)
from drpo_jax.objectives.token_rewards import add_to_responses, token_advantages
from drpo_jax.objectives.tokens import Token, beyond_clip

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CORRECTIONS",
    "HYPERPARAMETERS",
    "KL",
    "LEVELS",
    "OBJECTIVES",
    "THRESHOLDS",
    "Hyperparameter",
    "Objective",
    "Token",
    "add_to_responses",
    "advantages",
    "behavior_penalty",
    "beyond_clip",
    "by_token",
    "gradient_weight",
    "hyperparameters",
    "informative",
    "kl_penalty",
    "mismatch_summary",
    "mismatch_weight",
    "optimal_token_baseline",
    "policy_objective",
    "resolve_hyper",
    "reward_penalty",
    "token_advantages",
    "token_objective",
    "token_terms",
    "token_weights",
    "weight_summary",
    "with_spread",
]
