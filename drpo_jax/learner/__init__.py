"""The learner: state, update step, and the head that fuses the objective with the last matmul."""

from drpo_jax.learner.head import Policy, TokenTrace, head_loss, likelihood, policy
from drpo_jax.learner.packing import Layout, lay_out
from drpo_jax.learner.state import (
    Batch,
    TrainState,
    init_state,
    make_batch,
    make_optimizer,
    make_schedule,
)
from drpo_jax.learner.summary import summarize
from drpo_jax.learner.update import Report, UpdateSettings, gradients, response_trace, update

__all__ = [
    "Batch",
    "Layout",
    "Policy",
    "Report",
    "TokenTrace",
    "TrainState",
    "UpdateSettings",
    "gradients",
    "head_loss",
    "init_state",
    "lay_out",
    "likelihood",
    "make_batch",
    "make_optimizer",
    "make_schedule",
    "policy",
    "response_trace",
    "summarize",
    "update",
]
