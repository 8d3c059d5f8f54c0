"""Held-out accuracy: sampling, grouping, estimates, tables, files.

    response     one response, a line of responses.jsonl
    heldout      samples and verifies responses to the held-out problems; `evaluate` for a running run
    accuracy     responses -> accuracy, by problem and by kind of problem
    statistics   avg@k, pass@k, maj@k and their bootstrap intervals
    tables       accuracy and problems as text
    files        an evaluation's directory: settings, responses to resume from, results
    source       the model to evaluate: a checkpoint in the workdir, or model.path

The entry point is `drpo_jax.evaluate`.
"""

from drpo_jax.evaluation.heldout import evaluate, in_order, sample_heldout
from drpo_jax.evaluation.response import Response

__all__ = ["Response", "evaluate", "in_order", "sample_heldout"]
