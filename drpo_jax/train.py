"""Trains a model by RL: python -m drpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

The same command on the same workdir resumes. At the end it prints a table of held-out accuracy before
and after training and a plot, and writes `learning.png`.

With --compare=NAME, a second run with the objective NAME follows, from the same warm start and with the
same seed (`counterpart`). It lives in `compare/NAME` below the workdir, and a table shows both runs side
by side at every evaluation.

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
from drpo_jax.config import has_warm_start, objective_summary
from drpo_jax.counterpart import counterpart, paired_table
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
COMPARE = flags.DEFINE_string(
    "compare",
    None,
    "Objective of a second run from the same warm start, in compare/NAME below the workdir.",
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
    compare: str | None = None,
) -> None:
    """Trains in `workdir` and prints the results.

    Args:
      config: a resolved config.
      workdir: directory of the run.
      explained: explain one update instead, see `explain_batch`.
      replay: directory of rollout files to learn from instead of sampling.
      profile: the steps to trace, see `loop.profile`.
      compare: objective of a second run, see `counterpart`; None: no second run.

    Raises:
      BadInput: the config, the problems, the files or the workdir do not fit together.
      TrainingStopped: the run cannot continue.
    """
    if explained:
        if replay is not None:
            raise BadInput("--explain_batch samples the batch that it explains; remove --replay")
        if compare is not None:
            raise BadInput("--explain_batch explains one objective; remove --compare")
        if page := explain_batch(config, workdir):
            print(page)
        return
    files = None if replay is None else path_of(replay)
    if compare is None:
        train(config, workdir, files, profile)
        return
    other, directory = counterpart(config, workdir, compare)  # A wrong name is an error at once.
    train(config, workdir, files, profile)
    print(
        f"\n--compare: the same run with {objective_summary(other)}, in {directory}\n", flush=True
    )
    train(other, directory, files, profile)
    if multihost.is_main():
        names, workdirs = (config.objective.name, compare), (workdir, directory)
        runs = dict(zip(names, map(read_metrics, workdirs)))
        print(f"\n{paired_table(runs, config.evaluate.samples)}")
        print(
            "\nOne seed: each difference includes the noise of two runs. Repeat it with other values of "
            f"--config.seed.\ncurves of both: drpo report --workdir={workdir} "
            f"--workdir={directory} --output=report.html"
        )


def train(config: FrozenConfigDict, workdir: Path, replay: Path | None, profile: str) -> None:
    """Trains in `workdir`, and prints a table and a plot of the run; the arguments are as in `main`."""
    evaluations = loop.train(config, workdir, replay, profile)
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
        lambda config, workdir: main(
            config, workdir, EXPLAIN.value, REPLAY.value, PROFILE.value, COMPARE.value
        )
    )
