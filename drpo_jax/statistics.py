"""Accuracy from several responses to each problem: avg@k, pass@k, maj@k, and their uncertainty.

Axis letters: N problems, K responses to each.
"""

import math
from collections import Counter

import numpy as np

RESAMPLES = 2000


def pass_at_k(right_NxK, k):
    """The probability that at least one of k responses is right, float64 [N].

    The unbiased estimator 1 − C(K − c, k) / C(K, k) from K ≥ k responses, c of them right (Chen et
    al., 2021, arXiv:2107.03374, equation 1).

    Args:
      right_NxK: 0 or 1.
      k: 1 to K; at 1 this is avg@K, the share of right responses.
    """
    total = right_NxK.shape[1]
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs {k} responses or more to a problem; there are {total}")
    wrong = total - np.sum(np.asarray(right_NxK) > 0, axis=1)
    return np.array([1 - math.comb(int(w), k) / math.comb(total, k) for w in wrong])


def majority(answers, right):
    """Whether the most frequent answer is right; where several are, the share of right ones.

    Args:
      answers: one per response, None where a response gives none (it has no vote).
      right: 0 or 1 per response; equal answers have equal ones.

    Returns:
      In [0, 1]; 0 where no response gives an answer.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    verdict = dict(zip(answers, right))
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return float(np.mean([verdict[answer] for answer in winners])) if winners else 0.0


def bootstrap_interval(values_N, level=0.95, seed=0):
    """(low, high): the percentile bootstrap interval of the mean over problems.

    It says how far another draw of problems and responses could have been, not another training
    seed, and it is empty of width where all values are equal.
    """
    values, rng = np.asarray(values_N, np.float64), np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
