"""Qwen3-4B-Base on DAPO-Math: the paper's dense setting.

    drpo train --config=configs/qwen3_4b_base.py --workdir=runs/qwen3_4b \
        --config.model.path=Qwen/Qwen3-4B-Base

64 prompts with 8 responses each, 4 updates per rollout. Without a network, set model.path to a
directory. docs/settings.md says where each value comes from. Variants, separated by commas:

    grpo, cispo, sapo   the baselines as released: GRPO's clip is 0.2/0.28
    grpo_symmetric      GRPO with a clip of 0.2/0.2
    mask_drpo           Mask-DRPO whose mask has DPPO's boundary, 0.15

and those of every config (drpo_jax/config/variants.py): other objectives, readings of the threshold
such as boundary, smoke.
"""

from drpo_jax.config.paper import BASELINES, paper_config
from drpo_jax.config.variants import with_variants

VARIANTS = BASELINES


def get_config(variants=""):
    return with_variants(paper_config("qwen3-4b"), variants, VARIANTS)
