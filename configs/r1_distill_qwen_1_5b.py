"""DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math: the paper's setting with a model that reasons already.

    python -m drpo_jax.train --config=configs/r1_distill_qwen_1_5b.py --workdir=runs/r1_distill \
        --config.model.path=CHECKPOINT_DIRECTORY

Its chat template opens the thought by itself. Variants, combined by commas (drpo_jax/paper.py):
objectives, boundary, smoke.
"""

from drpo_jax.paper import paper_config, with_variants


def get_config(variants=""):
    config = paper_config("r1-distill-qwen-1.5b")
    config.mesh.tensor = 2  # it has two key heads
    return with_variants(config, variants, {})
