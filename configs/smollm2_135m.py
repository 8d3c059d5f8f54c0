"""SmolLM2-135M-Instruct, a real language model, learns to add on two CPU cores.

    bash launch/smollm2.sh

downloads the weights, converts them and trains. A prompt is a question such as "What is 68 + 56?" in the
model's chat template. A response has at most 12 tokens and is rewarded if its last integer is right.
Variants, separated by commas (drpo_jax/config/variants.py): objectives, readings of the threshold,
smoke.
"""

import dataclasses

from drpo_jax.config import default_config
from drpo_jax.config.variants import with_variants
from drpo_jax.models import PRESETS


def get_config(variants=""):
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["smollm2-135m"]))
    config.data.update(
        task="chain_sum",
        digits=2,
        terms=2,
        operations="+",
        chat=True,
        system="Add.",  # Replaces the template's own message, which is four times as long.
    )
    config.sampler.update(max_prompt_length=28, max_response_length=12, slots=128, decode_steps=12)
    config.optimizer.update(
        learning_rate=3e-5, warmup_steps=5, schedule="linear", b2=0.99, weight_decay=0.0
    )
    config.train.update(steps=50, prompts=16, samples=8, mini_batch_prompts=8, micro_batch=32)
    config.train.save_rollout_every = 10
    config.evaluate.update(every=25, problems=128, samples=2)
    config.checkpoint.update(every=25, keep=1)
    return with_variants(config, variants, {})
