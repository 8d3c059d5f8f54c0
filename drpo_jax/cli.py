"""The command line: python -m drpo_jax.ENTRY --config=FILE[:VARIANT] --workdir=DIR, and fields.

Entry points end with `launch(main)`. What the user got wrong is printed as `error: …`, exit code 2; a
run that cannot go on says why, exit code 3.
"""

import difflib
import glob
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from drpo_jax.config import field_types, resolve, suggest, type_name
from drpo_jax.errors import BadInput, TrainingStopped, bad_input
from drpo_jax.parallel import multihost
from drpo_jax.storage import path_of

flags.disclaim_key_flags()  # what `launch` defines belongs to the entry point, and to its --help


def launch(
    main: Callable[[FrozenConfigDict, Path | None], int | None],
    workdir: bool = True,
    prepare: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> None:
    """Runs an entry point with --config=FILE[:VARIANT], --config.FIELD=VALUE and --workdir=DIR.

    Calls `main` with the resolved config and exits with what it returns. `BadInput`, from the
    command line or from `main`, is shown as one message with exit code 2, `TrainingStopped` with 3;
    any other exception is a defect and keeps its traceback.

    Args:
      workdir: False for an entry point without --workdir; `main` then gets None for it.
      prepare: what to do with the config before it is resolved.
    """
    config, directory = define_flags(flags.FLAGS, workdir)

    def parse(argv: list[str]) -> list[str]:
        try:
            return parse_flags(argv, flags.FLAGS)
        except BadInput as error:
            exit_with(error, 2)

    def run(_: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells each save in thirty lines at INFO
        try:
            with bad_input():
                multihost.initialize()
            if not multihost.is_main():  # process 0 speaks for all; errors are everybody's
                sys.stdout = open(os.devnull, "w")
            path = path_of(directory.value) if workdir else None
            explicit = config_flags.get_override_values(flags.FLAGS["config"])
            return main(resolve(prepare(config.value), explicit), path)
        except BadInput as error:
            exit_with(error, 2)
        except TrainingStopped as error:
            exit_with(error, 3)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
            multihost.leave(130)

    app.run(run, flags_parser=parse)


def define_flags(
    values: flags.FlagValues, workdir: bool = True
) -> tuple[flags.FlagHolder, flags.FlagHolder | None]:
    """Defines --config, and --workdir unless it is False, among the flags `values`."""
    help_config = (
        "FILE[:VARIANT], for example configs/tiny.py:bf16. Single fields follow as "
        "--config.train.steps=50; drpo_jax/config.py explains them."
    )
    help_workdir = "Directory of the run; resumed if it holds one."
    config = config_flags.DEFINE_config_file("config", None, help_config, flag_values=values)
    if not workdir:
        return config, None
    return config, flags.DEFINE_string("workdir", None, help_workdir, flag_values=values)


def parse_flags(argv: list[str], values: flags.FlagValues) -> list[str]:
    """Parses the command line `argv` (of this process) into the flags `values`.

    Raises: BadInput for everything wrong with it.
    """
    if any(re.fullmatch(r"--?help(short|full|xml)?", a) for a in argv):
        return values(argv)
    specs = [
        m[2] or after
        for arg, after in zip(argv, [*argv[1:], ""])
        if (m := re.fullmatch(r"--?config(=(.*))?", arg))
    ]
    if len(specs) != 1 or not specs[0]:
        raise BadInput("give one --config=FILE[:VARIANT], for example --config=configs/tiny.py")
    load_config(specs[0])
    names = field_types()
    for arg in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if match and match[1] not in names:
            raise BadInput(f"{arg}: there is no such field: {suggest(match[1], names)}")
    try:
        rest = values(argv)
    except flags.IllegalFlagValueError as error:
        if match := re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL):
            expected = type_name(names[match[1]])
            raise BadInput(f"--config.{match[1]}={match[2]}: must be {expected}") from None
        raise BadInput(str(error)) from None
    except flags.Error as error:
        raise BadInput(str(error)) from None
    if len(rest) > 1:
        raise BadInput(f"{rest[1]}: not a flag; a field is set with --config.train.steps=50")
    if "workdir" not in values:
        return rest
    workdir = values.workdir
    if not workdir:
        raise BadInput("--workdir=DIR is missing, for example --workdir=runs/first")
    if "://" in workdir and not workdir.startswith("gs://"):
        raise BadInput(
            f"--workdir={workdir}: must be a path, or gs://BUCKET/RUN; mount other storage and name "
            "its path"
        )
    return rest


def load_config(spec: str) -> ConfigDict:
    """Returns `get_config()` of a config file, `get_config(VARIANT)` for FILE:VARIANT."""
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, glob.glob("configs/*.py"), 1, 0.4)
        raise BadInput(
            f"--config={spec}: there is no file {path} below {Path.cwd()}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        return runpy.run_path(path)["get_config"](*([variant] if variant else []))
    except ValueError as error:
        raise BadInput(f"--config={spec}: {error}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else f"--config={spec}"
        cause = error.args[0] if error.args else error
        if isinstance(cause, KeyError):  # ml_collections nests it in an AttributeError
            cause = cause.args[0]
        raise BadInput(f"{where}: {type(error).__name__}: {cause}") from error


def exit_with(error: Exception, code: int) -> NoReturn:
    """Prints the error as one message and ends the process."""
    print(f"error: {error}", file=sys.stderr)
    multihost.leave(code)
