"""The paper's settings: what its six configs share, and the variants that they combine.

A config takes variants by name, as in `configs/qwen3_30b_a3b.py:fp8_e2e,boundary,smoke`:

  bf16 fp8_rollout fp8_e2e   the precision, where the config has it
  grpo, spo, dppo_tv, …      every objective of the table, instead of drpo
  boundary scaled original   another reading of the threshold than the released 12.5: the first two for
                             drpo and its ablations, the third for spo
  smoke                      random weights, few layers, arithmetic in characters: the same programs,
                             in less than two minutes on a CPU
"""

import dataclasses
import difflib

from drpo_jax.config import default_config
from drpo_jax.data import CharTokenizer, max_prompt_length, max_response_length
from drpo_jax.models import PRESETS
from drpo_jax.objectives import OBJECTIVES, THRESHOLDS

PRECISION = {
    "bf16": {"precision.recipe": "none"},
    "fp8_rollout": {"precision.recipe": "rollout"},
    "fp8_e2e": {"precision.recipe": "e2e"},
}
READINGS = tuple(dict.fromkeys(name for readings in THRESHOLDS.values() for name in readings))


def paper_config(preset):
    """The setting of the paper's Qwen3-4B-Base run, with the architecture of a preset.

    64 prompts of 8 responses, 4 updates per rollout, 8,192 tokens, DRPO at the released threshold,
    µ from the sampler, Â = reward − mean, AdamW at 1e-6, bfloat16 compute on float32 weights. Needs
    model.path, the checkpoint; data.problems may name a file of DAPO-Math-17k. The mesh takes 4, 8 or
    16 devices: with 16 of 32 GB (v6e:4x4) each holds a quarter of a bfloat16 copy of the model for
    sampling, a sixteenth of the training state, and of the cache of 128 sequences, 11 GB for Qwen3-4B.
    """
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS[preset]))
    config.compute.update(dtype="bfloat16", remat="full")
    config.mesh.update(data=1, fsdp=-1, tensor=4)
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
        max_prompt_length=1024, max_response_length=8192, temperature=1.0, slots=128
    )
    config.train.update(steps=300, prompts=64, samples=8, mini_batch_prompts=16, micro_batch=16)
    config.train.pack = True  # most responses are far shorter than the longest
    config.evaluate.update(
        sets="aime24,aime25", every=10, samples=16, temperature=1.0, greedy=False
    )
    config.checkpoint.update(every=10, keep=2)
    config.data.update(
        task="math",
        problems="dapo_math_17k",
        filter="dapo",
        chat=True,
        instruction="boxed",
    )
    return config


def large_config(preset):
    """The setting of the paper's Qwen3-30B-A3B run, for a mixture of experts on 64 chips (v5p:4x4x4):
    256 prompts of 16 responses, 8 updates per rollout; all else as in `paper_config`.

    Experts lie on 4 devices: on 8 the sampler would read half as many weights at every token, but every
    layer of the learner would gather twice as many tokens (`models.experts.run_experts`).
    """
    config = paper_config(preset)
    config.mesh.update(expert=4, tensor=1)
    config.sampler.update(max_prompt_length=2048, slots=1024)
    config.train.update(prompts=256, samples=16, mini_batch_prompts=32, micro_batch=64)
    return config


def with_variants(config, names, variants):
    """The config with the variants that `names` lists, separated by commas.

    Args:
      names: such as "fp8_e2e,boundary"; "" changes nothing.
      variants: {name: {field: value}} of this config, besides those that all have.

    Raises:
      ValueError: a name that is no variant, or two that set one field to different values.
    """
    known = _objectives() | {r: {"objective.threshold": r} for r in READINGS}
    known |= variants
    chosen = [name for name in names.split(",") if name]
    owner = {}
    for name in chosen:
        if name not in known and name != "smoke":
            near = difflib.get_close_matches(name, [*known, "smoke"], 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"there is no variant {name!r}; {hint}there are {', '.join([*known, 'smoke'])}"
            )
        for field, value in known.get(name, {}).items():
            other, theirs = owner.setdefault(field, (name, value))
            if theirs != value:
                values = " and ".join(repr(v) if v else "none" for v in (theirs, value))
                raise ValueError(
                    f"the variants {other!r} and {name!r} contradict each other: {field} is {values}"
                )
    config.update_from_flattened_dict({field: value for field, (_, value) in owner.items()})
    return _smoke(config) if "smoke" in chosen else config


def _objectives():
    """{objective: fields}. Without a threshold of its own an objective takes none."""
    fields = {name: {"objective.name": name} for name in OBJECTIVES}
    for name in fields:
        readings = {"delta", "epsilon"} & set(OBJECTIVES[name].hyper)
        if not readings or name.startswith("dppo"):
            fields[name]["objective.threshold"] = ""
    fields["gspo"]["objective.aggregation"] = "seq-mean-token-mean"
    return fields


def _smoke(config):
    """The config with every size small, on one device, without files; all else as it is."""
    model = config.model
    model.update(vocab_size=CharTokenizer.vocab_size, hidden_size=64, heads=4, kv_heads=2)
    model.update(layers=max(2, model.full_attention_every), head_dim=16, path="")
    model.update({field: 64 for field in ("mlp_size", "expert_size") if model[field]})
    if model.experts:
        model.update(experts=8, experts_per_token=2)
    if model.shared_expert_size:
        model.shared_expert_size = 64
    if model.full_attention_every > 1:
        model.update(linear_key_heads=2, linear_value_heads=4)
        model.update(linear_key_dim=16, linear_value_dim=16)
        config.sampler.parity_bound = 1.0  # FP8 on a random DeltaNet this narrow: 0.4 to 0.6
    config.mesh.update(data=-1, fsdp=1, expert=1, tensor=1)
    config.data.update(
        task="arithmetic", digits=1, operations="+", problems="", filter="none", tokenizer="",
        chat=False, thinking="default", system="", instruction="{problem}",
    )  # fmt: skip
    config.sampler.update(
        max_prompt_length=max_prompt_length(config.data),
        max_response_length=max_response_length(config.data),
        slots=32,
    )
    config.train.update(steps=2, prompts=8, samples=4, mini_batch_prompts=4, micro_batch=8)
    config.train.save_rollout_every = 1
    config.evaluate.update(every=1, problems=8, samples=2, sets="")
    config.checkpoint.every = 1
    return config
