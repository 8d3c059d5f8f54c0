"""The learner: its state, the update step, and a head that fuses the objective with the last matmul.

The modules:

    head            lm_head, log-softmax, objective and their gradients in one pass; TokenTrace
    update          gradients of a mini-batch over micro-batches, and one optimizer update
    summary         metrics of an update, from its trace
    state           TrainState, Batch, optimizer
    packing         where the sequences of a batch lie in its rows
    record          saved rollouts
    rollout_file    rollouts in Parquet, which any engine can write
    rollout_checks  the checks of such a file
    replay          reads the rollouts of a run from such files
"""

from drpo_jax.learner.head import Policy, TokenTrace, head_loss, likelihood, policy
from drpo_jax.learner.packing import PARTS, Layout, lay_out, lay_out_by_tokens
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
    "PARTS",
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
    "lay_out_by_tokens",
    "likelihood",
    "make_batch",
    "make_optimizer",
    "make_schedule",
    "policy",
    "response_trace",
    "summarize",
    "update",
]
