"""The sections that belong to the run: train, sft, evaluate, checkpoint, log; and the seed."""

import dataclasses

from drpo_jax.fields import BELOW_ONE, NOT_NEGATIVE, OPERATIONAL, POSITIVE, SHARE, Range, field


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Top-level fields, outside the sections."""

    seed: int = field(
        0,
        "Seed of the initial weights, the problems, the samples and the order of mini-batches.",
        Range("at least 0 and below 2**32", lambda x: 0 <= x < 2**32),
        distinguishes=False,
    )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The section `train`: rollouts and updates."""

    steps: int = field(200, "Rollout steps.", POSITIVE, may_change=True)
    prompts: int = field(64, "Prompts per rollout.", POSITIVE)
    samples: int = field(
        8, "Responses per prompt: one group, whose rewards are compared.", POSITIVE
    )
    mini_batch_prompts: int = field(16, "Prompts per optimizer update; divides prompts.", POSITIVE)
    micro_batch: int = field(
        8,
        "Sequences per forward and backward pass; divides the mini-batch. 0: see micro_tokens.",
        NOT_NEGATIVE,
    )
    micro_tokens: int = field(
        0,
        "Token positions per forward and backward pass, padding included, on all devices together. Rows "
        "are packed, and their width adapts to the lengths of the responses. 0: see micro_batch.",
        NOT_NEGATIVE,
    )
    pack: bool = field(
        False, "Pack several sequences into each row of an update; with micro_tokens, always."
    )
    routing_replay: bool = field(
        False, "The learner routes tokens to the experts that the sampler chose (R3)."
    )
    epochs: int = field(1, "Passes over each rollout.", POSITIVE)
    dynamic_sampling: bool = field(
        False,
        "Replace groups whose rewards are all equal, until the rollout has train.prompts other groups.",
    )
    max_draws: int = field(
        4,
        "Maximum number of problems per step with dynamic_sampling or partial_tokens, in multiples of "
        "train.prompts; those carried over from earlier steps count as well.",
        POSITIVE,
    )
    keep_surplus: bool = field(
        True,
        "Carry complete groups that do not fit into the rollout over to the next one, instead of "
        "dropping them.",
    )
    partial_tokens: int = field(
        0,
        "Token budget of a response per step; later steps continue it with their weights. 0: every "
        "response ends in the step that begins it.",
        NOT_NEGATIVE,
    )
    max_skipped: int = field(
        5,
        "Number of consecutive non-finite updates after which the run stops.",
        POSITIVE,
        **OPERATIONAL,
    )
    accept_source: str = field(
        "",
        "Hash of the changed source of reward.path or objective.path that the run may resume with; "
        "commas separate several hashes.",
        **OPERATIONAL,
    )
    save_rollout_every: int = field(
        20,
        "Rollout steps between saved rollouts; 0: never.",
        NOT_NEGATIVE,
        **OPERATIONAL,
    )
    staleness: int = field(
        0,
        "Number of steps k that rollouts lag behind the policy: step t learns from responses that the "
        "weights after step t - k sampled, and the first k steps from those of the initial weights.",
        NOT_NEGATIVE,
    )
    overlong_filtering: bool = field(
        False,
        "Responses that end at the length limit carry no loss. Their rewards still count in the "
        "baseline of their group.",
    )
    shuffle_rewards: bool = field(
        False, "Control experiment: rewards are randomly permuted within the rollout."
    )


@dataclasses.dataclass(frozen=True)
class SftSettings:
    """The section `sft`: supervised learning, on its own or as the warm start of RL."""

    steps: int = field(
        0, "Optimizer updates; 0: sft.epochs, or no supervised learning.", NOT_NEGATIVE
    )
    epochs: int = field(
        0,
        "Passes over the examples of files or rollouts, each in a different order; 0: steps.",
        NOT_NEGATIVE,
    )
    files: str = field(
        "",
        "Training examples, chats or prompts with responses: one file (.jsonl or .parquet), or several "
        "by a pattern such as chats/*.parquet. Empty: rollouts, or the task's demonstrations.",
    )
    rollouts: str = field(
        "", "Workdir of a run. The correct responses in its saved rollouts are the examples."
    )
    min_reward: float = field(1.0, "Minimum reward of a correct response (rollouts).")
    per_problem: int = field(
        4, "Maximum number of responses to one problem (rollouts); 0: no limit.", NOT_NEGATIVE
    )
    turns: str = field(
        "all",
        "Assistant turns of a chat that become examples: all, each with the preceding messages as its "
        "prompt, or only the last.",
        ("all", "last"),
    )
    heldout: float = field(
        0.0, "Fraction of the examples that is held out to measure the loss on it.", BELOW_ONE
    )
    heldout_files: str = field("", "Separate files with held-out examples, in the format of files.")
    max_length: int = field(
        0,
        "Maximum tokens of prompt plus response; longer examples are dropped. 0: "
        "sampler.max_prompt_length + sampler.max_response_length.",
        NOT_NEGATIVE,
    )
    pack: bool = field(False, "Pack several examples into each row of an update.")
    batch: int = field(128, "Sequences per update.", POSITIVE)
    micro_batch: int = field(
        32, "Sequences per forward and backward pass; divides batch.", POSITIVE
    )
    learning_rate: float = field(
        1e-3, "Peak learning rate; it decays linearly to a tenth.", POSITIVE
    )
    warmup_steps: int = field(20, "Updates during which the learning rate rises.", NOT_NEGATIVE)
    direct_share: float = field(
        0.5, "Share of demonstrations that give the answer without working it out.", SHARE
    )
    direct_error: float = field(0.5, "Share of direct demonstrations with a wrong answer.", SHARE)
    worked_error: float = field(
        0.1, "Probability of an error in each column of a worked demonstration.", SHARE
    )


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """The section `evaluate`: held-out problems, for `train` and `evaluate`."""

    every: int = field(
        0,
        "Rollout steps between evaluations; 0: only before and after training.",
        NOT_NEGATIVE,
        **OPERATIONAL,
    )
    sets: str = field(
        "",
        "Files or names in drpo_jax.data.SETS, separated by commas. Empty: a held-out part of the "
        "training problems.",
    )
    problems: int = field(256, "Number of held-out problems without evaluate.sets.", POSITIVE)
    samples: int = field(4, "Responses per problem: the k of avg@k.", POSITIVE, may_change=True)
    temperature: float = field(1.0, "Sampling temperature.", POSITIVE, may_change=True)
    greedy: bool = field(True, "Also sample one greedy response per problem.", may_change=True)
    precision: str = field(
        "exact",
        "exact: without quantization. sampler: with the rollout sampler, including its recipe, float8 "
        "cache and noise; the released FP8 runs validate this way.",
        ("exact", "sampler"),
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """The section `checkpoint`."""

    every: int = field(20, "Rollout steps between saves.", POSITIVE, **OPERATIONAL)
    keep: int = field(
        2,
        "Latest checkpoints to keep, besides the best. At least 2 are kept, because the last one is not "
        "known to be good before a later update was finite.",
        POSITIVE,
        **OPERATIONAL,
    )
    best_metric: str = field(
        "eval/avg", "Metric whose highest value marks the best checkpoint.", distinguishes=False
    )
    grace_seconds: float = field(
        30.0,
        "Seconds from SIGTERM or Ctrl-C to the forced end of the process. The run finishes its step and "
        "saves; a step that would take more than half of this time is abandoned.",
        POSITIVE,
        **OPERATIONAL,
    )


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """The section `log`."""

    wandb: str = field(
        "",
        "Weights & Biases project that also receives the metrics; empty: none. Requires the package "
        "wandb.",
        **OPERATIONAL,
    )
    every: int = field(1, "Rollout steps between log records.", POSITIVE, **OPERATIONAL)
    mismatch_every: int = field(
        10,
        "Rollout steps between comparisons of the sampler's logprobs with the learner's; 0: never.",
        NOT_NEGATIVE,
        **OPERATIONAL,
    )
    samples_every: int = field(
        10,
        "Rollout steps between sampled responses printed on the console; 0: never.",
        NOT_NEGATIVE,
        **OPERATIONAL,
    )
