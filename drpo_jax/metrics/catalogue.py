"""The catalogue of metrics: one row for each metric that a run logs.

A row holds the metric's name, title, definition and unit, how several values are reduced to one, its
console column, and the axis of its chart. The console, TensorBoard, the plots, the report and the
documentation all read these rows. To add a metric, log it under a name and add its row here.

Symbols: π is the current policy and µ the behavior policy that the tokens were sampled from; r = π/µ; Â
is the advantage; J is the objective, c = ∂J/∂log π its score coefficient, and w = c/(r·Â) the gradient
weight.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

REDUCERS: dict[str, Callable[[Sequence[float]], Any]] = {
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "last": lambda values: values[-1],
}


class Column(NamedTuple):
    """A console column: its title and the format of a value, which sets the width."""

    title: str
    format: str


@dataclasses.dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes:
      name: the key in `metrics.jsonl`. A part in braces stands for any text: `eval/avg/{kind}` is a
        family of metrics.
      title: a few words for charts and tables.
      definition: what the number is.
      unit: the unit in which people read the metric. A metric in % is logged as a share.
      reduce: how the values of several updates, or of several steps that share a point of a chart,
        become one; a key of `REDUCERS`.
      column: the console column, if the metric has one.
      log_axis: the values span orders of magnitude, so charts use a logarithmic axis.
    """

    name: str
    title: str
    definition: str
    unit: str = ""
    reduce: str = "mean"
    column: Column | None = None
    log_axis: bool = False

    @property
    def scale(self) -> int:
        """The factor from the logged value to the unit."""
        return 100 if self.unit == "%" else 1


class Section(NamedTuple):
    """Metrics that the report and the documentation show together."""

    title: str
    about: str
    metrics: tuple[Metric, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Learning",
        "Rewards, accuracy on held-out problems, and the responses.",
        (
            Metric(
                "reward/mean", "Reward", "mean over the sampled responses",
                column=Column("reward", "8.3f"),
            ),
            Metric(
                "eval/avg", "Held-out accuracy, sampled",
                "mean over problems of the share of right responses among k samples (avg@k)", "%",
            ),
            Metric(
                "eval/greedy", "Held-out accuracy, greedy",
                "share of problems whose greedy response is right", "%",
            ),
            Metric(
                "response/length", "Response length", "mean, including the stop token", "tokens",
                column=Column("length", "8.1f"),
            ),
            Metric(
                "response/truncated", "Truncated responses",
                "responses that ended at the length limit instead of with a stop token", "%",
            ),
            Metric(
                "response/filtered", "Filtered responses",
                "responses without a loss (`train.overlong_filtering`)", "%",
            ),
            Metric(
                "loss", "Loss",
                "−J, aggregated over the mini-batch; in the warm start, mean −log p of a token in nats",
                column=Column("loss", "10.5f"),
            ),
            Metric(
                "entropy", "Entropy", "entropy of π at the sampled positions, mean per token", "nats",
                column=Column("entropy", "9.3f"),
            ),
            Metric(
                "reward/informative_groups", "Informative groups",
                "prompts with a response that has a loss and an Â other than 0", "%",
            ),
        ),
    ),
    Section(
        "Selection of groups",
        "What dynamic sampling and partial rollouts do with the drawn problems: "
        "carried before + drawn = train.prompts + dropped + carried + returned.",
        (
            Metric(
                "sampling/drawn", "Drawn problems",
                "problems for which the step began to sample responses", "groups",
            ),
            Metric(
                "sampling/dropped", "Dropped groups",
                "complete groups that no step learns from: their rewards are all equal, or they are "
                "surplus that is not kept", "groups",
            ),
            Metric(
                "sampling/carried", "Carried groups", "groups carried over to later steps", "groups"
            ),
            Metric(
                "sampling/unfinished", "Unfinished groups",
                "carried groups with responses that later steps continue", "groups",
            ),
            Metric(
                "sampling/returned", "Returned problems",
                "problems whose unfinished groups are discarded, to be sampled again by a later step",
                "groups",
            ),
            Metric(
                "sampling/reward", "Reward before the selection",
                "mean over all responses that the step has verified, dropped groups included",
            ),
        ),
    ),
    Section(
        "Policy shift",
        "How far π has moved from µ by the time of an update.",
        (
            Metric(
                "policy/shift", "Mean |π − µ|", "Binary-TV divergence of a token, mean over tokens",
                column=Column("|π−µ|", "9.4f"),
            ),
            Metric(
                "policy/shift_max", "Largest |π − µ|", "largest over the tokens of the step",
                reduce="max",
            ),
            Metric(
                "policy/kl", "KL(µ‖π)", "k3 estimate: mean of r − 1 − log r", "nats", log_axis=True
            ),
            Metric("policy/ratio", "Mean ratio", "mean of r = π/µ, which is 1 in expectation"),
            Metric(
                "policy/ratio_max", "Largest ratio", "largest r over the tokens of the step",
                reduce="max", log_axis=True,
            ),
            Metric(
                "policy/effective_sample_size", "Effective sample size",
                "(Σr)²/(n·Σr²) over the n tokens; 100 % if all ratios are equal", "%",
                column=Column("ESS %", "7.1f"),
            ),
            Metric("policy/tail", "Tail tokens", "sampled tokens with µ ≤ 0.01", "%"),
            Metric(
                "policy/beyond_clip", "Beyond the log-ratio clip",
                "tokens with |log r| > 20, whose c and w are 0", "%",
            ),
            Metric(
                "staleness/mean", "Mean age of the tokens",
                "completed steps minus the version of the weights that sampled a token, mean over "
                "tokens", "steps",
            ),
            Metric(
                "staleness/max", "Largest age of a token",
                "completed steps minus the version of the weights that sampled a token", "steps",
                reduce="max",
            ),
            Metric(
                "policy/kl_reference", "KL to the reference policy",
                "k3 estimate of the KL penalty", "nats",
            ),
        ),
    ),
    Section(
        "Gradient weights",
        "The weight w that the objective puts on the gradient of a token: c = ∂J/∂log π = w·r·Â with "
        "r = π/µ. The plain surrogate has w = 1. Tokens with Â = 0 have no policy gradient and are left "
        "out of the shares, moments and extremes of w.",
        (
            Metric(
                "weight/corrected", "Corrected tokens",
                "w < 0: the update reverses the surrogate's step", "%",
                column=Column("corrected %", "13.2f"),
            ),
            Metric(
                "weight/masked", "Masked tokens",
                "w = 0: no gradient (mask, ratio clip or log-ratio clip)", "%",
                column=Column("masked %", "10.2f"),
            ),
            Metric(
                "weight/attenuated", "Attenuated tokens",
                "0 < w < 1: a smaller step than the surrogate's", "%",
                column=Column("attenuated %", "14.1f"),
            ),
            Metric(
                "weight/amplified", "Amplified tokens",
                "w > 1: a larger step than the surrogate's", "%",
            ),
            Metric("weight/mean", "Mean w", "mean over tokens"),
            Metric("weight/std", "Standard deviation of w", "over the tokens of the step"),
            Metric(
                "weight/w_min", "Smallest w", "smallest over the tokens of the step", reduce="min"
            ),
            Metric("weight/w_max", "Largest w", "largest over the tokens of the step", reduce="max"),
            Metric("weight/tail_mean", "Mean w in the tail", "over the tokens with µ ≤ 0.01"),
            Metric(
                "weight/tail_variance", "Variance of w in the tail",
                "over the tokens with µ ≤ 0.01", log_axis=True,
            ),
            Metric(
                "weight/coefficient_mean", "Mean |c|",
                "over all tokens; c includes the KL penalty and the correction",
            ),
            Metric(
                "weight/coefficient_max", "Largest |c|",
                "largest over the tokens of the step; unbounded for small µ",
                reduce="max", log_axis=True,
            ),
            Metric(
                "by_mu/{bin}/tokens", "Tokens with µ in {bin}",
                "share of the tokens with µ in this bin", "%",
            ),
            Metric(
                "by_mu/{bin}/gradient", "Gradient with µ in {bin}",
                "share of Σ|c| from the tokens with µ in this bin", "%",
            ),
        ),
    ),
    Section(
        "Mismatch of sampler and learner",
        "The logprobs that the sampler recorded (`full_logp`) against the learner's own score of the "
        "same tokens with the same weights (`old_logp`), compared every `log.mismatch_every` steps. "
        "The components of the distance between π and µ: *real*, between sampler and learner with the "
        "sampler's weights; *injected*, the effect of `precision.noise`; *age*, between the sampling "
        "weights and those before the updates (`train.staleness`); *drift*, during the updates on the "
        "rollout, in the first epoch. Without noise and staleness, the real component is the metric "
        "without a suffix; with them, that metric covers real, injected and age together. Tokens of "
        "groups from earlier steps (dynamic sampling, partial rollouts) count only in the drift.",
        (
            Metric("mismatch/shift", "Mean |Δp|", "mean difference of the probabilities"),
            Metric("mismatch/logp", "Mean |Δ log p|", "mean difference of the logprobs", "nats"),
            Metric(
                "mismatch/kl", "KL", "k3 estimate of the KL from sampler to learner", "nats",
                log_axis=True,
            ),
            Metric("mismatch/ratio", "Mean ratio", "mean of the learner's probability / the sampler's"),
            Metric(
                "mismatch/ratio_max", "Largest ratio",
                "largest ratio of the learner's probability to the sampler's",
                reduce="max", log_axis=True,
            ),
            Metric(
                "mismatch/mask_flips", "Flips of DPPO's mask",
                "tokens that DPPO-TV masks under one µ and keeps under the other", "%",
            ),
            Metric(
                "mismatch/weight_change", "Change of DRPO's w",
                "mean |Δw| between the sampler's and the learner's µ",
            ),
            Metric("mismatch/shift_real", "Mean |Δp|, real", "at equal weights"),
            Metric("mismatch/shift_injected", "Mean |Δp|, injected", "effect of the weight noise"),
            Metric("mismatch/shift_age", "Mean |Δp|, age", "effect of the updates since sampling"),
            Metric("mismatch/shift_drift", "Mean |Δp|, drift", "effect of the updates on the rollout"),
            Metric("mismatch/logp_real", "Mean |Δ log p|, real", "at equal weights", "nats"),
            Metric(
                "mismatch/logp_injected", "Mean |Δ log p|, injected", "effect of the weight noise",
                "nats",
            ),
            Metric(
                "mismatch/logp_age", "Mean |Δ log p|, age", "effect of the updates since sampling",
                "nats",
            ),
            Metric(
                "mismatch/logp_drift", "Mean |Δ log p|, drift", "effect of the updates on the rollout",
                "nats",
            ),
            Metric("mismatch/kl_real", "KL, real", "at equal weights", "nats", log_axis=True),
            Metric(
                "mismatch/kl_injected", "KL, injected", "effect of the weight noise", "nats",
                log_axis=True,
            ),
            Metric(
                "mismatch/kl_age", "KL, age", "effect of the updates since sampling", "nats",
                log_axis=True,
            ),
            Metric(
                "mismatch/kl_drift", "KL, drift", "effect of the updates on the rollout", "nats",
                log_axis=True,
            ),
            Metric(
                "correction/mean", "Mean correction",
                "mean importance weight ρ, which corrects for the sampler's mismatch",
            ),
            Metric(
                "correction/dropped", "Dropped by the correction", "tokens with ρ = 0 (mis)", "%"
            ),
        ),
    ),
    Section(
        "Optimization",
        "Optimizer updates: the mean over the updates of a step unless stated otherwise.",
        (
            Metric("grad_norm", "Gradient norm", "L2 norm before clipping"),
            Metric(
                "grad_norm_max", "Largest gradient norm",
                "largest L2 norm before clipping over the updates of the step", reduce="max",
            ),
            Metric("update_norm", "Update norm", "L2 norm of the parameter change", log_axis=True),
            Metric("param_norm", "Parameter norm", "L2 norm of the parameters", reduce="last"),
            Metric(
                "learning_rate", "Learning rate", "at the last update of the step", reduce="last"
            ),
            Metric(
                "updates/skipped", "Skipped updates",
                "updates whose loss or gradient was not finite", reduce="sum",
            ),
            Metric(
                "updates/skipped_in_a_row", "Skipped updates in a row",
                "most consecutive skipped updates, counted across steps", reduce="max",
            ),
            Metric(
                "reward/added", "Added reward",
                "mean of format reward and overlong penalty (config section `reward`)",
            ),
            Metric(
                "reward/limited", "Verifications at a limit",
                "responses whose verification exceeded its CPU time or memory, which counts as 0", "%",
            ),
            Metric(
                "reward/lost", "Lost verifications",
                "responses whose verification hung or ended its process every time, which counts as 0",
                "%",
            ),
            Metric(
                "reward/retries", "Retried verifications",
                "verifications repeated in another process after one hung or was killed", reduce="sum",
            ),
            Metric(
                "reward/kl_penalty", "KL penalty of the reward",
                "mean over responses of β times the k1 estimate", "nats",
            ),
        ),
    ),
    Section(
        "Mixture of experts",
        "Routing of the tokens in the learner.",
        (
            Metric(
                "router/balance_loss", "Load-balancing loss",
                "Switch Transformer's auxiliary loss; 1 if the experts share the tokens evenly",
            ),
            Metric(
                "router/max_load", "Largest expert load",
                "tokens of the busiest expert relative to the mean, largest over layers",
            ),
            Metric("router/idle_experts", "Idle experts", "experts that receive no token", "%"),
            Metric(
                "router/changed", "Replayed routes that differ",
                "experts prescribed by routing replay that the router would not choose", "%",
            ),
        ),
    ),
    Section(
        "Throughput",
        "Wall time of a rollout step and its parts.",
        (
            Metric(
                "tokens_per_second", "Throughput",
                "tokens of the step's rollout / wall time of the step",
                "tokens/s", column=Column("tokens/s", "11,.0f"),
            ),
            Metric(
                "time/step", "Time of a step", "wall time from the weight sync to the log",
                "s", log_axis=True,
            ),
            Metric(
                "time/sync", "Time of weight sync", "converting the learner's weights for the sampler",
                "s", log_axis=True,
            ),
            Metric(
                "time/sample", "Time of sampling", "including the verification that overlaps with it",
                "s", log_axis=True,
            ),
            Metric(
                "time/reward", "Time of rewards", "wait for the remaining verdicts after sampling", "s"
            ),
            Metric(
                "time/update", "Time of updates", "scoring and optimizer updates", "s", log_axis=True,
            ),
            Metric(
                "time/idle", "Idle devices",
                "fraction of the step's wall time during which no device program is in flight. A "
                "program is in flight from its dispatch until the host knows that its result is ready; "
                "on a CPU, also while it waits for a core", "%",
            ),
            Metric(
                "batch/padding", "Padding",
                "padding among the token positions that the updates compute; scoring computes the "
                "positions of the first epoch", "%",
            ),
            Metric("time/{phase}", "Time of {phase}", "wall time of this phase of the step", "s"),
            Metric(
                "sampler/live_rows", "Busy slots",
                "decode slots that hold a sequence, mean over the decode steps", "%",
            ),
            Metric(
                "sampler/decode_steps", "Decode steps", "decode steps of the rollout", reduce="mean"
            ),
            Metric("sync/gigabytes", "Weight sync", "size of the sampler's weights", "GB"),
        ),
    ),
    Section(
        "Other",
        "",
        (
            Metric(
                "response/length_max", "Longest response", "longest response of the step", "tokens",
                reduce="max",
            ),
            Metric(
                "heldout/loss", "Held-out loss",
                "mean −log p per token of the examples held out from supervised learning",
                "nats",
            ),
            Metric("eval/length", "Held-out response length", "mean of the samples", "tokens"),
            Metric(
                "eval/truncated", "Held-out truncated responses",
                "sampled responses that ended at the length limit", "%",
            ),
            Metric(
                "eval/avg/{kind}", "Held-out accuracy, sampled: {kind}",
                "avg@k over the problems of this kind", "%",
            ),
            Metric(
                "eval/greedy/{kind}", "Held-out accuracy, greedy: {kind}",
                "greedy accuracy over the problems of this kind", "%",
            ),
            Metric(
                "compile/count", "Compiled programs",
                "compiled by XLA, or loaded from its cache, since the last record", reduce="sum",
            ),
            Metric(
                "compile/seconds", "Compilation time", "since the last record", "s", reduce="sum"
            ),
        ),
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {m.name: m for section in SECTIONS for m in section.metrics}
COLUMNS: tuple[Metric, ...] = tuple(m for m in METRICS.values() if m.column)
_FAMILIES = [
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(m.name))), m)
    for m in METRICS.values()
    if "{" in m.name
]


def describe(name: str) -> Metric:
    """Returns the row of a metric or, for a member of a family, the family's row filled in.

    A name that is not in the catalogue gets a row without title and definition.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, family in _FAMILIES:
        if match := pattern.fullmatch(name):
            title = family.title.format(**match.groupdict())
            return dataclasses.replace(family, name=name, title=title)
    return Metric(name, "", "")


def reduce_values(name: str, values: Sequence[float]) -> float:
    """Reduces several values of a metric, oldest first, to one, as its row says."""
    return float(REDUCERS[describe(name).reduce](values))


def markdown_table() -> str:
    """Returns the catalogue as Markdown: a heading and a table for each section."""
    lines = []
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        lines += [section.about, ""] if section.about else []
        lines += ["| metric | title | unit | definition | over updates |", "|---|---|---|---|---|"]
        for m in section.metrics:
            cells = (f"`{m.name}`", m.title, m.unit, m.definition, m.reduce)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
