"""Writes one HTML page about runs: python -m drpo_jax.report --workdir=DIR … --output=FILE.html

The page is self-contained: inline SVG, no script, nothing is fetched. Runs whose configs are equal
except for the seed form a group, with one color, one line, and a band over its runs. Whatever a run did
not log or save is left out, with a note in its place.
"""

from collections.abc import Sequence

from absl import flags

from drpo_jax import cli
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.reporting.page import plural, render
from drpo_jax.reporting.runs import group_runs, load_run
from drpo_jax.storage import path_of


def main(workdirs: Sequence[str], output: str | None, rest: Sequence[str] = ()) -> None:
    """Writes the page about the runs in `workdirs` to `output`.

    Args:
      workdirs: directories of runs; repeated ones count once.
      output: the HTML file to write.
      rest: arguments of the command line that are not flags.

    Raises:
      BadInput: a flag is missing, `rest` is not empty, a workdir holds no run or a damaged one, or the
        file cannot be written.
    """
    if rest:
        raise BadInput(f"{rest[0]}: not a flag; give every directory its own --workdir=DIR")
    if not workdirs:
        raise BadInput("--workdir=DIR is missing, for example --workdir=runs/first")
    if not output:
        raise BadInput("--output=FILE.html is missing, for example --output=report.html")
    with bad_input():
        runs = [load_run(path_of(workdir)) for workdir in dict.fromkeys(workdirs)]
    text = render(group_runs(runs))
    with bad_input():
        path_of(output).write_text(text, encoding="utf-8")
    print(f"{output}: {plural(len(runs), 'run')}, {len(text.encode()) / 1e6:.1f} MB")


def launch() -> None:
    """Defines the flags and runs `main`."""
    workdirs = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
    output = flags.DEFINE_string("output", None, "The HTML file to write.")
    cli.run(lambda rest: main(workdirs.value, output.value, rest))


if __name__ == "__main__":
    launch()
