"""Qwen3-30B-A3B-Base on DAPO-Math: the paper's mixture of experts, in three precisions.

    python -m drpo_jax.train --config=configs/qwen3_30b_a3b.py:fp8_e2e --workdir=runs/qwen3_30b \
        --config.model.path=CHECKPOINT_DIRECTORY

256 prompts of 16 responses, 8 updates per rollout; the mesh is for 64 chips (v5p:4x4x4).
Variants, combined by commas (drpo_jax/paper.py): bf16 (the default), fp8_rollout, fp8_e2e; objectives,
boundary, smoke.
"""

from drpo_jax.paper import PRECISION, large_config, with_variants


def get_config(variants="bf16"):
    return with_variants(large_config("qwen3-30b-a3b"), variants, PRECISION)
