"""Qwen3-4B-Base on DAPO-Math: the paper's dense setting.

    drpo train --config=configs/qwen3_4b_base.py --workdir=runs/qwen3_4b \
        --config.model.path=Qwen/Qwen3-4B-Base

64 prompts with 8 responses each, 4 updates per rollout (drpo_jax/config/paper.py). Without a network,
set model.path to a directory. Variants, combined by commas (drpo_jax/config/variants.py): objectives,
readings of the threshold such as boundary, smoke.
"""

from drpo_jax.config.paper import paper_config
from drpo_jax.config.variants import with_variants


def get_config(variants=""):
    return with_variants(paper_config("qwen3-4b"), variants, {})
