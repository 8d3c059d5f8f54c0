"""Qwen3-30B-A3B-Base on DAPO-Math: the paper's mixture of experts, in three precisions.

    drpo train --config=configs/qwen3_30b_a3b.py:fp8_e2e --workdir=runs/qwen3_30b \
        --config.model.path=Qwen/Qwen3-30B-A3B-Base

256 prompts with 16 responses each, 8 updates per rollout; the mesh is for 64 chips (v5p:4x4x4). Without
a network, set model.path to a directory. Variants, combined by commas (drpo_jax/config/variants.py):
bf16 (the default), fp8_rollout, fp8_e2e; objectives, readings of the threshold such as boundary, smoke.
"""

from drpo_jax.config.paper import PRECISION, large_config
from drpo_jax.config.variants import with_variants

VARIANTS = PRECISION


def get_config(variants=""):
    return with_variants(large_config("qwen3-30b-a3b"), variants, VARIANTS)
