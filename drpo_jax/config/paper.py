"""The settings of the DRPO paper that its configs share, and its baselines.

`docs/settings.md` states for every field whether its value is released, inferred or ours.
"""

import dataclasses

from ml_collections import ConfigDict

from drpo_jax.config.sections import default_config
from drpo_jax.config.variants import objective_variant
from drpo_jax.models import PRESETS
from drpo_jax.objectives import THRESHOLDS

# Variants for the baselines, with the settings of the released runs instead of the objectives' defaults.
BASELINES = {
    "grpo": objective_variant("grpo", epsilon_low=0.2, epsilon_high=0.28),
    "grpo_symmetric": objective_variant("grpo", epsilon_low=0.2, epsilon_high=0.2),
    "cispo": objective_variant("cispo", epsilon_low=10.0),  # At 1 and above, r has no lower bound.
    "sapo": objective_variant("sapo", aggregation="seq-mean-token-mean"),
    # With one threshold of 12.5 for mask and penalty, it would be the surrogate.
    "mask_drpo": objective_variant("mask_drpo", mask_delta=THRESHOLDS["delta"]["boundary"]),
}

PRECISION = {
    "bf16": {"precision.recipe": "none"},
    "fp8_rollout": {"precision.recipe": "rollout"},
    "fp8_e2e": {"precision.recipe": "e2e"},
}

# The settings of verl's public script for end-to-end FP8 on Qwen3-30B-A3B, without its objective.
FP8_E2E_RELEASED = {
    **PRECISION["fp8_e2e"],
    "precision.scale": "float32",
    "precision.gradient": "e4m3",
    "objective.behavior": "rescored",
    "objective.correction": "tis",
    "objective.correction_level": "token",
    "objective.correction_cap": 2.0,
    "evaluate.precision": "sampler",
    "optimizer.weight_decay": 0.1,
    "reward.overlong_buffer": 512,
    "sampler.max_response_length": 20480,
    "train.prompts": 128,
    "train.mini_batch_prompts": 128,
}


def paper_config(preset: str) -> ConfigDict:
    """Returns the settings of the paper's Qwen3-4B-Base run with a preset's architecture.

    64 prompts with 8 responses each, 4 updates per rollout, responses of up to 8,192 tokens, DRPO at
    the released threshold, µ from the sampler, Â = reward − mean, AdamW at 1e-6, bfloat16 compute on
    float32 weights. model.path must name the checkpoint. data.problems may name a file of
    DAPO-Math-17k.

    The mesh takes as many devices as the model has key/value heads, or a multiple: 8 or 16 for
    Qwen3-4B. With 16 devices of 32 GB (v6e:4x4), each holds an eighth of a bfloat16 copy of the model
    for sampling, a sixteenth of the training state, and a sixteenth of the cache of 128 sequences,
    which takes 12 GB for Qwen3-4B. docs/devices.md says why the meshes are as they are.
    """
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS[preset]))
    config.compute.update(dtype="bfloat16", remat="full")
    config.mesh.update(data=1, fsdp=-1)
    config.sampler_mesh.update(data=-1, tensor=config.model.kv_heads)
    config.objective.update(
        name="drpo",
        threshold="released",
        advantage="dr_grpo",
        aggregation="seq-mean-token-sum-norm",
        behavior="sampler",
    )
    config.optimizer.update(
        learning_rate=1e-6, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0
    )
    config.sampler.update(
        max_prompt_length=2048, max_response_length=8192, temperature=1.0, slots=128
    )
    config.train.update(steps=800, prompts=64, samples=8, mini_batch_prompts=16, micro_batch=16)
    config.train.pack = True  # Most responses are far shorter than the longest.
    config.evaluate.update(
        sets="aime24,aime25", every=10, samples=16, temperature=1.0, greedy=False
    )
    config.checkpoint.update(every=10, keep=2)
    config.data.update(
        task="math", problems="dapo_math_17k", filter="dapo", chat=True, instruction="none"
    )
    config.reward.extract = "anywhere"
    return config


def large_config(preset: str) -> ConfigDict:
    """Returns the settings of the paper's Qwen3-30B-A3B run, for a mixture of experts on 64 chips.

    256 prompts with 16 responses each, 8 updates per rollout; all else as in `paper_config`. The mesh
    is for v5p:4x4x4. The learner splits the experts over 4 devices; over 8, every layer would gather
    twice as many tokens (`models.experts.run_experts`). The sampler, which has few tokens, splits them
    over all devices.
    """
    config = paper_config(preset)
    config.mesh.expert = 4
    config.sampler_mesh.update(data=0, expert=-1)
    config.sampler.slots = 1024
    config.train.update(prompts=256, samples=16, mini_batch_prompts=32, micro_batch=64)
    return config
