"""Looking at gradients: opens a run that `train` made, for a notebook.

    run = Inspection("runs/tiny")
    model, rollout = run.model(), run.rollout()
    seen = run.score(model, rollout)              # π of this model at every sampled token
    drpo = judge(seen, "drpo", delta=0.15)        # an objective's weights w and coefficients c
    norms(run.gradient(model, drpo))["layer"]     # the gradient that they make

An objective reaches the gradient through the score coefficients c alone, so the gradient is taken
for coefficients: one compiled program serves every objective, and coefficients that are set to zero
leave the gradient of the other tokens.

A rollout is a dict of the arrays that `learner.record` describes.
Axis letters: N sequences, R response tokens, L layers.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax import data
from drpo_jax.checkpoint import Checkpoints, flatten
from drpo_jax.config import run_config
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.objectives import OBJECTIVES, gradient_weight, token_objective, token_weights
from drpo_jax.parallel import batch_shards, make_mesh
from drpo_jax.programs import Programs


class Inspection:
    """A run that `train` made.

    Args:
      workdir: of the run.
      mesh: sizes of the mesh axes, see `make_mesh`; those of the run's config where it is None.

    Attributes:
      config: the run's, resolved.
      tokenizer, mesh, programs: as `train` would have them.
      checkpoints, rollouts: the steps that are saved, ascending. A checkpoint's step counts the
        rollout steps done: checkpoint 20 is the model that sampled rollout 20.

    Raises:
      BadInput: no run, a config that this version does not take, or a mesh that does not fit.
    """

    def __init__(self, workdir, mesh=None):
        self.workdir = Path(workdir).expanduser()
        self.config = FrozenConfigDict(run_config(self.workdir))
        with bad_input():
            self.mesh = make_mesh(**(self.config.mesh if mesh is None else mesh))
            self.tokenizer = data.make_tokenizer(self.config.data, self.config.model.path)
            self.programs = Programs(self.config, self.mesh, self.tokenizer.stop_ids)
        self.checkpoints = _steps(self.workdir / "checkpoints", "*")
        self.rollouts = _steps(self.workdir / "rollouts", "step_*.npz")

    def model(self, step=None):
        """The model of a checkpoint: of the last one, of `step`, or of the "best" one.

        Raises:
          BadInput: there is none, or none of that step.
        """
        options = self.config.checkpoint
        directory = self.workdir / "checkpoints"
        with Checkpoints(directory, options.keep, options.best_metric) as checkpoints:
            step = checkpoints.best_step() if step == "best" else step
            step = _choose(step, self.checkpoints, f"{directory}: no checkpoint")
            with bad_input():
                like = {"model": self.programs.abstract_state.model}
                return checkpoints.restore(step, like)["model"]

    def rollout(self, step=None):
        """A saved rollout, the last one or that of `step`: arrays by name, see `learner.record`.

        Raises:
          BadInput: there is none (`train.save_rollout_every` sets how often), or none of that step.
        """
        step = _choose(
            step, self.rollouts, f"{self.workdir}: no rollout saved (train.save_rollout_every)"
        )
        return load_rollout(rollout_path(self.workdir, step))

    def score(self, model, rollout):
        """The rollout with `logp` and `entropy` [N, R] of its tokens under `model`, and without the
        weight and the coefficient, which belong to another π."""
        size = self.config.train.mini_batch_prompts * self.config.train.samples
        length = rollout["response_mask"].shape[1]
        traces = []
        for part in _parts(rollout, size):
            with jax.set_mesh(self.mesh):
                batch, layout = self._batch(part, size, {})
                trace = self.programs.rescore(model, batch)
            taken = jax.tree.map(partial(layout.take, length=length), (trace.logp, trace.entropy))
            traces.append([a[: len(part["tokens"])] for a in taken])
        logp, entropy = (np.concatenate(a) for a in zip(*traces))
        old = {k: v for k, v in rollout.items() if k not in ("weight", "coefficient")}
        return old | {"logp": logp, "entropy": entropy}

    def gradient(self, model, rollout):
        """The gradient of the loss Σ_t weight_t·(−J_t) that the rollout's coefficients make.

        The weights are those of the config's aggregation over all N sequences; an entropy bonus,
        the load balancing, a KL penalty and mismatch correction are left out.

        Args:
          rollout: from `judge`; any number of sequences (see `select`).

        Returns:
          A tree like `model`, float32: what an optimizer descends.
        """
        total = None
        for piece in self._gradients(model, rollout, self.config.train.micro_batch):
            total = piece if total is None else _add(total, piece)
        return total

    def spread(self, model, rollout):
        """Mean and variance of the gradients that single sequences make, see `Spread`.

        It runs one sequence at a time and keeps sums: its memory is that of two gradients.
        """
        count, mean, squares = len(rollout["tokens"]), None, {}
        for piece in self._gradients(model, rollout, 1):
            square = products(piece, piece)
            squares = {name: squares.get(name, 0) + x for name, x in square.items()}
            mean = piece if mean is None else _add(mean, piece)
        signal = products(mean, mean)
        variance = {name: count * x - signal[name] for name, x in squares.items()}
        return Spread(mean, signal, variance, count)

    def _gradients(self, model, rollout, size):
        """The share of every `size` sequences in the gradient of the whole rollout, one by one."""
        if "coefficient" not in rollout:
            raise BadInput("the rollout has no coefficients: call judge(rollout, objective) first")
        shards = batch_shards(self.mesh)
        rows = -(-size // shards) * shards  # those behind the sequences stay empty
        whole = self._denominator(rollout)
        for part in _parts(rollout, size):
            share = self._denominator(part) / whole
            with jax.set_mesh(self.mesh):
                batch, _ = self._batch(part, rows, {"coefficient": share * part["coefficient"]})
                grads = self.programs.gradients(model, batch)[0]
            yield grads  # outside of the block, which would be open while the caller works

    def _denominator(self, rollout):
        """What the aggregation divides by: a sum over sequences."""
        settings = self.config.objective
        mask = rollout["response_mask"]
        return float(token_weights(settings.aggregation, mask, settings.horizon)[1])

    def _batch(self, rollout, rows, arrays):
        """`Programs.batch` of N ≤ rows sequences, with empty rows behind."""
        empty = rows - len(rollout["tokens"])
        names = ("tokens", "prompt_lengths", "response_lengths")
        padded = jax.tree.map(
            lambda a: np.pad(a, [(0, empty)] + [(0, 0)] * (a.ndim - 1)),
            ([rollout[name] for name in names], arrays),
        )
        return self.programs.batch(*padded[0], padded[1])


class Spread(NamedTuple):
    """How the gradients g_i that single sequences make lie around their mean.

    g_i is N times the sequence's share of the gradient, so that the mean over i is the gradient.

    Attributes:
      mean: the gradient, a tree.
      signal: ‖mean‖² by module, see `products`. Of this, variance / N is expected by chance alone.
      variance: mean over i of ‖g_i − mean‖², by module.
      count: N.
    """

    mean: object
    signal: dict
    variance: dict
    count: int


def judge(rollout, name, **hyper):
    """The rollout with the `weight` w and the `coefficient` c [N, R] of an objective at its `logp`.

    Raises:
      ValueError: as `objectives.token_objective`; the top-k objectives need logprobs that a saved
        rollout does not hold.
    """
    mask = rollout["response_mask"]
    arrays = {"mask": mask, "old_logp": rollout.get("old_logp")}
    needed = OBJECTIVES[name].arrays if name in OBJECTIVES else ()
    hyper |= {k: v for k, v in arrays.items() if k in needed}
    token = rollout["logp"], rollout["behavior_logp"], rollout["advantage"][:, None]
    _, c = token_objective(name, *token, **hyper)
    w = gradient_weight(name, *token, **hyper)
    return rollout | {"weight": np.where(mask, w, 0), "coefficient": np.where(mask, c, 0)}


def select(rollout, rows):
    """Some sequences of a rollout; `rows` as NumPy indexes an axis."""
    whole = ("step", "piece_ids", "piece_texts")
    return {name: a if name in whole else a[rows] for name, a in rollout.items()}


def products(a, b):
    """⟨a, b⟩ of two gradients, by module.

    Returns:
      name → float64 array: [L] for what every layer has (attention, mlp or experts, router, norms),
      [] for embedding, head and final_norm; and their sums: "layer" [L], "total" [].
    """
    return {name: np.asarray(x, np.float64) for name, x in _products(a, b).items()}


def norms(grads):
    """The L2 norms of a gradient by module, named and shaped as in `products`."""
    return {name: np.sqrt(x) for name, x in products(grads, grads).items()}


def cosines(a, b):
    """The cosines between two gradients by module, as `products`; NaN where one of them is zero."""
    ab, aa, bb = products(a, b), products(a, a), products(b, b)
    with np.errstate(invalid="ignore"):
        return {name: ab[name] / np.sqrt(aa[name] * bb[name]) for name in ab}


@jax.jit
def _products(a, b):
    sums = {}
    for (path, x), y in zip(flatten(a).items(), jax.tree.leaves(b)):
        layers = path.startswith("blocks.")
        module = _module(path, x.ndim)
        product = jnp.sum(x * y, axis=tuple(range(layers, x.ndim)))
        sums[module] = sums.get(module, 0.0) + product
    layer = sum(x for x in sums.values() if x.ndim)
    return sums | {"layer": layer, "total": sum(map(jnp.sum, sums.values()))}


def _module(path, ndim):
    """Of a parameter, such as blocks.attention.q_proj."""
    if not path.startswith("blocks."):
        return {"embed": "embedding", "lm_head": "head"}.get(path, path)
    if path.endswith("norm"):
        return "norms"
    if path.endswith("router"):
        return "router"
    module = path.split(".")[1]
    return "experts" if module == "mlp" and ndim == 4 else module


@partial(jax.jit, donate_argnums=0)
def _add(total, piece):
    return jax.tree.map(jnp.add, total, piece)


def _parts(rollout, size):
    count = len(rollout["tokens"])
    return (select(rollout, slice(i, i + size)) for i in range(0, count, size))


def _steps(directory, pattern):
    """The numbers in the names of files: of 20, of step_000020.npz."""
    names = [path.name.removeprefix("step_") for path in directory.glob(pattern)]
    names = [name.removesuffix(".npz") for name in names]
    return sorted(int(name) for name in names if name.isdigit())


def _choose(step, steps, nothing):
    if not steps:
        raise BadInput(f"{nothing} yet")
    if step is not None and step not in steps:
        raise BadInput(f"{nothing} of step {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step
