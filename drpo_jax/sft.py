"""Supervised warm start: python -m drpo_jax.sft --config=configs/tiny.py --workdir=runs/warm

Learns the task's demonstrations (`config.sft`) and writes a checkpoint that RL starts from with
`--config.data.init_from=runs/warm`. `drpo_jax.train` runs the same by itself when none is given.
"""

import jax

from drpo_jax import cli, loop
from drpo_jax.errors import BadInput


def main(config, workdir):
    if not config.sft.steps:
        raise BadInput("sft.steps = 0: there is nothing to learn; give the number of updates")
    if config.data.init_from:
        raise BadInput(
            "data.init_from is for drpo_jax.train: this run makes a warm start of its own"
        )
    run = loop.Run(config, workdir)
    loop.claim(run)
    with jax.set_mesh(run.mesh):
        model = loop.supervised(run)
        metrics = loop.evaluate(run, model)
    print("held-out: " + "   ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"start RL from it with --config.data.init_from={workdir}")


if __name__ == "__main__":
    cli.launch(main)
