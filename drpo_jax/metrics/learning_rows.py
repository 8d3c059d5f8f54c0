"""Metrics of what a run learns: rewards, groups, the policy, gradient weights and the mismatch.

Symbols: π is the current policy and µ the behavior policy that the tokens were sampled from; r = π/µ; Â
is the advantage; J is the objective, c = ∂J/∂log π its score coefficient, and w = c/(r·Â) the gradient
weight.
"""

from drpo_jax.metrics.metric import Column, Metric, Section

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
            Metric(
                "mismatch/outside", "Outside before",
                "tokens with |Δp| > δ before any update on the rollout", "%",
            ),
            Metric(
                "mismatch/diverged", "Beyond the boundary",
                "tokens with sign(Â)·(π − µ) > δ at the update", "%",
            ),
            Metric(
                "mismatch/diverged_before", "Beyond it before",
                "share of the tokens of mismatch/diverged that were beyond the boundary before any "
                "update on the rollout", "%",
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
)  # fmt: skip
