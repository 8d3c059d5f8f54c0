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
        "are packed, and their width follows the lengths of the responses. 0: see micro_batch.",
        NOT_NEGATIVE,
    )
    pack: bool = field(
        False, "Pack several sequences into each row of an update; with micro_tokens, always."
    )
    routing_replay: bool = field(
        False, "The learner routes tokens to the experts that the sampler chose (R3)."
    )
    epochs: int = field(1, "Passes over each rollout.", POSITIVE)
    max_skipped: int = field(
        5,
        "Number of consecutive non-finite updates after which the run stops.",
        POSITIVE,
        **OPERATIONAL,
    )
    accept_source: str = field(
        "",
        "Hash of a changed source of reward.path or objective.path with which the run may be resumed; "
        "several are separated by commas.",
        **OPERATIONAL,
    )
    save_rollout_every: int = field(
        20,
        "Rollout steps between saved rollouts; 0: never.",
        NOT_NEGATIVE,
        **OPERATIONAL,
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
        "Passes over the examples of files or rollouts, each in an order of its own; 0: steps.",
        NOT_NEGATIVE,
    )
    files: str = field(
        "",
        "Chats or prompts with responses to learn from: a file (.jsonl or .parquet), or several by a "
        "pattern such as chats/*.parquet. Empty: rollouts, or the task's demonstrations.",
    )
    rollouts: str = field(
        "", "Workdir of a run whose saved rollouts are learned from: its right responses."
    )
    min_reward: float = field(1.0, "Lowest reward of a right response (rollouts).")
    per_problem: int = field(
        4, "Most responses to one problem (rollouts); 0: no limit.", NOT_NEGATIVE
    )
    turns: str = field(
        "all",
        "Turns of the assistant that are learned from a chat: all, each after the messages before it, "
        "or the last.",
        ("all", "last"),
    )
    heldout: float = field(
        0.0, "Share of the examples that is held out to measure its loss.", BELOW_ONE
    )
    heldout_files: str = field("", "Held-out examples from files of their own, as in files.")
    max_length: int = field(
        0,
        "Tokens of prompt and response; longer examples are dropped. 0: sampler.max_prompt_length + "
        "sampler.max_response_length.",
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
        "Project in Weights & Biases that also receives the metrics; empty: none. Needs the package "
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
