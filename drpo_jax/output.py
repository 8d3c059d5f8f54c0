"""Printing to a stdout that its reader, such as `head`, may have closed.

Python ignores SIGPIPE, and a run needs that: otherwise a message to a verifier that has died would end
the run.
"""

import os
import sys


def print_page(text: str) -> None:
    """Prints `text`; if the reader of stdout has gone, discards the rest without a message."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        output_is_closed()


def output_is_closed() -> bool:
    """Returns whether the reader of stdout has gone; if so, later output is discarded."""
    try:
        print(flush=True)  # A flush without new text fails only once.
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        return True
    return False
