"""What every command line shares: flags, config files, --help, warnings, errors and exit codes.

An entry point ends with `launch(main)` if it takes a config, or with `run(main)` if it does not.
Both print invalid input as one line, `error: …`, and exit with status 2. A run that cannot continue
says why and exits with status 3. A run that a signal stopped exits with the status of `Interrupted`.
"""

import contextlib
import difflib
import logging
import os
import re
import runpy
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from drpo_jax.commands import COMMANDS
from drpo_jax.config import as_begun, field_table, load_plugin, resolve, suggest, to_json
from drpo_jax.errors import BadInput, Interrupted, TrainingStopped, bad_input
from drpo_jax.host_memory import return_compilation_memory
from drpo_jax.output import output_is_closed, print_page
from drpo_jax.parallel import multihost
from drpo_jax.storage import check_workdir, no_space, path_of

flags.disclaim_key_flags()  # Flags defined here belong to the entry point and to its --help.

PACKAGE = Path(__file__).parent
# A wheel holds the configs inside the package; in a clone they stand next to it.
CONFIGS = next(d for d in (PACKAGE / "configs", PACKAGE.parent / "configs") if d.is_dir())
COMPILATION_CACHE = "~/.cache/drpo_jax/jax"


# ------------------------------------------------------------------------------ entry points


def launch(
    main: Callable[[FrozenConfigDict, Any], int | None],
    workdir: bool = True,
    prepare: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> None:
    """Runs an entry point that takes --config=FILE[:VARIANT], --config.FIELD=VALUE and --workdir=DIR.

    Joins the other processes of the run, turns on the compilation cache, and calls `main` with the
    resolved config and the workdir. With --print_config it prints the resolved config instead.
    Errors and exit codes are those of `run`.

    Args:
      main: The entry point. Its return value is the exit status.
      workdir: False for an entry point without --workdir; `main` then receives None.
      prepare: Applied to the config before it is resolved.
    """
    config, directory, print_config = define_flags(flags.FLAGS, workdir)

    def start(_: list[str]) -> int | None:
        explicit = config_flags.get_override_values(flags.FLAGS["config"])
        prepared = prepare(config.value)
        if directory is not None and directory.value:
            with bad_input():
                prepared = as_begun(prepared, path_of(directory.value), explicit)
        resolved = resolve(prepared, explicit)
        if print_config.value:
            print(to_json(resolved), end="")
            return None
        with bad_input():
            multihost.initialize()
        if not multihost.is_main():  # Process 0 prints for all of them; errors come from each.
            sys.stdout = open(os.devnull, "w")
        with bad_input():
            use_compilation_cache(resolved.compute.compilation_cache)
        return_compilation_memory()
        return main(resolved, None if directory is None else path_of(directory.value))

    resume = "; run the same command again to resume from the last checkpoint" if workdir else ""
    run(start, parse_flags, interrupted=f"interrupted{resume}")


def run(
    main: Callable[[list[str]], int | None],
    parse: Callable[[list[str], flags.FlagValues], list[str]] | None = None,
    interrupted: str = "interrupted",
) -> None:
    """Parses the flags, calls `main` with the positional arguments, and exits with what it returns.

    `BadInput`, from the command line or from `main`, is printed as one message and exits with status
    2, `TrainingStopped` and a full disk with 3, a run that SIGTERM stopped with 75, Ctrl-C with 130, and
    a closed stdout (`| head`) with 141. Any other exception is a defect and keeps its traceback.

    Args:
      main: The entry point.
      parse: Parses argv into the flags and returns argv without them; `parse_plain` by default.
      interrupted: What Ctrl-C prints.
    """

    def parse_or_exit(argv: list[str]) -> list[str]:
        if any(re.fullmatch(r"--?(help|helpshort|h)", arg) for arg in argv[1:]):
            print_page(help_text(flags.FLAGS))
            sys.exit(0)
        try:
            return (parse or parse_plain)(argv, flags.FLAGS)
        except BadInput as error:
            exit_with(error, 2)

    def guarded(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            # Orbax reports each save in thirty lines at INFO.
            absl_logging.set_verbosity(absl_logging.WARNING)
        try:
            return main(argv[1:])
        except BadInput as error:
            exit_with(error, 2)
        except TrainingStopped as error:
            exit_with(error, 3)
        except Interrupted as stop:
            print(f"\n{stop}", file=sys.stderr)
            multihost.leave(stop.status)
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            multihost.leave(130)
        except BrokenPipeError:
            if not output_is_closed():
                raise
            print(f"the output was closed: {interrupted}", file=sys.stderr)
            multihost.leave(141)
        except Exception as error:
            _end_if_full(error)
            raise

    threading.excepthook = _thread_failed
    absl_logging.get_absl_handler().setFormatter(PlainFormatter())
    app.run(guarded, flags_parser=parse_or_exit)


def _end_if_full(error: BaseException | None) -> None:
    """Ends the process with one message if `error` says that a disk is full."""
    if no_space(error):
        advice = "free some space, then run the same command again"
        exit_with(TrainingStopped(f"{error}: {advice}"), 3)


def _thread_failed(thread: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread; a full disk ends the process.

    Without its thread, the TensorBoard writer would block the run as soon as its queue is full.
    """
    _end_if_full(thread.exc_value)
    threading.__excepthook__(thread)


def exit_with(error: Exception, status: int) -> NoReturn:
    """Prints the error as one message and ends the process with `status`."""
    print(f"error: {error}", file=sys.stderr)
    if no_space(error):  # Handlers at exit would fail to write once more.
        with contextlib.suppress(OSError):  # Output may go to the same disk.
            sys.stdout.flush()
        os._exit(status)
    multihost.leave(status)


class PlainFormatter(logging.Formatter):
    """Formats warnings as `warning: …`, errors as `error: …`, and anything below as it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno > logging.INFO else text


def use_compilation_cache(setting: str) -> None:
    """Points JAX's persistent compilation cache to a directory, and keeps small programs there, too.

    A run has dozens of small programs, which together take seconds to compile again. The environment
    variable JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS overrides this.

    Args:
      setting: The field `compute.compilation_cache`. "auto" follows JAX_COMPILATION_CACHE_DIR if it
        is set, and otherwise takes `COMPILATION_CACHE`; "" turns the cache off; any other value is
        the directory.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if setting == "auto":
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return  # JAX reads it.
        setting = COMPILATION_CACHE
    jax.config.update("jax_compilation_cache_dir", str(path_of(setting)) if setting else None)


# ------------------------------------------------------------------------------ flags


def define_flags(
    values: flags.FlagValues, workdir: bool = True
) -> tuple[flags.FlagHolder, flags.FlagHolder | None, flags.FlagHolder]:
    """Defines --config, --print_config, and --workdir unless it is False, in `values`.

    Returns:
      The holders of config, workdir (or None) and print_config.
    """
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE[:VARIANT]. FILE is a path or the name of a config that comes with drpo_jax, such as "
        "tiny. --config.FIELD=VALUE sets one field: --config.train.steps=50.",
        flag_values=values,
    )
    print_config = flags.DEFINE_bool(
        "print_config", False, "Print the resolved config and exit.", flag_values=values
    )
    directory = None
    if workdir:
        directory = flags.DEFINE_string(
            "workdir",
            None,
            "Directory of the run; train and sft resume the run that it holds.",
            flag_values=values,
        )
    return config, directory, print_config


def parse_plain(argv: list[str], values: flags.FlagValues) -> list[str]:
    """Parses `argv` into the flags `values` and returns argv without them.

    Raises:
      BadInput: A flag does not exist or has a value of the wrong type.
    """
    try:
        return values(argv)
    except flags.Error as error:
        raise BadInput(str(error)) from None


def refuse_arguments(arguments: list[str], hint: str = "") -> None:
    """Raises `BadInput` if there are positional arguments; for a command that takes flags alone."""
    if arguments:
        raise BadInput(f"{arguments[0]}: not a flag{hint}")


def parse_flags(argv: list[str], values: flags.FlagValues) -> list[str]:
    """Parses the command line of this process into the flags `values`, --config included.

    Raises:
      BadInput: Anything is wrong with the command line.
    """
    argv = _locate_config(argv)  # Loads objective.path, whose hyperparameters become fields.
    fields = {field.path: field for field in field_table()}
    _check_fields(argv, fields)
    argv, unset = _unset_fields(argv, [name for name, field in fields.items() if field.optional])
    try:
        rest = values(argv)
    except flags.IllegalFlagValueError as error:
        if match := re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL):
            expected = fields[match[1]].expected
            raise BadInput(f"--config.{match[1]}={match[2]}: must be {expected}") from None
        raise BadInput(str(error)) from None
    except flags.UnrecognizedFlagError as error:
        raise BadInput(_unrecognized(error, fields)) from None
    except flags.Error as error:
        raise BadInput(str(error)) from None
    refuse_arguments(rest[1:], "; --config.train.steps=50 sets a field")
    for name in unset:
        values.config.update_from_flattened_dict({name: None})
        config_flags.get_override_values(values["config"])[name] = None
    if "workdir" in values and not values.print_config:
        _check_workdir(values.workdir)
    return rest


def _locate_config(argv: list[str]) -> list[str]:
    """Returns `argv` with the path of the config file in place of its name, once the file loads."""
    places = [i for i, arg in enumerate(argv) if re.match(r"--?config(=|$)", arg)]
    flag, _, spec = argv[places[0]].partition("=") if places else ("", "", "")
    separate = bool(places) and not spec and places[0] + 1 < len(argv)
    if separate:
        spec = argv[places[0] + 1]
    if len(places) != 1 or not spec:
        raise BadInput("give one --config=FILE[:VARIANT], for example --config=configs/tiny.py")
    paths = _values_of(argv, "objective.path")
    for path in paths:
        load_plugin("objective", path)
    config = load_config(spec)
    if not paths and config.objective.path:
        load_plugin("objective", config.objective.path)
    name, colon, variant = spec.partition(":")
    located = f"{flag}={find_config(name)}{colon}{variant}"
    return [*argv[: places[0]], located, *argv[places[0] + 1 + separate :]]


def _values_of(argv: list[str], field: str) -> list[str]:
    """Returns the nonempty values that the command line sets a text field to."""
    return [value for _, _, value in _settings_of(argv, field) if value]


def _settings_of(argv: list[str], field: str) -> list[tuple[int, int, str]]:
    """Returns the arguments that set a field: start and end in `argv`, and the value."""
    settings = []
    for i, (arg, following) in enumerate(zip(argv, [*argv[1:], ""])):
        if match := re.fullmatch(rf"--?config\.{re.escape(field)}(=(.*))?", arg, re.DOTALL):
            separate = match[1] is None
            settings.append((i, i + 1 + separate, following if separate else match[2]))
    return settings


def _unset_fields(argv: list[str], optional: Iterable[str]) -> tuple[list[str], list[str]]:
    """Removes arguments that set a field to none, and those that they override.

    The flags of ml_collections parse numbers and texts, but no None.

    Args:
      optional: fields that may be None.

    Returns:
      The other arguments, and the names of the fields to set to None.
    """
    unset = []
    for field in optional:
        settings = _settings_of(argv, field)
        nones = [i for i, (_, _, value) in enumerate(settings) if value.lower() == "none"]
        if nones:
            overridden = settings[: nones[-1] + 1]
            places = {i for start, end, _ in overridden for i in range(start, end)}
            argv = [arg for i, arg in enumerate(argv) if i not in places]
            unset += [field] if overridden == settings else []
    return argv, unset


def _check_fields(argv: list[str], fields: Collection[str]) -> None:
    for arg in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if match and match[1] not in fields:
            raise BadInput(
                f"{arg}: there is no such field: {suggest(match[1], fields)}\n"
                "`drpo list fields` describes every field."
            )


def _unrecognized(error: flags.UnrecognizedFlagError, fields: Collection[str]) -> str:
    """The message for an unknown flag; one that is named like a field gets the field's flag."""
    name = error.flagname
    meant = [f for f in fields if name in (f, f.rpartition(".")[2])]
    if not meant:
        return str(error)
    spelled = " or ".join(f"--config.{field}" for field in meant)
    return f"--{name}: there is no such flag; did you mean {spelled}?"


def _check_workdir(workdir: str | None) -> None:
    if not workdir:
        raise BadInput("--workdir=DIR is missing, for example --workdir=runs/first")
    try:
        check_workdir(path_of(workdir))
    except ValueError as error:
        raise BadInput(f"--workdir={error}") from None


def help_text(values: flags.FlagValues) -> str:
    """Returns the --help of the running entry point: purpose, usage, examples, and its own flags."""
    program = sys.modules["__main__"]
    module = program.__spec__.name if program.__spec__ else ""
    names = [name for name, command in COMMANDS.items() if command.module == module]
    if names:
        command = COMMANDS[names[0]]
        lines = [
            command.summary,
            "",
            f"usage: drpo {names[0]} {command.arguments}",
            "",
            "Examples:",
        ]
        lines += [f"  {example}" for example in command.examples]
    else:
        lines = [(program.__doc__ or "").strip()]
    own = values.get_key_flags_for_module(sys.argv[0])
    own.sort(key=lambda flag: (flag.name not in ("config", "workdir"), flag.name))
    if own:
        lines += ["", "Flags:"]
    width = max((len(flag.name) for flag in own), default=0) + 6
    for flag in own:
        text = re.sub(r";\s+repeat this option.*", "", flag.help)
        if flag.default not in (None, False, [], ""):
            text += f" Default: {flag.default}."
        first, *rest = textwrap.wrap(text, 98 - width)
        lines.append(f"{f'  --{flag.name}':<{width}}{first}")
        lines += [" " * width + line for line in rest]
    if "config" in values:
        lines += ["", "`drpo list fields` describes the fields of a config; `drpo list variants`,"]
        lines += ["the config files that come with drpo_jax and their variants."]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ config files


def find_config(path: str) -> str | None:
    """Returns the path of a config file: `path` itself, or the shipped config that it names.

    A shipped config is named as tiny, tiny.py or configs/tiny.py, from any directory. Returns None
    if there is neither.
    """
    if (file := path_of(path)).is_file():
        return str(file)
    shipped = CONFIGS / f"{Path(path).stem}.py"
    named = re.fullmatch(r"(configs/)?\w+(\.py)?", path)
    return str(shipped) if named and shipped.is_file() else None


def load_config(spec: str) -> ConfigDict:
    """Returns the config that `spec` names.

    Args:
      spec: FILE or FILE:VARIANT; FILE as `find_config` takes it. The file defines
        `get_config()`, with the variant as its argument if there is one.

    Raises:
      BadInput: There is no such file, or it raised an exception; the message names the line.
    """
    name, _, variant = spec.partition(":")
    with bad_input():
        path = find_config(name)
    if path is None:
        shipped = [f"configs/{file.name}" for file in sorted(CONFIGS.glob("*.py"))]
        near = difflib.get_close_matches(name, shipped, 1, 0.4)
        raise BadInput(
            f"--config={spec}: there is no file {name} below {Path.cwd()}"
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
        if isinstance(cause, KeyError):  # ml_collections nests it in an AttributeError.
            cause = cause.args[0]
        raise BadInput(f"{where}: {type(error).__name__}: {cause}") from error
