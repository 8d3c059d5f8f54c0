"""Evaluates several objectives on the same rollouts.

    drpo compare --config=configs/tiny.py --workdir=runs/tiny --rollouts=FILE --output=PAGE.html

The model is a checkpoint of the run in the workdir, or model.path if the workdir contains no run. The
file is Parquet (`learner.rollout_file`) or a saved rollout of a run. The command prints a table of
gradient norms, cosines, fractions of masked and corrected tokens, and Σ|c| by µ. --output writes it as
a self-contained page, and as JSON next to the page.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import FrozenConfigDict

from drpo_jax import cli
from drpo_jax.comparison import (
    Judgment,
    comparable,
    compare_objectives,
    file_advantages,
    left_out,
    table,
    to_json,
)
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.inspection import Analysis, open_model
from drpo_jax.learner.rollout_checks import Limits, read_rollouts
from drpo_jax.learner.rollout_file import advantages_differ
from drpo_jax.parallel import multihost
from drpo_jax.reporting.comparison import comparison_page
from drpo_jax.storage import path_of, write_whole


def main(
    config: FrozenConfigDict,
    workdir: Path,
    rollouts: str | None,
    objectives: list[str] | None = None,
    output: str | None = None,
    step: int | None = None,
) -> None:
    """Compares objectives on the file `rollouts`, prints tables, and writes the page.

    Args:
      config: a resolved config, whose advantage, aggregation and hyperparameters apply.
      workdir: directory of a run, or one without a run if model.path is set.
      rollouts: the rollout file.
      objectives: names in `OBJECTIVES`; None: all whose arrays a file contains.
      output: the HTML file to write; None: none.
      step: step of the checkpoint; None: the latest.

    Raises:
      BadInput: a flag is missing or wrong, the file fails a check, or there is no such model.
    """
    if not rollouts:
        raise BadInput("--rollouts=FILE is missing, for example --rollouts=rollouts.parquet")
    if output and not output.endswith(".html"):
        raise BadInput(f"--output={output}: must be a file that ends with .html")
    with bad_input():
        comparable(objectives, config)  # A wrong name is an error before the file is read.
        limits = Limits.of(config, samples=False)
        rollout = read_rollouts(path_of(rollouts), limits, config.train.samples)
        names = comparable(objectives, config, advantages_differ(rollout))
        advantage = file_advantages(rollout, config)
    if not advantage.any():
        raise BadInput(
            f"{rollouts}: all advantages are 0, so no objective has a gradient; use a file in which the "
            "rewards of some group differ, or whose column advantage is not all 0"
        )
    if config.train.overlong_filtering:
        rollout["loss_mask"] = rollout["loss_mask"] & rollout["finished"][:, None]
    run, model, name = open_model(config, workdir, step)
    print(
        f"{len(names)} objective{'s' * (len(names) != 1)} on {len(advantage):,} responses, {name} …",
        flush=True,
    )
    analysis = Analysis(run.config, run.mesh, run.programs)
    scored = analysis.score(model, rollout) | {"advantage": advantage}
    judgments = compare_objectives(analysis, model, scored, names)
    print(f"\n{table(judgments)}")
    if without := left_out(config):
        print(f"\nWithout effect here: {without}")
    if output and multihost.is_main():
        facts = {
            "rollouts": f"{rollouts}: {len(advantage):,} responses",
            "model": name,
            "advantage": "the file's" if "advantage" in rollout else config.objective.advantage,
            "aggregation": config.objective.aggregation,
        }
        _write(path_of(output), judgments, facts | ({"without effect": without} if without else {}))


def _write(page: Path, judgments: Sequence[Judgment], facts: Mapping[str, str]) -> None:
    """Writes the page, and a JSON file next to it."""
    summary = page.with_suffix(".json")
    with bad_input():
        write_whole(page, comparison_page(judgments, facts))
        write_whole(
            summary, json.dumps({**facts, "objectives": to_json(judgments)}, indent=2) + "\n"
        )
    print(f"\n{page}, {summary}")


def launch() -> None:
    """Defines the flags and runs `main`."""
    rollouts = flags.DEFINE_string("rollouts", None, "Rollout file to compare on.")
    objectives = flags.DEFINE_list(
        "objectives", None, "Objectives to compare, separated by commas; default: all."
    )
    output = flags.DEFINE_string(
        "output", None, "The HTML file to write, with a JSON file next to it; default: none."
    )
    step = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the latest.")
    cli.launch(
        lambda config, workdir: main(
            config, workdir, rollouts.value, objectives.value, output.value, step.value
        )
    )


if __name__ == "__main__":
    launch()
