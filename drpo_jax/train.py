"""Trains a model by RL: python -m drpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

The same command on the same workdir resumes. At the end it prints a table of held-out accuracy before
and after training and a plot, and writes `learning.png`.

With --explain_batch it makes one update on the first `train.mini_batch_prompts` problems and prints how
one of them contributes to the gradient; the workdir is left unchanged.

With --replay=DIR, it learns from rollout files (`learner.rollout_file`) instead of sampling. Runs save
such files, and other engines can write them.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from drpo_jax import cli, loop
from drpo_jax.config import has_warm_start
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics, summary_table, text_plot
from drpo_jax.parallel import multihost
from drpo_jax.reporting.explain import explain
from drpo_jax.storage import path_of

EXPLAIN = flags.DEFINE_bool(
    "explain_batch",
    False,
    "Make one update, print how one problem contributes to it, and leave the workdir unchanged.",
)
REPLAY = flags.DEFINE_string(
    "replay", None, "Directory of rollout files to learn from instead of sampling."
)
PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "Steps to trace for xprof, such as 3, or 3:5 for steps 3 to 5; written to profile/ in the workdir.",
)


def main(
    config: FrozenConfigDict,
    workdir: Path,
    explained: bool = False,
    replay: str | None = None,
    profile: str = "",
) -> None:
    """Trains in `workdir` and prints the results.

    Args:
      config: a resolved config.
      workdir: directory of the run.
      explained: explain one update instead, see `explain_batch`.
      replay: directory of rollout files to learn from instead of sampling.
      profile: the steps to trace, see `loop.profile`.

    Raises:
      BadInput: the config, the problems, the files or the workdir do not fit together.
      TrainingStopped: the run cannot continue.
    """
    if explained:
        if replay is not None:
            raise BadInput("--explain_batch samples the batch that it explains; remove --replay")
        if page := explain_batch(config, workdir):
            print(page)
        return
    files = None if replay is None else path_of(replay)
    evaluations = loop.train(config, workdir, files, profile)
    if evaluations is None:  # not the first process
        return
    before, after = evaluations
    if missing := [str(r["step"]) for r in (before, after) if "eval/avg" not in r]:
        print(f"\nmetrics.jsonl lacks the evaluation of step {' and of step '.join(missing)}")
    else:
        print("\n" + summary_table(before, after, config.evaluate.samples))
    from drpo_jax.reporting.curves import plot_run  # matplotlib takes a second to import

    print("\n" + text_plot(read_metrics(workdir), config.evaluate.samples))
    print(f"\nmetrics: {workdir / 'metrics.jsonl'}   plot: {plot_run(workdir)}")


def explain_batch(config: FrozenConfigDict, workdir: Path) -> str:
    """Makes one update from the run's initial model on the first `train.mini_batch_prompts` problems.

    Returns:
      The page of `reporting.explain` about it; "" on all processes but the first. The page begins with
      a warning if the run's warm start is missing and a random model takes its place.
    """
    changed = ConfigDict(config)
    changed.train.update(save_rollout_every=1, prompts=config.train.mini_batch_prompts)
    changed.train.update(staleness=0, dynamic_sampling=False, partial_tokens=0)
    run = loop.Run.create(FrozenConfigDict(changed), workdir)
    print(run.report + "making one update: a minute or two on a CPU\n", flush=True)
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as directory:
        model = loop.warm_start.existing_model(run)
        warning = _warning(config, workdir) if model is None and has_warm_start(config) else ""
        if model is None:
            model = loop.warm_start.random_model(run)
        run = dataclasses.replace(run, workdir=Path(directory))
        if config.objective.kl != "none":
            # The update donates the arrays of its model.
            run = dataclasses.replace(run, reference=jax.tree.map(jnp.copy, model))
        collector = loop.Collector()
        loop.rl_step(run, collector, run.programs.restart(model), 0, first=True)
        run.writer.wait()
        if not multihost.is_main():
            return ""
        page = explain(load_rollout(rollout_path(run.workdir, 1)), run.tokenizer, run.config)
    return warning + page


def _warning(config, workdir):
    return (
        f"WARNING: the model is random, because {workdir} holds no finished warm "
        "start.\nIts responses are noise, and so are their rewards; the arithmetic "
        "below is the same as in any update.\nFor the model that training starts from, first run\n"
        f"    python -m drpo_jax.sft --config=… --workdir={workdir}\n\n"
    )


if __name__ == "__main__":
    cli.launch(
        lambda config, workdir: main(config, workdir, EXPLAIN.value, REPLAY.value, PROFILE.value)
    )
