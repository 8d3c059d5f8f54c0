"""A small Qwen3 mixture of experts learns arithmetic on two CPU cores: warm start, then DRPO.

    drpo train --config=configs/tiny.py --workdir=runs/tiny

Variants, as in --config=configs/tiny.py:VARIANT; commas combine them with those of every config
(drpo_jax/config/variants.py: objectives, readings of the threshold, smoke):

    fp8_rollout     float32 compute, FP8 weights in the sampler (the default)
    fp8_e2e         float32 compute, FP8 weights in the sampler and FP8 matmuls in the learner
    fp8_tensorwise  as fp8_e2e, with one scale per tensor
    float32         float32 compute, nothing quantized
    bf16            bfloat16 compute, nothing quantized
"""

from drpo_jax.config import default_config
from drpo_jax.config.variants import with_variants
from drpo_jax.data import CharTokenizer, max_prompt_length, max_response_length

VARIANTS = {
    "bf16": {"compute.dtype": "bfloat16", "precision.recipe": "none"},
    "fp8_rollout": {"precision.recipe": "rollout"},
    "fp8_e2e": {"precision.recipe": "e2e"},
    "fp8_tensorwise": {"precision.recipe": "tensorwise"},
    "float32": {"precision.recipe": "none"},
}


def get_config(variants=""):
    config = default_config()
    config.precision.recipe = "rollout"

    config.model.vocab_size = -(-CharTokenizer.vocab_size // 16) * 16
    config.model.hidden_size = 128
    config.model.layers = 4
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.head_dim = 32
    config.model.mlp_size = 0
    config.model.experts = 16
    config.model.experts_per_token = 2
    config.model.expert_size = 96
    config.model.rope_theta = 1e4
    config.model.load_balance = 0.01

    config.compute.unroll = 4

    config.data.digits = 3
    config.data.operations = "+-*"
    config.sampler.max_prompt_length = max_prompt_length(config.data)
    config.sampler.max_response_length = max_response_length(config.data)
    config.sampler.slots = 256
    config.sampler.decode_steps = 48

    config.sft.steps = 500
    config.sft.batch = 128
    config.sft.micro_batch = 32
    config.sft.pack = True  # Most demonstrations are a third as long as the longest.
    config.sft.learning_rate = 4e-3
    config.sft.warmup_steps = 20
    config.sft.direct_share = 0.6
    config.sft.direct_error = 0.9
    config.sft.worked_error = 0.02

    config.train.steps = 120
    config.train.prompts = 32
    config.train.samples = 8
    config.train.mini_batch_prompts = 8
    config.train.micro_batch = 64
    config.evaluate.every = 30
    config.checkpoint.keep = 10  # All checkpoints, for the notebook; 30 MB each.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "linear"

    return with_variants(config, variants, VARIANTS)
