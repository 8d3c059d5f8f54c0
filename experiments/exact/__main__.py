"""Level 1 of the laboratory: `python -m experiments.exact` runs the sweep and writes tables and
figures.

    python -m experiments.exact                                       # everything that is not cached
    python -m experiments.exact --cell=arm=drpo,learning_rate=0.01    # one cell, printed
    python -m experiments.exact --report                              # tables and figures only

Finished cells are cached, so that a sweep that was stopped goes on where it was.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from drpo_jax.errors import BadInput
from experiments.exact import workers

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "experiments" / "exact"


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cell", help="run this cell only, cached or not, and print it as JSON")
    parser.add_argument("--report", action="store_true", help="write tables and figures only")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of finished cells")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one per core")
    parser.add_argument("--seconds", type=float, help="stop starting cells after so many seconds")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv`."""
    options = arguments().parse_args(argv)
    workers.use_cpu()
    from experiments.exact import cells, report, sweep

    if options.cell is not None:
        cell = cells.parse(options.cell)
        print(json.dumps({"cell": cell.name, "result": cells.Runner()(cell)}))
        return
    if not options.report:
        planned = sweep.cells()
        workers.run(planned, options.cache, max(1, options.jobs), options.seconds)
        if remaining := len(list(cells.missing(options.cache, planned, cells.Setup()))):
            print(
                f"{remaining} of {len(planned)} cells are missing; run the command again to go on."
            )
            return
        report.collect(options.cache)
    report.write()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
