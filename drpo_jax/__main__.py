"""The command `drpo`, also available as `python -m drpo_jax`."""

import difflib
import runpy
import sys

from drpo_jax import __version__
from drpo_jax.commands import COMMANDS
from drpo_jax.host_memory import keep_freed_memory
from drpo_jax.output import print_page


def overview() -> str:
    """Returns the text of `drpo --help`: every command with its purpose."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "drpo: divergence-regularized reinforcement learning of language models, in JAX",
            "",
            "usage: drpo COMMAND [FLAG ...]",
            "",
            *(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "`drpo COMMAND --help` describes the flags of a command and shows examples.",
        ]
    )


def main() -> None:
    """Runs the command that the first argument names.

    Exits with status 2 for an unknown command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print_page(overview())
    elif name == "--version":
        print(f"drpo_jax {__version__}")
    elif name in COMMANDS:
        del sys.argv[1]
        keep_freed_memory()
        runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)
    else:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        print(
            f"error: there is no command {name!r}; {hint}the commands are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
