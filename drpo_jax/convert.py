"""Converts files of other programs and of runs.

drpo convert FILE.gguf DIRECTORY      a llama.cpp model to a Hugging Face directory
drpo convert FILE.npz FILE.parquet    a saved rollout to a rollout file
"""

from pathlib import Path

from drpo_jax import cli
from drpo_jax.config import run_config
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.learner.rollout_checks import padded_arrays
from drpo_jax.learner.rollout_file import load_table, write_rollouts
from drpo_jax.models.gguf import convert
from drpo_jax.storage import path_of


def main(arguments: list[str]) -> None:
    """Converts a file; `arguments` are the source and the target.

    Raises:
      BadInput: An argument is missing, or the file cannot be converted.
    """
    if len(arguments) != 2:
        raise BadInput(
            "specify a GGUF file and the output directory (drpo convert FILE.gguf DIRECTORY), or a "
            "saved rollout and the output file (drpo convert FILE.npz FILE.parquet)"
        )
    with bad_input():
        source, target = map(path_of, arguments)
        if source.suffix == ".npz":
            convert_rollout(source, target)
            return
        config = convert(source, target)
    print(f"{target}: {config.layers} layers of width {config.hidden_size}")


def convert_rollout(source: Path, target: Path) -> None:
    """Writes a saved rollout as a Parquet rollout file.

    Raises:
      ValueError: the source is not a saved rollout, or `target` does not end with .parquet.
      OSError: a file cannot be read or written.
    """
    if target.suffix != ".parquet":
        raise ValueError(f"{target}: must end with .parquet")
    run = source.absolute().parent.parent
    samples = run_config(run).train.samples if (run / "config.json").exists() else None
    table = load_table(source.read_bytes(), source, samples)
    padded_arrays(table, source)
    write_rollouts(target, table)
    print(f"{target}: {len(table):,} responses")


if __name__ == "__main__":
    cli.run(main)
