"""The exceptions that entry points turn into one message for the user and an exit code."""

import contextlib
import signal
from collections.abc import Iterator


class BadInput(ValueError):
    """The user's input is wrong; the message says what, where, and what would be right."""


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message says why, and from where it can be resumed."""


class DamagedCheckpoint(ValueError):
    """The files of a checkpoint are not those that were saved; the message names step and file."""


class Interrupted(Exception):
    """A signal stopped the run after it saved its state; the message says what was saved.

    Attributes:
      status: exit status of the process. `RESUME` asks launchers to run the same command again; Ctrl-C
        does not.
    """

    RESUME = 75  # EX_TEMPFAIL of sysexits.h.

    def __init__(self, number: signal.Signals, saved: str):
        super().__init__(f"{number.name}: {saved}; the same command resumes")
        self.status = 130 if number == signal.SIGINT else self.RESUME


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turns a ValueError or an OSError raised inside into `BadInput`.

    Entry points use it around code that reads the user's files. The message stays the same, except that
    an error of the operating system begins with the path instead of the error number.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(_message(error)) from error


def _message(error):
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        paths = [path for path in (error.filename, error.filename2) if path is not None]
        return f"{' -> '.join(map(str, paths))}: {error.strerror.lower()}"
    return str(error)
