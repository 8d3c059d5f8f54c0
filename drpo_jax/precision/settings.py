"""The section `precision`: FP8 in sampler and learner."""

import dataclasses

from drpo_jax.fields import NOT_NEGATIVE, field
from drpo_jax.precision.float8 import SCALES
from drpo_jax.precision.recipes import GRADIENTS, RECIPES


@dataclasses.dataclass(frozen=True)
class PrecisionSettings:
    """FP8 recipe and how the sampler stores quantized values."""

    recipe: str = field(
        "none",
        "rollout: FP8 matmuls in the sampler. e2e: FP8 matmuls in the learner as well. Both use a scale "
        "per block of 128. tensorwise: FP8 in both, one scale per tensor; devices with float8 matmuls "
        "multiply the codes themselves.",
        RECIPES,
    )
    scale: str = field("pow2", "Scales of the FP8 codes: powers of two, or any float32.", SCALES)
    gradient: str = field("e5m2", "Format of the gradients under e2e and tensorwise.", GRADIENTS)
    sampler_weights: str = field(
        "values",
        "How the sampler stores its quantized weights: codes (float8, expanded at every use), or "
        "values (expanded once at each weight sync).",
        ("values", "codes"),
    )
    kv_cache: str = field(
        "none",
        "e4m3: the sampler stores keys and values as float8 codes.",
        ("none", "e4m3"),
    )
    noise: float = field(
        0.0,
        "Experiment: every weight sync multiplies the sampler's weights by 1 + noise · N(0, 1), as "
        "if a different engine did the sampling. The recorded logprobs are exact for the "
        "noisy weights.",
        NOT_NEGATIVE,
    )
    noise_fixed: bool = field(
        False,
        "Whether all weight syncs of a run draw the same noise, as one other engine would, instead of "
        "drawing it anew.",
    )
