"""The gradients of all arms at the same policies, exactly: which tokens they come from, where they err.

For each reported seed, the warm start samples all prompts and learns from this rollout with the plain
surrogate, which restrains nothing: 16 updates, twice as many as a rollout of the sweep has. At the
policy after these updates, the exact gradient of every arm is compared with the policy gradient. All
arms thus see the same π, µ and π_old. A penalty adds a pull towards its anchor, so that its gradient is
not meant to equal the policy gradient.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.exact import gradients, problem
from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell, Setup
from experiments.exact.run import ADAM, collect, learn, warm_starts

# PDM is left out: its arrays of [V, V] per context are large, and its coefficients are DPPO's or 0.
COMPARED = tuple(name for name, arm in ARMS.items() if not arm.by_sequence and name != "pdm")


def compare(cell: Cell, setup: Setup) -> dict[str, dict[str, np.ndarray]]:
    """Returns `gradients.summary` of every arm, by arm; every value has a leading axis of seeds.

    Args:
      cell: the condition; its learning rate is that of the updates.
      setup: sizes and seeds.
    """
    seeds = np.asarray(setup.reported, np.int32)
    task, params = warm_starts(seeds, setup.shape)
    tables = _tables(cell, setup)(seeds, task, params)
    samples = setup.schedule.samples

    def one(task, tables):
        return {
            name: gradients.summary(ARMS[name], task, tables, samples, ARMS[name].value)
            for name in COMPARED
        }

    # One seed at a time: the sums run over every advantage of every token.
    by_seed = jax.jit(lambda task, tables: jax.lax.map(lambda x: one(*x), (task, tables)))
    return jax.tree.map(np.asarray, by_seed(task, tables))


def _tables(cell: Cell, setup: Setup) -> Any:
    """Returns the program that updates one rollout and returns log π, log µ and log π_old."""
    schedule = replace(setup.schedule, batch=setup.shape.prompts)
    dials = replace(cell, arm="surrogate", threshold=None).dials

    def one(seed, task, params):
        key = jax.random.fold_in(jax.random.key(seed), 2)
        rollout, _ = collect(task, params, params, dials, schedule, key, key)
        after = learn(params, ADAM.init(params), rollout, dials, schedule)[0]
        logp = jax.nn.log_softmax(problem.logits(after))
        back = jnp.argsort(rollout.prompt)
        return logp, rollout.behavior_logp_BxRxV[back], rollout.old_logp_BxRxV[back]

    return jax.jit(jax.vmap(one))
