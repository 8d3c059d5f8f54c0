"""Supervised warm start: python -m drpo_jax.sft --config=configs/tiny.py --workdir=runs/warm

Trains on the task's demonstrations (`config.sft`) and saves checkpoints that RL starts from with
`--config.data.init_from=runs/warm`. Without data.init_from, `drpo_jax.train` makes the same warm start
itself.
"""

from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from drpo_jax import cli, loop
from drpo_jax.errors import BadInput
from drpo_jax.evaluation import evaluate


def main(config: FrozenConfigDict, workdir: Path) -> None:
    """Makes the warm start in `workdir` and prints its held-out accuracy.

    Raises:
      BadInput: the config has no supervised updates or starts from another warm start, or the workdir
        holds another run.
      TrainingStopped: too many updates in a row were not finite.
    """
    if not config.sft.steps:
        raise BadInput("sft.steps = 0: set the number of supervised updates")
    if config.data.init_from:
        raise BadInput(
            f"data.init_from = {config.data.init_from!r}: must be empty, because drpo_jax.sft makes a "
            "warm start; drpo_jax.train starts from one"
        )
    run = loop.Run.create(config, workdir)
    with loop.claim(run) as run, jax.set_mesh(run.mesh):
        metrics = evaluate(run, loop.make_warm_start(run))
    print("held-out: " + "   ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"start RL from it with --config.data.init_from={workdir}")


if __name__ == "__main__":
    cli.launch(main)
