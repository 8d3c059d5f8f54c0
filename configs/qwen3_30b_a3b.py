"""Qwen3-30B-A3B-Base on DAPO-Math: the paper's mixture of experts, in three precisions.

    drpo train --config=configs/qwen3_30b_a3b.py:fp8_e2e --workdir=runs/qwen3_30b \
        --config.model.path=Qwen/Qwen3-30B-A3B-Base

256 prompts with 16 responses each, 8 updates per rollout; the mesh is for 64 chips (v5p:4x4x4). Without
a network, set model.path to a directory. docs/settings.md says where each value comes from. Variants,
separated by commas:

    bf16                the default
    fp8_rollout         FP8 weights in the sampler
    fp8_e2e             FP8 matmuls in sampler and learner
    fp8_e2e_released    fp8_e2e with lengths, batches and optimizer of verl's public script
    grpo, cispo, sapo   the baselines as released: GRPO's clip is 0.2/0.28
    grpo_symmetric      GRPO with a clip of 0.2/0.2
    mask_drpo           Mask-DRPO whose mask has DPPO's boundary, 0.15

and those of every config (drpo_jax/config/variants.py): other objectives, readings of the threshold
such as boundary, smoke.
"""

from drpo_jax.config.paper import BASELINES, FP8_E2E_RELEASED, PRECISION, large_config
from drpo_jax.config.variants import with_variants

VARIANTS = {**PRECISION, "fp8_e2e_released": FP8_E2E_RELEASED, **BASELINES}


def get_config(variants=""):
    return with_variants(large_config("qwen3-30b-a3b"), variants, VARIANTS)
