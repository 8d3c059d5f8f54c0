"""One wording for a name that does not exist: what was given, what is nearest, what is accepted."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, given: object, accepted: Iterable[str]) -> ValueError:
    """The error to raise for a `kind` of thing named `given` that is not among `accepted`."""
    accepted = list(accepted)
    nearest = difflib.get_close_matches(str(given), accepted, n=1, cutoff=0.0)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"Unknown {kind} {given!r}.{hint} Accepted: {', '.join(accepted) or 'none'}.")
