"""Qwen3-4B-Base on DAPO-Math: the paper's dense setting.

    python -m drpo_jax.train --config=configs/qwen3_4b_base.py --workdir=runs/qwen3_4b \
        --config.model.path=CHECKPOINT_DIRECTORY

Variants, combined by commas (drpo_jax/paper.py): objectives, boundary, smoke.
"""

from drpo_jax.paper import paper_config, with_variants


def get_config(variants=""):
    return with_variants(paper_config("qwen3-4b"), variants, {})
