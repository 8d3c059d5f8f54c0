"""DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math: the paper's setting with a reasoning model.

    drpo train --config=configs/r1_distill_qwen_1_5b.py --workdir=runs/r1_distill \
        --config.model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

The chat template already opens the thought. Without a network, set model.path to a directory. Variants,
combined by commas (drpo_jax/config/variants.py): objectives, readings of the threshold such as
boundary, smoke.
"""

from drpo_jax.config.paper import paper_config
from drpo_jax.config.variants import with_variants


def get_config(variants=""):
    config = paper_config("r1-distill-qwen-1.5b")
    config.mesh.tensor = 2  # The model has two key/value heads.
    return with_variants(config, variants, {})
