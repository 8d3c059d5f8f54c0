"""Adds a model's logprobs to a rollout file, and compares them with the engine's.

    drpo score --config=configs/tiny.py --workdir=runs/tiny --rollouts=FILE --output=SCORED.parquet

The model is a checkpoint of the run in the workdir, or model.path if the workdir contains no run. The
file is Parquet (`learner.rollout_file`) or a saved rollout of a run. The output is the same file with
the columns `logp` and `entropy`. The command prints a table of the mismatch and writes it as JSON next
to the output.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import FrozenConfigDict

from drpo_jax import cli
from drpo_jax.comparison import file_advantages, plain
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.inspection import Analysis, open_model
from drpo_jax.learner.rollout_checks import Limits, padded_arrays
from drpo_jax.learner.rollout_file import load_table, with_tokens, write_rollouts
from drpo_jax.parallel import multihost
from drpo_jax.reporting.mismatch import mismatch_report, mismatch_text
from drpo_jax.storage import path_of, write_whole


def main(
    config: FrozenConfigDict,
    workdir: Path,
    rollouts: str | None,
    output: str | None,
    step: int | None = None,
) -> None:
    """Scores the file `rollouts`, writes `output` and the JSON file next to it, and prints tables.

    Args:
      config: a resolved config.
      workdir: directory of a run, or one without a run if model.path is set.
      rollouts: the rollout file.
      output: the Parquet file to write.
      step: step of the checkpoint; None: the latest.

    Raises:
      BadInput: a flag is missing or wrong, the file breaks a rule, or there is no such model.
    """
    if not rollouts:
        raise BadInput("--rollouts=FILE is missing, for example --rollouts=rollouts.parquet")
    if not output:
        raise BadInput("--output=FILE is missing, for example --output=scored.parquet")
    if not output.endswith(".parquet"):
        raise BadInput(f"--output={output}: must be a file that ends with .parquet")
    with bad_input():
        source, target = path_of(rollouts), path_of(output)
        if source == target:
            raise BadInput(f"--output={output}: is the file to score; name another one")
        table = load_table(source.read_bytes(), source, config.train.samples)
        rollout = padded_arrays(table, source, Limits.of(config, samples=False))
        advantage = file_advantages(rollout, config)
    run, model, name = open_model(config, workdir, step)
    print(f"scoring {len(rollout['tokens']):,} responses with {name} …", flush=True)
    scored = Analysis(run.config, run.mesh, run.programs).score(model, rollout)
    if not multihost.is_main():
        return
    report = mismatch_report(scored, advantage, config, run.tokenizer.piece)
    summary = target.with_suffix(".json")
    with bad_input():
        write_rollouts(target, with_tokens(table, scored, "logp", "entropy"))
        write_whole(summary, json.dumps({"model": name} | plain(report), indent=2) + "\n")
    print(f"\n{mismatch_text(report)}\n\n{target}, {summary}")


def launch() -> None:
    """Defines the flags and runs `main`."""
    rollouts = flags.DEFINE_string("rollouts", None, "File of rollouts to score.")
    output = flags.DEFINE_string(
        "output", None, "The Parquet file to write; the tables go into a JSON file next to it."
    )
    step = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the latest.")
    cli.launch(
        lambda config, workdir: main(config, workdir, rollouts.value, output.value, step.value)
    )


if __name__ == "__main__":
    launch()
