"""Gradients of a trained run, for notebooks.

    run = Inspection("runs/tiny")
    model, rollout = run.model(), run.rollout()
    scored = run.score(model, rollout)            # π of this model at every sampled token
    drpo = judge(scored, "drpo", delta=0.15)      # an objective's weights w and coefficients c
    norms(run.gradient(model, drpo))["layer"]     # norms of the gradient that they produce

An objective reaches the gradient through the score coefficients c alone. The gradient is therefore
computed from coefficients: one compiled program serves every objective, and setting coefficients to zero
leaves the gradient of the other tokens.

A rollout is a dict of the arrays that `learner.record` describes.
Axis letters: N sequences, R response tokens, L layers.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax import data
from drpo_jax.checkpoint import Checkpoints, flatten, saved_steps
from drpo_jax.config import run_config
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.evaluation.source import checkpoint_directory, load_checkpoint
from drpo_jax.learner.record import load_rollout, rollout_path, saved_rollouts
from drpo_jax.loop import initial_model
from drpo_jax.models import Transformer
from drpo_jax.objectives import (
    OBJECTIVES,
    by_token,
    gradient_weight,
    token_objective,
    token_weights,
)
from drpo_jax.parallel import batch_shards, make_mesh, multihost
from drpo_jax.programs import Programs
from drpo_jax.run import Run
from drpo_jax.storage import path_of

Rollout = dict[str, np.ndarray]
Gradient = Any  # a tree like the model, of float32 arrays
ByModule = dict[str, np.ndarray]


class Analysis:
    """Scores and gradients of rollouts under a model.

    Args:
      config: a resolved config.
      mesh: the device mesh.
      programs: the compiled programs for both.
    """

    def __init__(
        self, config: FrozenConfigDict, mesh: jax.sharding.Mesh, programs: Programs
    ) -> None:
        self.config, self.mesh, self.programs = config, mesh, programs

    def score(self, model: Transformer, rollout: Rollout) -> Rollout:
        """Scores the tokens of a rollout with another model.

        Returns:
          The rollout with `logp` and `entropy` [N, R] under `model`, without `weight` and
          `coefficient`, which belong to another π.
        """
        size = self.config.train.mini_batch_prompts * self.config.train.samples
        length = rollout["response_mask"].shape[1]
        traces = []
        for part in _parts(rollout, size):
            with jax.set_mesh(self.mesh):
                batch, layout = self._batch(part, size, {}, part["response_mask"], pack=True)
                trace = self.programs.rescore(model, batch)
            fetched = multihost.fetch((trace.logp, trace.entropy))
            scores = jax.tree.map(partial(layout.take, length=length), fetched)
            traces.append([a[: len(part["tokens"])] for a in scores])
        logp, entropy = (np.concatenate(a) for a in zip(*traces))
        kept = {k: v for k, v in rollout.items() if k not in ("weight", "coefficient")}
        return kept | {"logp": logp, "entropy": entropy}

    def gradient(self, model: Transformer, rollout: Rollout) -> Gradient:
        """Returns the gradient of the loss Σ_t weight_t·(−J_t) from the rollout's coefficients.

        The weights are those of the config's aggregation over all N sequences. The gradient leaves out
        the entropy bonus, load balancing, the KL penalty and mismatch correction.

        Args:
          model: the model to differentiate.
          rollout: from `judge`; any number of sequences (see `select`).

        Returns:
          A tree like `model`, float32: the direction that an optimizer descends.
        """
        total = None
        for piece in self._gradients(model, rollout, self.programs.micro_batch):
            total = piece if total is None else _add(total, piece)
        return total

    def spread(self, model: Transformer, rollout: Rollout) -> "Spread":
        """Returns the mean and the variance of the gradients of single sequences, see `Spread`.

        Processes one sequence at a time and keeps sums only, so it needs the memory of two gradients.
        """
        count, mean = len(rollout["tokens"]), None
        squares: ByModule = {}
        for piece in self._gradients(model, rollout, 1):
            square = products(piece, piece)
            squares = {name: squares.get(name, 0) + x for name, x in square.items()}
            mean = piece if mean is None else _add(mean, piece)
        signal = products(mean, mean)
        variance = {name: count * x - signal[name] for name, x in squares.items()}
        return Spread(mean, signal, variance, count)

    def _gradients(self, model: Transformer, rollout: Rollout, size: int) -> Iterator[Gradient]:
        """Yields the contribution of every `size` sequences to the gradient of the whole rollout."""
        if "coefficient" not in rollout:
            raise BadInput("the rollout has no coefficients: call judge(rollout, objective) first")
        shards = batch_shards(self.mesh)
        rows = -(-size // shards) * shards  # The rows after the sequences stay empty.
        whole = self._denominator(rollout) or 1.0
        for part in _parts(rollout, size):
            share = self._denominator(part) / whole
            with jax.set_mesh(self.mesh):
                inputs = {"coefficient": share * part["coefficient"]}
                batch, _ = self._batch(part, rows, inputs, part["loss_mask"])
                grads = self.programs.gradients(model, batch)[0]
            yield grads  # outside the block, so that the mesh is not set while the caller works

    def _denominator(self, rollout: Rollout) -> float:
        """The denominator of the aggregation, a sum over sequences."""
        objective = self.config.objective
        mask = rollout["loss_mask"]
        if not mask.any():
            return 0.0
        return float(token_weights(objective.aggregation, mask, objective.horizon)[1])

    def _batch(
        self,
        rollout: Rollout,
        rows: int,
        inputs: Mapping[str, np.ndarray],
        loss_mask: np.ndarray,
        pack: bool = False,
    ):
        """Returns `Programs.batch` of N ≤ rows sequences, padded with empty ones."""
        empty = rows - len(rollout["tokens"])
        names = ("tokens", "prompt_lengths", "response_lengths")
        (tokens, prompt_lengths, response_lengths), inputs, loss_mask = jax.tree.map(
            lambda a: np.pad(a, [(0, empty)] + [(0, 0)] * (a.ndim - 1)),
            (tuple(rollout[name] for name in names), dict(inputs), loss_mask),
        )
        return self.programs.batch(
            tokens, prompt_lengths, response_lengths, inputs, pack, loss_mask=loss_mask
        )


class Inspection(Analysis):
    """A run of `train`, opened for analysis.

    Args:
      workdir: the run's directory.
      mesh: sizes of the mesh axes, see `make_mesh`; None takes those of the run's config.

    Attributes:
      config: the run's resolved config.
      tokenizer, mesh, programs: as in `train`.
      checkpoints, rollouts: the saved steps, ascending. Checkpoint 20 is the model after step 20; it
        sampled the rollout of step 21.

    Raises:
      BadInput: there is no run, this version does not accept its config, or the mesh does not fit.
    """

    def __init__(self, workdir: str | Path, mesh: Mapping[str, Any] | None = None) -> None:
        self.workdir = path_of(workdir)
        config = FrozenConfigDict(run_config(self.workdir))
        with bad_input():
            device_mesh = make_mesh(**(config.mesh if mesh is None else mesh))
            self.tokenizer = data.make_tokenizer(config.data, config.model.path)
            programs = Programs(config, device_mesh, self.tokenizer.stop_ids)
        super().__init__(config, device_mesh, programs)
        self.checkpoints = saved_steps(self.workdir / "checkpoints")
        self.rollouts = list(saved_rollouts(self.workdir))

    def model(self, step: int | Literal["best"] | None = None) -> Transformer:
        """Loads the model of a checkpoint: the last one, the one of `step`, or the "best" one.

        Raises:
          BadInput: there is no checkpoint, or none of this step.
        """
        options = self.config.checkpoint
        directory = self.workdir / "checkpoints"
        with Checkpoints(directory, options.keep, options.best_metric) as checkpoints:
            step = checkpoints.best_step() if step == "best" else step
            step = _choose(step, self.checkpoints, f"{directory}: no checkpoint")
            with bad_input():
                like = {"model": self.programs.abstract_state.model}
                return checkpoints.restore(step, like)["model"]

    def rollout(self, step: int | None = None) -> Rollout:
        """Loads a saved rollout, the last one or the one of `step`; see `learner.record`.

        Raises:
          BadInput: there is no rollout (`train.save_rollout_every` sets how often one is saved), or
            none of this step.
        """
        step = _choose(
            step, self.rollouts, f"{self.workdir}: no rollout saved (train.save_rollout_every)"
        )
        return load_rollout(rollout_path(self.workdir, step))


@dataclasses.dataclass(frozen=True)
class Spread:
    """The spread of the gradients g_i of single sequences around their mean.

    g_i is N times the sequence's share of the gradient, so the mean over i is the gradient.

    Attributes:
      mean: the gradient, a tree like the model.
      signal: ‖mean‖² by module, see `products`. Chance alone contributes variance / N to it.
      variance: mean over i of ‖g_i − mean‖², by module.
      count: N.
    """

    mean: Gradient
    signal: ByModule
    variance: ByModule
    count: int


def open_model(
    config: FrozenConfigDict, workdir: Path, step: int | None = None
) -> tuple[Run, Transformer, str]:
    """Opens the model that a command analyzes: a checkpoint in the workdir, or model.path.

    Args:
      config: a resolved config; only its model must agree with the run's.
      workdir: directory of a run, or one without a run if model.path is set.
      step: step of the checkpoint; None: the latest.

    Returns:
      The config's mesh, programs and tokenizer as a `Run`; the model; and its path.

    Raises:
      BadInput: there is no such model, or it does not fit the config.
    """
    directory = checkpoint_directory(workdir, config)
    run = Run.create(config, workdir, train=False)
    with jax.set_mesh(run.mesh):
        if directory is None:
            return run, initial_model(run), config.model.path
        step, model = load_checkpoint(run, directory, step)
    return run, model, str(directory / str(step))


def judge(rollout: Rollout, name: str, **hyper: float | bool) -> Rollout:
    """Evaluates an objective at the `logp` of a rollout.

    Args:
      rollout: from `Inspection.score`, or as saved.
      name: a key of `OBJECTIVES`.
      **hyper: hyperparameters of the objective.

    Returns:
      The rollout with the `weight` w and the `coefficient` c [N, R] of the objective.

    Raises:
      ValueError: as `objectives.token_objective`. The top-k objectives need logprobs that a saved
        rollout does not hold.
    """
    mask = rollout["loss_mask"]
    arrays = {"mask": mask, "old_logp": rollout.get("old_logp")}
    needed = OBJECTIVES[name].arrays if name in OBJECTIVES else ()
    inputs = {k: v for k, v in arrays.items() if k in needed}
    logp, behavior_logp = rollout["logp"], rollout["behavior_logp"]
    advantage = by_token(rollout["advantage"])
    _, c = token_objective(name, logp, behavior_logp, advantage, **hyper, **inputs)
    w = gradient_weight(name, logp, behavior_logp, advantage, **hyper, **inputs)
    return rollout | {"weight": np.where(mask, w, 0), "coefficient": np.where(mask, c, 0)}


def select(rollout: Rollout, rows: slice | Sequence[int] | np.ndarray) -> Rollout:
    """Returns some sequences of a rollout; `rows` indexes the first axis as in NumPy."""
    whole = ("step", "piece_ids", "piece_texts")
    return {name: a if name in whole else a[rows] for name, a in rollout.items()}


def products(a: Gradient, b: Gradient) -> ByModule:
    """Returns the inner products ⟨a, b⟩ of two gradients by module.

    Returns:
      name → float64 array: [L] for the modules of every layer (attention, mlp or experts, router,
      norms), [] for embedding, head and final_norm; and their sums: "layer" [L], "total" [].
    """
    return {name: np.asarray(x, np.float64) for name, x in _products(a, b).items()}


def norms(grads: Gradient) -> ByModule:
    """Returns the L2 norms of a gradient by module, named and shaped as in `products`."""
    return {name: np.sqrt(x) for name, x in products(grads, grads).items()}


def cosines(a: Gradient, b: Gradient) -> ByModule:
    """Returns the cosines between two gradients by module, as `products`; NaN where one is zero."""
    ab, aa, bb = products(a, b), products(a, a), products(b, b)
    with np.errstate(invalid="ignore"):
        return {name: ab[name] / np.sqrt(aa[name] * bb[name]) for name in ab}


@jax.jit
def _products(a: Gradient, b: Gradient) -> dict[str, jax.Array]:
    sums: dict[str, Any] = {}
    for (path, x), y in zip(flatten(a).items(), jax.tree.leaves(b)):
        layers = path.startswith("blocks.")
        module = _module(path, x.ndim)
        product = jnp.sum(x * y, axis=tuple(range(layers, x.ndim)))
        sums[module] = sums.get(module, 0.0) + product
    layer = sum(x for x in sums.values() if x.ndim)
    return sums | {"layer": layer, "total": sum(map(jnp.sum, sums.values()))}


def _module(path: str, ndim: int) -> str:
    """The module of a parameter such as blocks.attention.q_proj."""
    if not path.startswith("blocks."):
        return {"embed": "embedding", "lm_head": "head"}.get(path, path)
    if path.endswith("norm"):
        return "norms"
    if path.endswith("router"):
        return "router"
    module = path.split(".")[1]
    return "experts" if module == "mlp" and ndim == 4 else module


@partial(jax.jit, donate_argnums=0)
def _add(total: Gradient, piece: Gradient) -> Gradient:
    return jax.tree.map(jnp.add, total, piece)


def _parts(rollout: Rollout, size: int) -> Iterator[Rollout]:
    count = len(rollout["tokens"])
    return (select(rollout, slice(i, i + size)) for i in range(0, count, size))


def _choose(step: int | None, steps: list[int], nothing: str) -> int:
    if not steps:
        raise BadInput(f"{nothing} yet")
    if step is not None and step not in steps:
        raise BadInput(f"{nothing} of step {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step
