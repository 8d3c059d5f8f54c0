"""The exceptions that entry points turn into one message for the user and an exit code."""

import contextlib
from collections.abc import Iterator


class BadInput(ValueError):
    """The user's input is wrong; the message says what, where, and what would be right."""


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message says why, and from where it can be resumed."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turns a ValueError or an OSError raised inside into `BadInput` with the same message.

    Entry points wrap the code that reads the user's files in it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
