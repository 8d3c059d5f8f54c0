"""DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math: the paper's setting with a reasoning model.

    python -m drpo_jax.train --config=configs/r1_distill_qwen_1_5b.py --workdir=runs/r1_distill \
        --config.model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

Its chat template opens the thought by itself. Without a network, model.path is a directory. Variants,
combined by commas (drpo_jax/config/variants.py): objectives, readings of the threshold such as
boundary, smoke.
"""

from drpo_jax.config.paper import paper_config
from drpo_jax.config.variants import with_variants


def get_config(variants=""):
    config = paper_config("r1-distill-qwen-1.5b")
    config.mesh.tensor = 2  # The model has two key heads.
    return with_variants(config, variants, {})
