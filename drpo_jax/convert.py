"""Converts a GGUF file to a Hugging Face directory: drpo convert FILE.gguf DIRECTORY"""

from drpo_jax import cli
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.models.gguf import convert
from drpo_jax.storage import path_of


def main(arguments: list[str]) -> None:
    """Converts the file; `arguments` are the GGUF file and the directory to write.

    Raises:
      BadInput: An argument is missing, or the file cannot be converted.
    """
    if len(arguments) != 2:
        raise BadInput(
            "give a GGUF file and the directory to write: drpo convert FILE.gguf DIRECTORY"
        )
    with bad_input():
        file, directory = map(path_of, arguments)
        config = convert(file, directory)
    print(f"{directory}: {config.layers} layers of width {config.hidden_size}")


if __name__ == "__main__":
    cli.run(main)
