"""Trains a model by RL: python -m drpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

The same command on the same workdir resumes. At the end: a table of held-out accuracy before and
after, a plot in the terminal, and `learning.png`.
"""

from drpo_jax import cli, loop
from drpo_jax.metrics import plot_run, read_metrics, summary_table, text_plot


def main(config, workdir):
    before, after = loop.train(config, workdir)
    print("\n" + summary_table(before, after, config.evaluate.samples))
    records = read_metrics(workdir)
    print("\n" + text_plot(records))
    compiled = [r for r in records if r.get("compile/count")]
    if compiled:
        count, seconds = (sum(r[f"compile/{k}"] for r in compiled) for k in ("count", "seconds"))
        last = compiled[-1]["step"]
        print(f"\n{count:.0f} programs compiled in {seconds:.0f} s, the last in step {last}")
    print(f"\nmetrics: {workdir / 'metrics.jsonl'}   plot: {plot_run(workdir)}")


if __name__ == "__main__":
    cli.launch(main)
