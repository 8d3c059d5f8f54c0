"""The section `sampler`."""

import dataclasses

from drpo_jax.fields import NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, field


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Sampling distribution, lengths, and the size of the decode batch."""

    max_prompt_length: int = field(
        1024, "Maximum prompt length, tokens; a longer one is an error.", POSITIVE
    )
    max_response_length: int = field(
        8192, "Maximum response length, tokens, including the stop token.", POSITIVE
    )
    temperature: float = field(1.0, "Sampling temperature.", POSITIVE)
    top_k: int = field(0, "Sample from the k most likely tokens; 0: off.", NOT_NEGATIVE)
    top_p: float = field(
        1.0,
        "Sample from the smallest set of tokens with this probability mass; 1: off.",
        POSITIVE_SHARE,
    )
    top_logprobs: int = field(
        0,
        "Most likely tokens recorded at each position; 0: none, or 20 for objectives that need them.",
        NOT_NEGATIVE,
    )
    slots: int = field(
        128, "Sequences decoded at the same time; a finished one makes room for the next.", POSITIVE
    )
    decode_steps: int = field(32, "Decode steps per device call.", POSITIVE)
    prefill_chunk: int = field(256, "Prompt tokens per prefill call.", POSITIVE)
    parity: str = field(
        "warn",
        "What happens if the sampler's and the learner's logprobs of the first rollout differ by more "
        "than parity_bound. warn: a warning. stop: the run ends. off: no comparison.",
        ("warn", "stop", "off"),
        may_change=True,
    )
    parity_bound: float = field(
        0.0,
        "Bound on the mean |difference| of the logprobs, nats; 0: chosen by compute.dtype and "
        "precision.recipe.",
        NOT_NEGATIVE,
        may_change=True,
    )
