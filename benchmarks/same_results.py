"""Checks that a refactoring changed no result: python -m benchmarks.same_results BASE [HEAD]

Trains six steps of four small runs on two commits in turn, with the current environment, and compares
their `metrics.jsonl`. HEAD defaults to the working tree. Metrics that describe time or compilation are
left out, and so are metrics that only one of the two commits logs (they are listed). Exits with 0 if
every other number agrees bit for bit, or to within --tolerance.

Results are kept in --results (one directory per commit), so that a second comparison against the same
BASE trains only HEAD.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {
    "tiny-fp8_rollout": "configs/tiny.py:fp8_rollout",
    "tiny-float32": "configs/tiny.py:float32",
    "qwen3_5-smoke": "configs/qwen3_5_35b_a3b.py:smoke",
    "qwen3-fp8_e2e-smoke": "configs/qwen3_30b_a3b.py:fp8_e2e,smoke",
}
SETTINGS = ("train.steps=6", "train.save_rollout_every=0", "checkpoint.keep=1")
UNCOMPARED = ("time/", "compile/", "tokens_per_second")


def train(tree: Path, config: str, workdir: Path) -> list[dict]:
    """Runs `config` in the checkout `tree` unless `workdir` holds the finished run; its records."""
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
    """{run: records} of a commit, or of the working tree (never kept) for None."""
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
    """(a line for every number that differs, the metrics that only one side has)."""
    found: list[str] = []
    one_sided: set[str] = set()
    if [record["step"] for record in base] != [record["step"] for record in head]:
        found.append("the logged steps differ")
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
                found.append(f"step {old['step']}, {name}: {a!r} -> {b!r}")
    return found, one_sided


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("head", nargs="?", help="the commit to check (default: the working tree)")
    parser.add_argument(
        "--run", action="append", choices=RUNS, help="only this run; may be repeated"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="absolute and relative; 0: bits"
    )
    parser.add_argument("--steps", type=int, help="compare only records up to this step")
    parser.add_argument("--results", type=Path, default=Path("runs/same_results"))
    args = parser.parse_args()
    names = args.run or list(RUNS)
    base = results(args.base, args.results, names)
    head = results(args.head, args.results, names)
    failed = False
    for name in names:
        kept = [
            [r for r in records if args.steps is None or r["step"] <= args.steps]
            for records in (base[name], head[name])
        ]
        found, one_sided = differences(*kept, args.tolerance)
        failed |= bool(found)
        print(f"{name}: {f'{len(found)} numbers differ' if found else 'the same'}")
        print("".join(f"  {line}\n" for line in found[:20]), end="")
        if one_sided:
            print(f"  logged by one commit only: {', '.join(sorted(one_sided))}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
