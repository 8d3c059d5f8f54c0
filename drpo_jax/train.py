"""Trains a model by RL: python -m drpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

The same command on the same workdir resumes. At the end: a table of held-out accuracy before and
after, a plot in the terminal, and `learning.png`.
"""

from drpo_jax import cli, loop
from drpo_jax.metrics import plot_run, read_metrics, summary_table, text_plot


def main(config, workdir):
    before, after = loop.train(config, workdir)
    print("\n" + summary_table(before, after, config.evaluate.samples))
    print("\n" + text_plot(read_metrics(workdir)))
    print(f"\nmetrics: {workdir / 'metrics.jsonl'}   plot: {plot_run(workdir)}")


if __name__ == "__main__":
    cli.launch(main)
