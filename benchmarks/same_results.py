"""Checks that a refactoring changed no result: python -m benchmarks.same_results BASE [HEAD]

Trains six steps of four small runs on two commits in turn, with the current environment, and
compares their `metrics.jsonl`. HEAD defaults to the working tree. Metrics of time and compilation
are left out, and so are metrics that only one of the two commits logs (they are listed). Exits with
0 if every other number agrees bit for bit, or to within --tolerance, and with 1 otherwise.

--results keeps the results of each commit, so that a second comparison with the same BASE trains only
HEAD.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from drpo_jax.storage import path_of

RUNS = {
    "tiny-fp8_rollout": "configs/tiny.py:fp8_rollout",
    "tiny-float32": "configs/tiny.py:float32",
    "qwen3_5-smoke": "configs/qwen3_5_35b_a3b.py:smoke",
    "qwen3-fp8_e2e-smoke": "configs/qwen3_30b_a3b.py:fp8_e2e,smoke",
}
SETTINGS = ("train.steps=6", "train.save_rollout_every=0", "checkpoint.keep=1")
UNCOMPARED = ("time/", "compile/", "tokens_per_second")
RUN = flags.DEFINE_multi_enum("run", list(RUNS), list(RUNS), "Run to compare; may be repeated.")
TOLERANCE = flags.DEFINE_float("tolerance", 0.0, "Absolute and relative tolerance; 0: bit for bit.")
STEPS = flags.DEFINE_integer("steps", None, "Compare the records up to this step only.")
RESULTS = flags.DEFINE_string("results", "runs/same_results", "Directory of the kept results.")


def train(tree: Path, config: str, workdir: Path) -> list[dict]:
    """Trains `config` in the checkout `tree`, unless `workdir` holds the finished run.

    Returns:
      The records of metrics.jsonl.
    """
    done = workdir / "done"
    if not done.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "drpo_jax.train", f"--config={config}"]
        command += [f"--workdir={workdir}", *(f"--config.{setting}" for setting in SETTINGS)]
        with (workdir / "log.txt").open("w") as log:
            subprocess.run(command, cwd=tree, stdout=log, stderr=subprocess.STDOUT, check=True)
        done.touch()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(commit: str | None, directory: Path, names: list[str]) -> dict[str, list[dict]]:
    """Returns {run: records} of a commit, or of the working tree (never kept) for None."""
    if commit is None:
        with tempfile.TemporaryDirectory() as scratch:
            return {name: train(Path.cwd(), RUNS[name], Path(scratch) / name) for name in names}
    sha = subprocess.check_output(["git", "rev-parse", commit], text=True).strip()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(tree), sha], check=True
        )
        try:
            kept = directory.resolve() / sha[:12]
            return {name: train(tree, RUNS[name], kept / name) for name in names}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def differences(base: list[dict], head: list[dict], tolerance: float) -> tuple[list[str], set[str]]:
    """Returns a line for every number that differs, and the metrics that only one side has."""
    lines: list[str] = []
    one_sided: set[str] = set()
    if [record["step"] for record in base] != [record["step"] for record in head]:
        lines.append("the logged steps differ")
    for old, new in zip(base, head):
        one_sided |= old.keys() ^ new.keys()
        for name in old.keys() & new.keys():
            a, b = old[name], new[name]
            if name.startswith(UNCOMPARED) or a == b:
                continue
            if (
                a is None
                or b is None
                or not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
            ):
                lines.append(f"step {old['step']}, {name}: {a!r} -> {b!r}")
    return lines, one_sided


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3):
        raise app.UsageError("give BASE, and HEAD unless it is the working tree")
    names, directory = list(dict.fromkeys(RUN.value)), path_of(RESULTS.value)
    base = results(arguments[1], directory, names)
    head = results((*arguments, None)[2], directory, names)
    failed = False
    for name in names:
        records = [
            [r for r in side[name] if STEPS.value is None or r["step"] <= STEPS.value]
            for side in (base, head)
        ]
        lines, one_sided = differences(*records, TOLERANCE.value)
        failed |= bool(lines)
        print(f"{name}: {f'{len(lines)} numbers differ' if lines else 'the same'}")
        print("".join(f"  {line}\n" for line in lines[:20]), end="")
        if one_sided:
            print(f"  logged by one commit only: {', '.join(sorted(one_sided))}")
    return int(failed)


if __name__ == "__main__":
    app.run(main)
