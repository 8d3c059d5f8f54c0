"""DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math: the paper's setting with a reasoning model.

    drpo train --config=configs/r1_distill_qwen_1_5b.py --workdir=runs/r1_distill \
        --config.model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

The chat template already opens the thought. Without a network, set model.path to a directory.
docs/settings.md says where each value comes from. Variants, separated by commas:

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
    config = paper_config("r1-distill-qwen-1.5b")
    config.mesh.tensor = 2
    # Two key/value heads split attention over two devices only; fsdp splits all other weights.
    config.sampler_mesh.update(data=0, fsdp=-1)
    return with_variants(config, variants, VARIANTS)
