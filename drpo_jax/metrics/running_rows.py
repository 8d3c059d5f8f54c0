"""Metrics of how a run proceeds: updates, routing, time, and details of other metrics."""

from drpo_jax.metrics.metric import Column, Metric, Section

SECTIONS: tuple[Section, ...] = (
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
