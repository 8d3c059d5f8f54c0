"""The learner: state, update step, and the head that fuses the objective with the last matmul."""

from drpo_jax.learner.head import TokenTrace, head_loss, likelihood, policy
from drpo_jax.learner.state import Batch, TrainState, init_state, make_optimizer
from drpo_jax.learner.update import Report, UpdateSettings, response_logp, update

__all__ = [
    "Batch",
    "Report",
    "TokenTrace",
    "TrainState",
    "UpdateSettings",
    "head_loss",
    "init_state",
    "likelihood",
    "make_optimizer",
    "policy",
    "response_logp",
    "update",
]
