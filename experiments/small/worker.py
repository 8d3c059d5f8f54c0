"""A process that runs cells: one JSON object per line in, one out.

    in   {"run": CELL, "workdir": DIRECTORY}         out  the result of the cell
    in   {"warm_start": CELL, "workdir": DIRECTORY}  out  {}

`CELL` is the id of a cell. An error is returned as {"error": TEXT}. What the runs print goes to the
standard error.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from drpo_jax.cli import use_compilation_cache
from experiments.small.cell import Bench, make_warm_start
from experiments.small.plan import Cell


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Prints of the runs must not mix with replies.
    benches: dict[str, Bench] = {}
    for line in sys.stdin:
        request = json.loads(line)
        workdir = request["workdir"]
        try:
            if "warm_start" in request:
                make_warm_start(Cell.parse(request["warm_start"]), Path(workdir))
                reply = {}
            else:
                bench = benches.setdefault(workdir, Bench(Path(workdir)))
                reply = bench.run(Cell.parse(request["run"]))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    use_compilation_cache("auto")
    main()
