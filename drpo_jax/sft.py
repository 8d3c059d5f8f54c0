"""Supervised learning: python -m drpo_jax.sft --config=configs/tiny.py --workdir=runs/warm

Trains on chats or prompts with responses (`sft.files`), on the correct responses of another run
(`--from_rollouts=DIR`, which sets `sft.rollouts`), or on the task's demonstrations. RL starts from the
saved checkpoints with `--config.data.init_from=runs/warm`. Without data.init_from, `drpo_jax.train`
does the same before RL.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from drpo_jax import cli, loop
from drpo_jax.config import has_warm_start
from drpo_jax.errors import BadInput
from drpo_jax.evaluation import evaluate

FROM_ROLLOUTS = flags.DEFINE_string(
    "from_rollouts",
    None,
    "Train on the correct responses in the saved rollouts of the run in this directory "
    "(rejection sampling); sets sft.rollouts.",
)


def main(config: FrozenConfigDict, workdir: Path) -> None:
    """Trains in `workdir` and prints the held-out accuracy.

    Raises:
      BadInput: the config has no supervised updates or starts from another warm start, the examples are
        malformed, or the workdir holds another run.
      TrainingStopped: too many updates in a row were not finite.
    """
    if not has_warm_start(config):
        raise BadInput(
            "sft.steps = 0, sft.epochs = 0: set the number of supervised updates, or of passes over "
            "the examples"
        )
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


def _with_rollouts(config: ConfigDict) -> ConfigDict:
    """Returns the config with --from_rollouts as sft.rollouts."""
    if FROM_ROLLOUTS.value:
        config.sft.rollouts = FROM_ROLLOUTS.value
    return config


if __name__ == "__main__":
    cli.launch(main, prepare=_with_rollouts)
