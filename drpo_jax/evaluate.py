"""Held-out accuracy: python -m drpo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny

Evaluates the last checkpoint of the run in the workdir (the warm start's, where RL has none yet),
unquantized, on `config.evaluate`. The config may differ from the run's in all but the model, and the
run is left as it is. Prints a table and writes into the workdir

  evaluate.json   checkpoint, step, k, temperature, and `accuracy`: for "all" problems and for each
                  kind their number and, by metric (avg@k, pass@j for j = 2, 4, … and k, maj@k,
                  greedy), {"mean", "low", "high"}: shares, with the 95 % bootstrap interval
  evaluate.jsonl  one object per response: problem, mode (avg or greedy), text, reward
"""

import json

import jax
import numpy as np

from drpo_jax import cli, loop
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.config import BadInput, bad_input, flatten, from_json
from drpo_jax.statistics import bootstrap_interval, last_answer, majority, pass_at_k


def main(config, workdir):
    directory = check_workdir(workdir, config)
    run = loop.Run(config, workdir)
    with jax.set_mesh(run.mesh):
        with Checkpoints(directory) as checkpoints:
            step = checkpoints.latest_step()
            with bad_input():
                like = {"model": run.programs.abstract_state.model}
                model = checkpoints.restore(step, like)["model"]
        generations = []
        loop.evaluate(run, model, generations)
    result = {
        "checkpoint": str(directory / str(step)),
        "step": step,
        "k": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "accuracy": accuracy(generations),
    }
    (workdir / "evaluate.json").write_text(json.dumps(result, indent=2) + "\n")
    (workdir / "evaluate.jsonl").write_text("".join(json.dumps(g) + "\n" for g in generations))
    print(f"{result['checkpoint']}: held-out accuracy, % (95 % interval)\n")
    print(table(result["accuracy"]))


def check_workdir(workdir, config):
    """The directory of the checkpoints to evaluate.

    Raises:
      BadInput: the workdir holds no run, another model's, one without a checkpoint, or one that
        trained on problems that this config holds out.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise BadInput(
            f"{workdir} holds no run (there is no config.json); give the --workdir of one"
        )
    try:
        theirs = flatten(from_json(path.read_text()))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    ours = flatten(config)
    # With a file of problems, these fields decide which of them are held out.
    same = ours["data.problems"] == theirs["data.problems"] != "" and not ours["evaluate.sets"]
    split = ("seed", "evaluate.problems", "data.filter") if same else ()
    differing = [
        f"{field}: {theirs[field]!r} -> {ours[field]!r}"
        for field in ours
        if (field.startswith("model.") or field in split)
        and ours[field] != theirs[field]
        and field != "model.path"
    ]
    if differing:
        raise BadInput(
            f"{workdir} holds a run with another model or other held-out problems (its value -> "
            "this config's value):\n  " + "\n  ".join(differing)
        )
    for directory in (workdir / "checkpoints", workdir / "sft" / "checkpoints"):
        with Checkpoints(directory) as checkpoints:
            if checkpoints.latest_step() is not None:
                return directory
    raise BadInput(f"{workdir} has no checkpoint yet")


def accuracy(generations):
    """The metrics of `evaluate.json` by kind of problem, from the generations of `loop.evaluate`."""
    problems = {}
    for g in generations:
        problem = problems.setdefault(g["id"], {"kind": g["kind"], "avg": [], "greedy": []})
        problem[g["mode"]].append((last_answer(g["response"]), g["reward"]))
    groups = {"all": list(problems.values())}
    kinds = sorted({problem["kind"] for problem in problems.values()})
    for kind in kinds if len(kinds) > 1 else ():
        groups[kind] = [problem for problem in problems.values() if problem["kind"] == kind]
    return {name: {"problems": len(group)} | _estimates(group) for name, group in groups.items()}


def _estimates(problems):
    right = np.array([[reward for _, reward in problem["avg"]] for problem in problems])
    k = right.shape[1]
    values = {f"avg@{k}": right.mean(1)}
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    values |= {f"pass@{j}": pass_at_k(right, j) for j in sizes if j > 1}
    values[f"maj@{k}"] = [majority(*zip(*problem["avg"])) for problem in problems]
    if problems[0]["greedy"]:
        values["greedy"] = [problem["greedy"][0][1] for problem in problems]
    intervals = {name: bootstrap_interval(v) for name, v in values.items()}
    return {
        name: {"mean": float(np.mean(v)), "low": intervals[name][0], "high": intervals[name][1]}
        for name, v in values.items()
    }


def table(accuracy):
    """The accuracies in percent as an aligned text table."""
    names = [name for name in accuracy["all"] if name != "problems"]
    lines = [f"{'':<12}{'problems':>8}" + "".join(f" | {name:^19}" for name in names)]
    lines.append("-" * 20 + ("-+-" + "-" * 19) * len(names))
    for group, metrics in accuracy.items():
        cells = [[100 * metrics[name][part] for part in ("mean", "low", "high")] for name in names]
        row = "".join(f" | {mean:>5.1f} ({low:>5.1f}–{high:>5.1f})" for mean, low, high in cells)
        lines.append(f"{group:<12}{metrics['problems']:>8}{row}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.launch(main)
