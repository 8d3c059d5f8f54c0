"""Trains a model by RL: python -m drpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

The same command on the same workdir resumes. At the end: a table of held-out accuracy before and
after, a plot in the terminal, and `learning.png`.

With --explain_batch it makes one update on the first `train.mini_batch_prompts` problems and prints how
one of them came to the gradient.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from drpo_jax import cli, loop
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics, summary_table, text_plot
from drpo_jax.parallel import multihost
from drpo_jax.reporting.curves import plot_run
from drpo_jax.reporting.explain import explain

EXPLAIN = flags.DEFINE_bool(
    "explain_batch",
    False,
    "Make one update, print a problem's way to the gradient, and leave the workdir as it is.",
)


def main(config, workdir, explained=False):
    if explained:
        if page := explain_batch(config, workdir):
            print(page)
        return
    evaluations = loop.train(config, workdir)
    if evaluations is None:  # not the first process
        return
    before, after = evaluations
    print("\n" + summary_table(before, after, config.evaluate.samples))
    records = read_metrics(workdir)
    print("\n" + text_plot(records))
    compiled = [r for r in records if r.get("compile/count")]
    if compiled:
        count, seconds = (sum(r[f"compile/{k}"] for r in compiled) for k in ("count", "seconds"))
        last = compiled[-1]["step"]
        print(f"\n{count:.0f} programs compiled in {seconds:.0f} s, the last in step {last}")
    print(f"\nmetrics: {workdir / 'metrics.jsonl'}   plot: {plot_run(workdir)}")


def explain_batch(config, workdir):
    """`explain` of one update on the first `train.mini_batch_prompts` problems; where the run's warm
    start is not there, of a model without one. "" on all processes but the first."""
    config = ConfigDict(config)
    config.train.update(save_rollout_every=1, prompts=config.train.mini_batch_prompts)
    run = loop.Run(FrozenConfigDict(config), workdir)
    print(run.report + "making one step: a minute or two on a CPU\n", flush=True)
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as directory:
        model = loop.initial_model(run, supervise=False)
        if config.objective.kl != "none":
            run.reference = model
            model = jax.tree.map(jnp.copy, model)  # the update donates it
        run.workdir = Path(directory)
        loop.rl_step(run, run.programs.restart(model), 0)
        if not multihost.is_main():
            return ""
        return explain(load_rollout(rollout_path(run.workdir, 0)), run.tokenizer, config)


if __name__ == "__main__":
    cli.launch(lambda config, workdir: main(config, workdir, EXPLAIN.value))
