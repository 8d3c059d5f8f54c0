"""Qwen3.5-35B-A3B-Base on DAPO-Math: the paper's hybrid of gated DeltaNet and attention.

    python -m drpo_jax.train --config=configs/qwen3_5_35b_a3b.py --workdir=runs/qwen3_5_35b \
        --config.model.path=CHECKPOINT_DIRECTORY

Batches are those of Qwen3-30B-A3B-Base; the mesh is for 64 chips (v5p:4x4x4). Variants, combined by
commas (drpo_jax/paper.py): bf16 (the default), fp8_rollout, fp8_e2e; objectives, boundary, smoke.
"""

from drpo_jax.paper import PRECISION, large_config, with_variants


def get_config(variants="bf16"):
    return with_variants(large_config("qwen3.5-35b-a3b"), variants, PRECISION)
