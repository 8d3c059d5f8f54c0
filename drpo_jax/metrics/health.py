"""Health warnings of a run: signs of trouble, with their numbers and a field to change.

Each sign is a row of `SICKNESSES` with a rule on the latest records. `Health` reads the records of a
run in order and reports each sign once, at the first record for which its rule holds. The reports are a
function of the records and the config. A resumed run reads its earlier records first, so it does not
repeat a warning.

A rule uses the median of the last `WINDOW` records, because individual rollouts of healthy runs vary
widely: in `configs/tiny.py`, one effective sample size is 61 %, while the median is above 99 %.
"""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from drpo_jax.metrics.records import Record

WINDOW = 5
LEARNED = 0.95  # A run with a higher mean reward may stop exploring.


class Finding(NamedTuple):
    """A sign of trouble in a run: its name, the step at which it was found, and the warning."""

    name: str
    step: int
    text: str


class History:
    """The metrics of a run so far.

    Metrics are not logged in every record (comparisons with the learner, for example, only every
    `log.mismatch_every` steps), so their last values may be older than the last records.

    Attributes:
      recent: the last `WINDOW` records.
    """

    def __init__(self) -> None:
        self.recent: deque[Record] = deque(maxlen=WINDOW)
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, record: Record) -> None:
        """Reads the next record."""
        self.recent.append(record)
        for name, value in record.items():
            if math.isfinite(value):
                self._values[name].append(value)

    def has(self, name: str) -> bool:
        """Returns whether a metric had a finite value."""
        return bool(self._values.get(name))

    def last(self, name: str, count: int = WINDOW) -> list[float]:
        """Returns the last `count` finite values of a metric; [] if there are fewer."""
        values = self._values.get(name, [])
        return values[-count:] if len(values) >= count else []

    def first(self, name: str, count: int = WINDOW) -> list[float]:
        """Returns the first finite values of a metric, at most `count`."""
        return self._values.get(name, [])[:count]


class Health:
    """Finds the signs of trouble in the records of a run.

    Args:
      config: the flat fields of the run's config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._history = History()
        self._found: set[str] = set()

    def add(self, record: Record) -> list[Finding]:
        """Reads the next record of the run; returns the sicknesses that are found for the first time."""
        self._history.add(record)
        new = []
        for name, rule in SICKNESSES.items():
            if name not in self._found and (text := rule(self._history, self._config)):
                self._found.add(name)
                new.append(Finding(name, int(record["step"]), text))
        return new


def diagnose(records: Iterable[Record], config: Mapping[str, Any]) -> list[Finding]:
    """Returns the findings in the records of a run, in order of appearance.

    Args:
      records: the records, by step.
      config: the flat fields of the run's config.
    """
    health = Health(config)
    return [finding for record in records for finding in health.add(record)]


def _entropy_gone(history: History, config: Mapping[str, Any]) -> str:
    """The samples of a problem are practically the same response.

    With less than 0.1 nats per response, a response differs from the most likely one in about 2 % of
    the draws, so eight samples are all equal in more than four of five groups. A drop to 1 % of the
    initial entropy is the same sign for long responses: the reward that a policy can still gain by
    spending its entropy H falls with e^H (Cui et al. 2025, arXiv:2505.22617), and `configs/tiny.py`
    learns its task with 4 % of the entropy left.
    """
    entropy, length = history.last("entropy"), history.last("response/length")
    reward = history.last("reward/mean")
    if not (entropy and length and reward) or statistics.median(reward) >= LEARNED:
        return ""
    now, tokens = statistics.median(entropy), statistics.median(length)
    before = statistics.median(history.first("entropy"))
    if now * tokens >= 0.1 and now >= 0.01 * before:
        return ""
    return (
        f"the entropy has collapsed: {now:.2g} nats per token, {now * tokens:.2g} per response "
        f"(initially {before:.2g} per token), while the mean reward is "
        f"{statistics.median(reward):.2f}. The samples of a problem hardly differ, so comparing them "
        "teaches little. "
        "Try a lower optimizer.learning_rate, or objective.entropy_bonus"
    )


def _no_signal(history: History, config: Mapping[str, Any]) -> str:
    """At most one group in twenty has mixed rewards, in every one of the last records.

    The other groups cost as much but have no gradient.
    """
    last = [record for record in history.recent if "reward/informative_groups" in record]
    shares = [_informative(record) for record in last]
    reward = history.last("reward/mean")
    if len(shares) < WINDOW or not reward or max(shares) > 0.05:
        return ""
    mean = statistics.median(reward)
    easy = mean >= 0.5
    if easy and mean >= LEARNED:
        advice = "The problems are solved; use harder ones (data.problems)"
    elif easy:
        advice = "Leave out problems that are always solved (data.rollouts with data.pass_high)"
    else:
        advice = (
            "Leave out problems that are never solved (data.rollouts with data.pass_low), sample "
            "more responses to each (train.samples), or start with supervised learning (`drpo sft`)"
        )
    return (
        f"almost all groups have equal rewards: {100 * statistics.fmean(shares):.1f} % of the groups of "
        f"the last {WINDOW} records have a gradient, and the mean reward is {mean:.2f}. {advice}"
    )


def _informative(record: Record) -> float:
    """Returns the fraction of the sampled groups that have mixed rewards."""
    drawn = record.get("sampling/drawn", 0)
    kept = 1 - record.get("sampling/dropped", 0) / drawn if drawn else 1.0
    return kept * record["reward/informative_groups"]


def _at_the_limit(history: History, config: Mapping[str, Any]) -> str:
    """A quarter of the responses ended at the length limit.

    Their reward is that of a missing answer, whatever the answer would have been. At a quarter, two of
    the eight responses in a group are judged by their length instead of their answer.
    """
    truncated = history.last("response/truncated")
    if not truncated or statistics.median(truncated) < 0.25:
        return ""
    limit = config.get("sampler.max_response_length")
    return (
        f"responses are truncated: {100 * statistics.median(truncated):.0f} % of them ended at "
        f"sampler.max_response_length = {limit} without an answer. Raise it, or penalize length with "
        "reward.overlong_buffer"
    )


def _ratio_off(history: History, config: Mapping[str, Any]) -> str:
    """The mean ratio differs from 1 by more than a tenth.

    Its expectation is 1, whatever π is. In healthy runs, the medians differ from 1 by less than 0.01
    (FP8 rollouts included), so 0.1 is not noise: tokens with a large share of the probability mass are
    missing from the rollout.
    """
    ratio = history.last("policy/ratio")
    if not ratio or abs(statistics.median(ratio) - 1) <= 0.1:
        return ""
    return (
        f"the mean ratio π/µ is {statistics.median(ratio):.3g}, but its expectation is 1: the policy "
        "has moved too far from the one that sampled, or sampler and learner disagree "
        "(mismatch/logp). Try a lower optimizer.learning_rate, fewer train.epochs, or larger "
        "train.mini_batch_prompts"
    )


def _few_samples_count(history: History, config: Mapping[str, Any]) -> str:
    """Half of the sampled tokens do not count: the effective sample size is below 50 %.

    The variance of an estimate with these ratios is more than twice that with on-policy samples.
    """
    size = history.last("policy/effective_sample_size")
    if not size or statistics.median(size) >= 0.5:
        return ""
    return (
        f"the effective sample size is {100 * statistics.median(size):.0f} % of the tokens: a few large "
        "ratios outweigh the rest. Try a lower optimizer.learning_rate, fewer train.epochs, or an "
        "objective that bounds the ratio"
    )


def _mismatch_grows(history: History, config: Mapping[str, Any]) -> str:
    """Sampler and learner differ by five times as much as at first, and by more than 0.05 nats.

    The mismatch of a number format is a property of the model and changes little in healthy runs; a
    factor of 5 exceeds the spread between comparisons. Below 0.05 nats, a ratio is off by 5 % on
    average, which hardly affects any objective.
    """
    # With noise or staleness, the whole mismatch contains parts that are meant.
    real = history.has("mismatch/logp_real")
    name = "mismatch/logp_real" if real else "mismatch/logp"
    last, first = history.last(name, 3), history.first(name)[:3]
    if len(history.last(name, 6)) < 6:
        return ""
    now, before = statistics.median(last), statistics.median(first)
    if now <= max(5 * before, 0.05):
        return ""
    return (
        f"sampler and learner drift apart: mean |Δ log p| is {now:.2g} nats, initially {before:.2g}. "
        "Sample in a finer format (precision.recipe, precision.kv_cache), or set objective.behavior = "
        "'rescored' with an objective.correction"
    )


Rule = Callable[[History, Mapping[str, Any]], str]
SICKNESSES: dict[str, Rule] = {
    "entropy": _entropy_gone,
    "signal": _no_signal,
    "length": _at_the_limit,
    "ratio": _ratio_off,
    "sample size": _few_samples_count,
    "mismatch": _mismatch_grows,
}
