"""The error for an unknown name: the name, the nearest accepted one, and all accepted ones."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, accepted: Iterable[str]) -> ValueError:
    """Returns the error to raise for a name that is not accepted.

    Args:
      kind: what the name stands for, such as "objective".
      name: the unknown name.
      accepted: all accepted names.
    """
    accepted = list(accepted)
    nearest = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.0)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Accepted: {', '.join(accepted) or 'none'}.")
