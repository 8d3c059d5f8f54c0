"""P-values of paired differences and their correction, for all levels of the laboratory."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)

MOST_ENUMERATED = 12  # Pairs up to which all flips of signs are enumerated, 4,096 of them.


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Returns the two-sided p-value of a mean paired difference of 0, over all flips of signs.

    With n pairs it is a multiple of 2^(1−n): it cannot be smaller, however large the difference is. With
    more than `MOST_ENUMERATED` pairs, it is estimated from as many random flips.
    """
    array = np.asarray(differences, float)
    if len(array) <= MOST_ENUMERATED:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(array))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(2**MOST_ENUMERATED, len(array)))
    means = abs((signs * array).mean(axis=1))
    return float(np.mean(means >= abs(array.mean()) - 1e-12))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Returns the p-values of several comparisons, adjusted by Holm's method."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
