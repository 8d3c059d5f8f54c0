"""The laboratory: small models in a regime in which objectives differ (experiments/small).

    drpo train --config=configs/lab.py --workdir=runs/lab

The task is `marked` (drpo_jax/data/marked.py): 5 to 8 % of the sampled tokens have µ <= 0.01, and these
decide whether a response is right. A rollout of 16 x 8 responses serves 8 updates (mini-batches of 4
prompts, 2 epochs), at a constant learning rate and without load balancing, which Adam would amplify once
rewards vanish.

Variants, as in --config=configs/lab.py:VARIANT. The first six mirror the settings of the DRPO paper:

    moe_fp8_rollout  mixture of experts, FP8 weights in the sampler (the default)
    moe_fp8_e2e      the same, FP8 matmuls in the learner as well
    moe_bf16         the same in bfloat16, nothing quantized
    dense            a dense model in bfloat16
    hybrid           gated DeltaNet and full attention layers, mixture with a shared expert, bfloat16
    qwen2            dense, biases, no query and key norms, bfloat16, a stronger start

and those of every config (drpo_jax/config/variants.py).
"""

from drpo_jax.config import default_config
from drpo_jax.config.variants import with_variants
from drpo_jax.data import TASKS, MarkTokenizer

_BF16 = {"compute.dtype": "bfloat16", "precision.recipe": "none"}
_DENSE = {"model.experts": 0, "model.experts_per_token": 0, "model.expert_size": 0}

VARIANTS = {
    "moe_fp8_rollout": {"precision.recipe": "rollout"},
    "moe_fp8_e2e": {"precision.recipe": "e2e"},
    "moe_bf16": _BF16,
    "dense": {**_BF16, **_DENSE, "model.mlp_size": 384},
    "hybrid": {
        **_BF16,
        "model.attention_gate": True,
        "model.rotary_fraction": 0.25,
        "model.norm_offset": 1.0,
        "model.shared_expert_size": 96,
        "model.full_attention_every": 2,
        "model.linear_key_heads": 2,
        "model.linear_value_heads": 4,
        "model.linear_key_dim": 32,
        "model.linear_value_dim": 32,
    },
    "qwen2": {
        **_BF16,
        **_DENSE,
        "model.mlp_size": 384,
        "model.attention_bias": True,
        "model.qk_norm": False,
        "sft.steps": 1000,
        "sft.worked_error": 0.0,
    },
}


def get_config(variants=""):
    config = default_config()
    config.precision.recipe = "rollout"

    config.model.vocab_size = MarkTokenizer.vocab_size
    config.model.hidden_size = 128
    config.model.layers = 2
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.head_dim = 32
    config.model.mlp_size = 0
    config.model.experts = 8
    config.model.experts_per_token = 2
    config.model.expert_size = 96
    config.model.rope_theta = 1e4
    config.model.tie_embeddings = True
    config.compute.unroll = 2

    config.data.task = "marked"
    config.data.digits = 2
    config.data.operations = "+"
    config.data.mark_exponent = 0.8
    prompt, response = TASKS["marked"].lengths(config.data)
    config.sampler.max_prompt_length = prompt
    config.sampler.max_response_length = response
    config.sampler.slots = 128
    config.sampler.decode_steps = response

    config.sft.steps = 500
    config.sft.batch = 128
    config.sft.micro_batch = 128
    config.sft.learning_rate = 4e-3
    config.sft.warmup_steps = 20
    config.sft.direct_share = 0.0
    config.sft.worked_error = 0.02

    config.train.steps = 40
    config.train.prompts = 16
    config.train.samples = 8
    config.train.mini_batch_prompts = 4
    config.train.micro_batch = 32
    config.train.epochs = 2
    config.train.save_rollout_every = 0
    config.log.mismatch_every = 4
    config.evaluate.every = 2
    config.evaluate.problems = 128
    config.evaluate.samples = 1
    config.evaluate.greedy = False
    config.checkpoint.keep = 1
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"

    return with_variants(config, variants, VARIANTS)
