"""Plug-ins: objects that a config names by file or module, such as my_rewards.py:judge.

    FILE.py:NAME      a Python file; a relative path starts from the working directory
    MODULE:NAME       an importable module, such as my_package.rewards

A plug-in is trusted code: loading it executes it (docs/security.md).
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A named object in a source file. It can be pickled and loaded in another process.

    Attributes:
      path: FILE.py:NAME or MODULE:NAME, as in the config.
      file: the source file.
      source: the bytes of the file when it was found. Other processes execute these bytes, so changing
        the file during a run has no effect. They import modules as usual and compare the source.
    """

    path: str
    file: str
    source: bytes = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The part after the colon."""
        return self.path.rpartition(":")[2]

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the source."""
        return hashlib.sha256(self.source).hexdigest()[:16]

    def defines(self, function: Any) -> bool:
        """Returns whether a function is defined in the source, from where only `load` can import it."""
        return function.__module__ == self.module().__name__ and _is_file(self.path)

    def load(self) -> Any:
        """Executes the source, once per process, and returns the object.

        Raises:
          ValueError: the source raises an error, differs from the one that was found, or does not
            define the name.
        """
        return member(self.module(), self.path)

    def module(self) -> ModuleType:
        """Executes the source, once per process, and returns the module. Raises: as `load`."""
        place = self.path.rpartition(":")[0]
        if not _is_file(place):
            module = self._execute(lambda: importlib.import_module(place))
            if Path(self.file).read_bytes() != self.source:
                raise ValueError(f"{self.path}: {self.file} has changed since the run started")
            return module
        name = f"{Path(self.file).stem}_{self.hash}"
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = self.file
        sys.modules[name] = module  # Dataclasses and pickle look their module up.
        try:
            self._execute(lambda: exec(compile(self.source, self.file, "exec"), vars(module)))
        except ValueError:
            del sys.modules[name]
            raise
        return module

    def _execute(self, code: Callable[[], Any]) -> Any:
        try:
            return code()
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == self.file]
            if isinstance(error, SyntaxError):
                lines = [error.lineno]
            where = f"{self.file}, line {lines[-1]}" if lines else self.file
            message = error.msg if isinstance(error, SyntaxError) else error
            raise ValueError(f"{self.path}: {where}: {type(error).__name__}: {message}") from error


def find(path: str) -> Plugin:
    """Returns the plug-in that a config names, without executing its source.

    The packages around a module are imported.

    Raises:
      ValueError: the path is malformed, or there is no such file or module.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            f"{path!r} must be FILE.py:NAME or MODULE:NAME, such as my_rewards.py:judge"
        )
    if not _is_file(place):
        return Plugin(path, file := _module_file(path, place), Path(file).read_bytes())
    file = str(Path(place).expanduser().absolute())
    try:
        return Plugin(path, file, Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {file}: {str(error.strerror).lower()}") from None


def enter(
    path: str,
    kind: str,
    rows: MutableMapping[str, Any],
    loaded: MutableMapping[str, Plugin],
    row_of: Callable[[Plugin], Any],
) -> Plugin:
    """Adds a row for a plug-in to a table, under its name; a later one of that name replaces it.

    Args:
      path: FILE.py:NAME or MODULE:NAME.
      kind: what the table holds, for messages.
      rows: the table.
      loaded: the plug-ins among its rows, which this function keeps up to date.
      row_of: makes the row.

    Raises:
      ValueError: there is no such object, the table has a row of its own with this name, or `row_of`
        raises it.
    """
    plugin = find(path)
    if plugin.name in rows:
        if plugin.name not in loaded:
            raise ValueError(
                f"{path}: the table has the {kind} {plugin.name!r}; choose another name"
            )
        if loaded[plugin.name] == plugin:
            return plugin
    rows[plugin.name] = row_of(plugin)
    loaded[plugin.name] = plugin
    return plugin


def member(module: ModuleType, path: str) -> Any:
    """Returns the object of a module that `path` names; raises ValueError if there is none."""
    name = path.rpartition(":")[2]
    if hasattr(module, name):
        return getattr(module, name)
    own = [
        n
        for n, value in vars(module).items()
        if not n.startswith("_") and not inspect.ismodule(value)
    ]
    near = difflib.get_close_matches(name, own, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it defines {', '.join(own) or 'nothing'}"
    raise ValueError(f"{path}: {module.__file__} does not define {name!r}; {hint}")


def _is_file(path: str) -> bool:
    place = path.rpartition(":")[0] or path
    return place.endswith(".py") or "/" in place


def _module_file(path: str, module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)  # Imports the packages around the module.
    except (ImportError, ValueError):
        spec = None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        file = Path(*module.split(".")).with_suffix(".py")
        hint = (
            f"did you mean {file}:{path.rpartition(':')[2]}?"
            if file.exists()
            else "install it, or add its folder to PYTHONPATH"
        )
        raise ValueError(f"{path}: there is no Python module {module!r}; {hint}")
    return spec.origin
