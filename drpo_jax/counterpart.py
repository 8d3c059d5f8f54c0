"""The counterpart of a run: the same run with another objective, and a table of both.

Config, seed, problems, warm start and random streams are those of the run. The counterpart is a run of
its own in `compare/NAME` below the run's workdir. A directory of its own has its own config, lock and
checkpoints, so both runs resume independently. Below the run's, it can only ever belong to that run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import FrozenConfigDict

from drpo_jax.config import flatten, from_dict, has_warm_start, resolve
from drpo_jax.config.variants import objective_variant
from drpo_jax.errors import BadInput
from drpo_jax.metrics import Record, describe, reduce_values, series
from drpo_jax.metrics.console import NOTHING
from drpo_jax.metrics.metric import Column
from drpo_jax.objectives import OBJECTIVES, hyperparameters, resolve_hyper
from drpo_jax.objectives.choice import unknown
from drpo_jax.storage import is_remote

TRAINING_METRICS = ("reward/mean", "weight/corrected", "weight/masked", "policy/shift")


def counterpart(
    config: FrozenConfigDict, workdir: Path, name: str
) -> tuple[FrozenConfigDict, Path]:
    """Returns config and workdir of the same run with another objective.

    Hyperparameters that the config changes from their defaults carry over if the other objective has
    them and its boundary limits the same quantity; otherwise it has its own defaults. A reading of the
    threshold (`objective.threshold`) carries over to DRPO, its ablations and SPO.

    Args:
      config: the resolved config of the run.
      workdir: directory of the run.
      name: a key of `OBJECTIVES`.

    Raises:
      BadInput: the objective is unknown, is that of the run, or contradicts another field.
    """
    own = config.objective.name
    if name not in OBJECTIVES:
        raise BadInput(f"--compare={name}: {unknown('objective', name, OBJECTIVES)}")
    if name == own:
        raise BadInput(f"--compare={name}: the run has this objective already; name another one")
    values = flatten(config)
    values |= {f"objective.{n}": None for n in hyperparameters()}
    values |= {"objective.path": "", "objective.source": ""} | objective_variant(name)
    values |= {f"objective.{n}": value for n, value in _carried_over(config, name).items()}
    if has_warm_start(config) and not config.data.init_from:
        # Absolute, because the config must stay the same however --workdir is spelled.
        values["data.init_from"] = str(workdir if is_remote(workdir) else workdir.resolve())
    try:
        return resolve(from_dict(values)), workdir / "compare" / name
    except BadInput as error:
        raise BadInput(f"--compare={name}: {error}") from error


def _carried_over(config: FrozenConfigDict, name: str) -> dict[str, float | bool]:
    """Returns the hyperparameters that the config changes and that the objective `name` has, too."""
    own, other = OBJECTIVES[config.objective.name], OBJECTIVES[name]
    if own.boundary != other.boundary:
        return {}
    defaults = resolve_hyper(config.objective.name, {})
    read = own.threshold if config.objective.threshold else None
    values = {n: config.objective[n] for n in own.hyper if n in other.hyper and n != read}
    return {n: value for n, value in values.items() if value != defaults[n]}


def paired_table(runs: Mapping[str, Sequence[Record]], samples: int) -> str:
    """Formats both runs side by side, per evaluation, as a text table.

    Accuracies are those of the evaluation. The other columns are means over the logged steps since the
    evaluation before.

    Args:
      runs: the records of the run and of its counterpart, by the name of the objective.
      samples: the k of avg@k.
    """
    names = tuple(runs)
    columns = {"eval/avg": Column(f"avg@{samples} %", "11.1f")}
    columns |= {n: column for n in TRAINING_METRICS if (column := describe(n).column)}
    summaries = [_by_evaluation(records) for records in runs.values()]
    labels = (*names, " − ".join(names))
    width = max(map(len, labels)) + 2
    head = "".join(f"{c.title:>{len(format(0.0, c.format))}}" for c in columns.values())
    lines = [f"{'step':>6}  {'':<{width}}{head}"]
    for step in sorted(summaries[0].keys() & summaries[1].keys()):
        ours, theirs = (summary[step] for summary in summaries)
        difference = {n: ours[n] - theirs[n] for n in columns if n in ours and n in theirs}
        for i, (label, row) in enumerate(zip(labels, (ours, theirs, difference))):
            cells = "".join(_cell(n, c, row, "+" * (i == 2)) for n, c in columns.items())
            lines.append(f"{step if i == 0 else '':>6}  {label:<{width}}{cells}")
    return "\n".join(lines)


def _by_evaluation(records: Sequence[Record]) -> dict[int, Record]:
    """Returns {step of an evaluation: accuracy, and the metrics of the steps since the one before}."""
    summary, before = {}, -1
    for step, accuracy in zip(*series(records, "eval/avg")):
        since = [record for record in records if before < record["step"] <= step]
        values = {name: series(since, name)[1] for name in TRAINING_METRICS}
        means = {name: reduce_values(name, v) for name, v in values.items() if v}
        summary[step], before = {"eval/avg": accuracy} | means, step
    return summary


def _cell(name: str, column: Column, row: Record, sign: str) -> str:
    if name not in row:
        return f"{NOTHING:>{len(format(0.0, column.format))}}"
    return format(describe(name).scale * row[name], sign + column.format)
