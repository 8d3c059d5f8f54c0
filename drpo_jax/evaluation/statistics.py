"""Accuracy from several responses per problem: avg@k, pass@k, maj@k, and their uncertainty.

Axis letters: N problems, K responses to each.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000  # bootstrap samples
BLOCK = 2**20  # Values that are resampled at a time; 16 MiB with their indices.


def pass_at_k(right_NxK: np.ndarray, k: int) -> np.ndarray:
    """The probability that at least one of k responses is right.

    The unbiased estimator 1 − C(K − c, k) / C(K, k) from K ≥ k responses, c of them right (Chen et
    al., 2021, arXiv:2107.03374, equation 1).

    Args:
      right_NxK: 0 or 1.
      k: 1 to K; for k = 1 the result is avg@K, the share of right responses.

    Returns:
      float64 [N].

    Raises:
      ValueError: k is out of range.
    """
    total = right_NxK.shape[1]
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs {k} responses or more per problem; there are {total}")
    wrong = total - np.sum(np.asarray(right_NxK) > 0, axis=1)
    return np.array([1 - math.comb(int(w), k) / math.comb(total, k) for w in wrong])


def majority(answers: Sequence[str | None], right: Sequence[float]) -> float:
    """Whether the most frequent answer is right.

    Args:
      answers: one per response; None, which is not counted, for a response without an answer.
      right: 0 or 1 per response, the same for equal answers.

    Returns:
      0 or 1; for several most frequent answers, the share of right ones among them; 0 if no response
      has an answer.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    verdict = dict(zip(answers, right))
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return float(np.mean([verdict[answer] for answer in winners])) if winners else 0.0


def bootstrap_interval(
    values_N: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over problems.

    It covers the draw of problems and responses, but not that of the training seed. Its width is 0
    if all values are equal.

    Args:
      values_N: one number per problem.
      level: coverage of the interval.
      seed: seeds the resampling.
      resamples: number of resamples.

    Returns:
      (low, high).
    """
    values, rng = np.asarray(values_N, np.float64), np.random.default_rng(seed)
    n = len(values)
    rows = max(1, BLOCK // n)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([values[rng.integers(n, size=(k, n))].mean(axis=1) for k in sizes])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
