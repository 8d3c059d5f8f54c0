"""The one door for configurations: the fields, what they mean, and the errors that people read.

A config file (`configs/*.py`) starts from `default_config()` and changes fields; the command line
changes single ones (`--config.train.steps=50`); `resolve` checks the result, fills in what follows
from other fields and freezes it; `claim_workdir` keeps the resolved copy beside the run, so that a
directory never mixes two experiments. `drpo_jax.cli` is the command line.

Anything wrong with what the user gave raises `BadInput`, a ValueError whose message names the
field, its value and what would be right.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import create, placeholder

from drpo_jax import data
from drpo_jax.errors import BadInput
from drpo_jax.models import read_config
from drpo_jax.objectives import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    KL,
    LEVELS,
    OBJECTIVES,
    THRESHOLDS,
    resolve_hyper,
)
from drpo_jax.objectives.advantages import NEEDS_GROUPS
from drpo_jax.precision.recipes import GRADIENTS, RECIPES
from drpo_jax.rewards import REWARDS
from drpo_jax.storage import write_whole


def default_config() -> ConfigDict:
    """Returns a config with every field at its default."""
    config = ConfigDict()
    config.seed = 0  # of the initial weights, the problems, the samples and the order of data

    config.model = create(
        # A Hugging Face directory to start from, with its architecture: the fields below follow it.
        path="",
        vocab_size=151936,  # rows of the embedding; at least the tokenizer's size
        hidden_size=1024,
        layers=28,
        heads=16,  # query heads
        kv_heads=8,  # key/value heads; divides heads
        head_dim=128,  # even (rotary pairs)
        mlp_size=3072,  # inner width of the dense MLP; 0 where every layer is a mixture of experts
        experts=0,  # experts per layer; 0: dense
        experts_per_token=0,  # experts that each token visits
        expert_size=0,  # inner width of one expert
        rope_theta=1e6,  # base of the rotary frequencies
        rms_eps=1e-6,
        tie_embeddings=False,  # the output head is the embedding's transpose
        attention_bias=False,  # of q, k and v (Qwen2)
        qk_norm=True,  # RMS norm of every query and key head (Qwen3)
        attention_gate=False,  # of the attention's output (Qwen3.5)
        rotary_fraction=1.0,  # share of a head's channels that is rotated
        norm_offset=0.0,  # norms multiply by it plus their scale; 1: zero-centred (Qwen3.5)
        shared_expert_size=0,  # inner width of the expert that all tokens visit; 0: none
        full_attention_every=1,  # n: layers n, 2n, ... attend, the others are gated DeltaNets
        linear_key_heads=0,  # of the DeltaNets
        linear_value_heads=0,  # a multiple of linear_key_heads
        linear_key_dim=0,
        linear_value_dim=0,
        linear_conv_kernel=4,  # tokens that their convolution sees
        load_balance=0.0,  # coefficient of the auxiliary load-balancing loss; 0: off
    )
    config.compute = create(
        dtype="float32",  # of activations and matmuls: float32 | bfloat16 (weights stay float32)
        remat="none",  # what layers keep for backward: none all, dots the matmuls, full the inputs
        unroll=1,  # layers per step of the learner's scan; more: longer to compile, faster on CPU
        grouped_matmul="auto",  # of the experts: blocked | ragged_dot | megablox | auto (by device)
        attention="auto",  # full | chunked | splash (TPU) | cudnn (GPU) | auto, by device and length
    )
    config.mesh = create(  # devices along each axis; -1 takes the remaining ones
        data=-1,
        fsdp=1,
        expert=1,
        tensor=1,
    )
    config.precision = create(
        # none | rollout (FP8 in the sampler) | e2e (in the learner, too), both in blocks of 128 |
        # tensorwise (in both, one scale a tensor; on chips that multiply float8 by themselves, native)
        recipe="none",
        scale="pow2",  # scale of a block of FP8 codes: pow2 | float32
        gradient="e5m2",  # of the gradients in e2e and tensorwise: e5m2 | e4m3
        sampler_weights="values",  # held as float8 codes, or values expanded once at weight sync
        kv_cache="none",  # e4m3: the sampler keeps keys and values as float8 codes
        # Experiment: the sampler's weights are multiplied by 1 + noise · N(0, 1), drawn anew at every
        # sync, as if another engine sampled; what it records stays exact for what it does
        noise=0.0,
    )
    config.objective = create(
        name="drpo",  # a name of drpo_jax.objectives.OBJECTIVES
        advantage="dr_grpo",  # reward -> advantage, a name of ADVANTAGES
        aggregation="seq-mean-token-sum-norm",  # token losses -> loss, a name of AGGREGATIONS
        horizon=0,  # tokens that seq-mean-token-sum-norm divides by; 0: sampler.max_response_length
        # mu: sampler, as recorded while sampling, before top_k and top_p | sampler_filtered, after
        # them (the ratio is then off by the mass they keep) | rescored, once by the learner
        behavior="sampler",
        correction="none",  # of the sampler's mismatch with behavior rescored: none | tis | mis
        correction_level="token",  # token | sequence | geometric
        correction_cap=2.0,  # the importance weight is truncated, or masked, above it
        correction_floor=0.0,  # and masked below it (mis)
        kl="none",  # to the initial model: k2 | k3 as a loss, k1 in the reward
        kl_coefficient=0.0,
        entropy_bonus=0.0,  # weight of the entropy beside the objective
        # Hyperparameters of the objectives. None: the objective's own default.
        threshold="",  # delta or epsilon by name: boundary | released | scaled | original
        delta=placeholder(float),  # boundary of |pi - mu| (of the KL for dppo_kl)
        epsilon=placeholder(float),  # spo: boundary of |r - 1|
        epsilon_low=placeholder(float),  # clip of the ratio: 1 - epsilon_low
        epsilon_high=placeholder(float),  # and 1 + epsilon_high
        dual_clip=placeholder(float),  # grpo: floor of J for negative advantages, above 1
        ratio_cap=placeholder(float),  # dppo, minirl: cap of the ratio in the coefficient
        tau_positive=placeholder(float),  # sapo: temperature for positive advantages
        tau_negative=placeholder(float),  # and for negative ones
        directional=placeholder(bool),  # mask_drpo: weight 1 wherever dppo keeps the token
    )
    config.reward = create(
        # Of the verifier, in drpo_jax.rewards.REWARDS; "": the task's own, or math for data.problems
        name="",
        format=0.0,  # added to the reward of a response that ends with one closed box
        overlong_buffer=0,  # last tokens of max_response_length over which the reward falls by 1
    )
    config.optimizer = create(  # AdamW
        learning_rate=1e-6,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        # Of the first moment: float32 | bfloat16. The second stays float32: in bfloat16, whose steps are
        # 0.4 %, a mean that forgets 1 - b2 = 0.1 % an update would hardly move.
        mu_dtype="float32",
        clip_norm=1.0,  # global norm of the gradient
        warmup_steps=0,  # optimizer updates with a rising learning rate
        schedule="constant",  # then constant | linear | cosine over the updates of train.steps
        final_fraction=0.0,  # of learning_rate, where linear and cosine end
    )
    config.sampler = create(
        max_prompt_length=1024,  # tokens; a longer prompt is an error
        max_response_length=8192,  # tokens, the stop token included
        temperature=1.0,
        top_k=0,  # sample among the k likeliest tokens; 0: off
        top_p=1.0,  # sample in the smallest set of this mass; 1: off
        top_logprobs=0,  # likeliest tokens recorded; 0: 20 for the objectives that need them
        slots=128,  # sequences decoded at once; one that ends makes room for the next
        decode_steps=32,  # most tokens per sequence between two looks of the host
        prefill_chunk=256,  # tokens of a prompt computed at once
        # The learner's logprobs of the first rollout are held against the sampler's: warn | stop where
        # they differ by more than the bound | off
        parity="warn",
        parity_bound=0.0,  # of mean |difference|, nat; 0: by compute.dtype and precision.recipe
    )
    config.train = create(
        steps=200,  # rollout steps
        prompts=64,  # per rollout
        samples=8,  # responses per prompt (the group of an advantage)
        mini_batch_prompts=16,  # prompts per optimizer update; divides prompts
        micro_batch=8,  # sequences per forward and backward pass; divides the mini-batch
        pack=False,  # several sequences per row in the updates
        routing_replay=False,  # the learner's tokens visit the experts that the sampler's did (R3)
        epochs=1,  # passes over a rollout
        max_skipped=5,  # non-finite updates in a row before the run stops
        save_rollout_every=20,  # rollout steps between saved rollouts; 0: never
        shuffle_rewards=False,  # control experiment: rewards permuted over the rollout
    )
    config.sft = create(  # the supervised warm start
        steps=0,  # optimizer updates; 0: none
        batch=128,  # sequences per update
        micro_batch=32,  # sequences per forward and backward pass; divides batch
        learning_rate=1e-3,
        warmup_steps=20,  # updates with a rising learning rate
        direct_share=0.5,  # share of demonstrations that answer without working
        direct_error=0.5,  # share of the direct ones whose answer is wrong
        worked_error=0.1,  # probability of an error in each column of a worked one
    )
    config.evaluate = create(
        every=0,  # rollout steps between evaluations; 0: only before and after
        sets="",  # files or names of SETS, by commas; "": a part of the training problems
        problems=256,  # of that part, which is held out
        samples=4,  # per problem: the k of avg@k
        temperature=1.0,
        greedy=True,  # one greedy response per problem as well
    )
    config.checkpoint = create(
        every=20,  # rollout steps between saves
        keep=2,  # the last ones kept, besides the best
        best_metric="eval/avg",  # the highest is the best
    )
    config.data = create(
        task="arithmetic",  # arithmetic | chain_sum | countdown, from the seed | math
        digits=3,  # of the operands (of the first one in a product); of chain_sum's terms, at most
        operations="+-*",
        terms=2,  # of chain_sum, or numbers of countdown, at most
        problems="",  # instead: a file (JSONL, parquet), or one of drpo_jax.data.SETS such as gsm8k
        # Which of them are dropped: none | clean, those that repeat or contradict others, that are
        # too long, or whose answer is never rewarded | dapo, also those without integer answers
        filter="none",
        rollouts="",  # responses.jsonl of an evaluation: keep the problems with a pass rate between
        pass_low=0.0,
        pass_high=1.0,
        tokenizer="",  # a Hugging Face directory; "": model.path, or single characters without one
        instruction="{problem}",  # what the model is asked: a text, or none | boxed | answer_line
        chat=False,  # through the tokenizer's chat template
        system="",  # message that opens the chat; "": what the template puts there
        thinking="default",  # enable_thinking of the template: on | off (Qwen3: an empty thought)
        init_from="",  # workdir of an sft run to start from; "": train does the warm start
    )
    config.log = create(
        every=1,  # rollout steps between logged steps
        mismatch_every=10,  # between comparisons of the sampler's logprobs with the learner's; 0: never
    )
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 3}} -> {'train.steps': 3}"""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, (Mapping, ConfigDict))
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


TASK_REWARDS = {
    "arithmetic": "arithmetic",
    "chain_sum": "integer",
    "countdown": "countdown",
    "math": "math",
}
CHOICES = {
    "compute.dtype": ("float32", "bfloat16"),
    "compute.remat": ("none", "full", "dots"),
    "compute.grouped_matmul": ("auto", "blocked", "ragged_dot", "megablox"),
    "compute.attention": ("auto", "full", "chunked", "splash", "cudnn"),
    "precision.recipe": tuple(RECIPES),
    "precision.gradient": tuple(GRADIENTS),
    "precision.kv_cache": ("none", "e4m3"),
    "precision.scale": ("pow2", "float32"),
    "precision.sampler_weights": ("values", "codes"),
    "objective.name": tuple(OBJECTIVES),
    "objective.advantage": tuple(ADVANTAGES),
    "objective.aggregation": tuple(AGGREGATIONS),
    "objective.behavior": ("sampler", "sampler_filtered", "rescored"),
    "objective.correction": ("none", *CORRECTIONS),
    "objective.correction_level": LEVELS,
    "objective.kl": KL,
    "objective.threshold": ("", *dict.fromkeys(name for t in THRESHOLDS.values() for name in t)),
    "sampler.parity": ("warn", "stop", "off"),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "data.task": tuple(TASK_REWARDS),
    "data.filter": ("none", "clean", "dapo"),
    "data.thinking": ("default", "on", "off"),
    "reward.name": ("", *REWARDS),
}
POSITIVE = """
    model.vocab_size model.hidden_size model.layers model.heads model.kv_heads model.head_dim
    model.rope_theta model.rms_eps model.full_attention_every model.linear_conv_kernel
    objective.delta objective.epsilon objective.epsilon_low compute.unroll objective.correction_cap
    objective.epsilon_high objective.ratio_cap objective.tau_positive objective.tau_negative
    optimizer.learning_rate optimizer.eps optimizer.clip_norm sampler.max_prompt_length
    sampler.max_response_length sampler.temperature sampler.slots sampler.decode_steps
    sampler.prefill_chunk train.steps
    train.prompts train.samples train.mini_batch_prompts train.micro_batch train.epochs
    train.max_skipped sft.batch sft.micro_batch sft.learning_rate evaluate.problems
    evaluate.samples evaluate.temperature checkpoint.every checkpoint.keep log.every
""".split()
NOT_NEGATIVE = """
    seed model.mlp_size model.experts model.experts_per_token model.expert_size model.load_balance
    model.shared_expert_size model.linear_key_heads model.linear_value_heads model.linear_key_dim
    model.linear_value_dim model.norm_offset
    objective.horizon objective.correction_floor objective.kl_coefficient objective.entropy_bonus
    sampler.top_logprobs sampler.parity_bound sampler.top_k log.mismatch_every
    optimizer.weight_decay optimizer.warmup_steps
    precision.noise reward.format reward.overlong_buffer train.save_rollout_every sft.steps
    sft.warmup_steps evaluate.every
""".split()
SHARES = """
    data.pass_low data.pass_high sft.direct_share sft.direct_error sft.worked_error
    optimizer.final_fraction
""".split()
MAY_CHANGE_ON_RESUME = re.compile(
    r"train\.(steps|save_rollout_every|max_skipped)|checkpoint\.(every|keep)"
    r"|sampler\.parity.*|evaluate\.(?!problems|sets).*|(log|mesh)\..*|model\.path|data\.tokenizer"
)

TOP_LOGPROBS = 20  # of DPPO's top-k divergences
HYPER = tuple(f for f, v in flatten(default_config()).items() if v is None)


def validate(config: Mapping[str, Any]) -> None:
    """Raises one `BadInput` that lists every problem: field, value, and what would be right.

    (Values are looked at once all fields are there and have their types.) Warns of a delta that
    no token can reach.
    """
    values = flatten(config)
    _raise(_field_problems(values))
    _raise(_range_problems(values) + _cross_problems(values))
    name, aggregation = values["objective.name"], values["objective.aggregation"]
    if name == "gspo" and aggregation != "seq-mean-token-mean":
        logging.warning(
            "objective.aggregation = %r: gspo divides the objective of a response by its length only "
            "under 'seq-mean-token-mean'; this one weights long responses more.",
            aggregation,
        )
    uncorrected = values["objective.correction"] == "none"
    if name == "minirl" and values["objective.behavior"] == "rescored" and uncorrected:
        logging.warning(
            "minirl with objective.behavior = 'rescored': its ratio no longer corrects the sampler's "
            "mismatch; 'sampler' does."
        )
    delta = _hyper(values).get("delta", 0)
    if delta >= 1 and not name.endswith("_kl"):
        logging.warning(
            "delta = %g: no token can reach this boundary, since |pi - mu| <= 1. "
            "Nothing will be corrected; the boundary in probability is below 1, for example 0.15.",
            delta,
        )


def _raise(problems: list[str]) -> None:
    if problems:
        raise BadInput("the config has errors:\n  " + "\n  ".join(problems))


def _field_problems(values: Mapping[str, Any]) -> list[str]:
    """Fields that are unknown, missing or of another type."""
    names = field_types()
    problems = [f"{f} is not a field: {suggest(f, names)}" for f in values if f not in names]
    if missing := [f for f in names if f not in values]:
        problems.append(f"missing (start from default_config()): {', '.join(missing)}")
    return problems + [
        f"{f} = {v!r}: must be {type_name(names[f])}"
        for f, v in values.items()
        if f in names and not _has_type(v, names[f], optional=f in HYPER)
    ]


def _range_problems(v: Mapping[str, Any]) -> list[str]:
    """Problems of one field at a time."""

    def outside(fields, holds, right):
        return [
            f"{f} = {v[f]!r}: must be {right}"
            for f in fields
            if v[f] is not None and not (math.isfinite(v[f]) and holds(v[f]))
        ]

    problems = []
    for field, choices in CHOICES.items():
        if v[field] not in choices:
            near = difflib.get_close_matches(v[field], choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            named = ", ".join(choice or "'' (none)" for choice in choices)
            problems.append(f"{field} = {v[field]!r}: must be one of {named}{hint}")
    problems += outside(POSITIVE, lambda x: x > 0, "positive")
    problems += outside(NOT_NEGATIVE, lambda x: x >= 0, "0 or more")
    problems += outside(SHARES, lambda x: 0 <= x <= 1, "between 0 and 1")
    fractions = ["sampler.top_p", "model.rotary_fraction"]
    problems += outside(fractions, lambda x: 0 < x <= 1, "above 0 and at most 1")
    problems += outside(["seed"], lambda x: x < 2**32, "below 2**32")
    problems += outside(["objective.dual_clip"], lambda x: x > 1, "above 1")
    problems += outside(["optimizer.b1", "optimizer.b2"], lambda x: 0 <= x < 1, "in [0, 1)")
    mesh = [f for f in v if f.startswith("mesh.")]
    problems += outside(mesh, lambda x: x >= 1 or x == -1, "positive, or -1 for the rest")
    if v["data.task"] in data.TASKS:
        try:
            _task(v)
        except ValueError as error:
            problems.append(f"data.{error}")
    if (
        v["data.instruction"] not in data.TEMPLATES
        and v["data.instruction"].count("{problem}") != 1
    ):
        names = ", ".join(data.TEMPLATES)
        problems.append(f"data.instruction: must be {names}, or have {{problem}} in it, once")
    return problems


def _cross_problems(v: Mapping[str, Any]) -> list[str]:
    """Problems between fields. A field that is out of its own range is reported elsewhere."""
    problems = []

    def require(holds, fields, right):
        if not holds:
            problems.append(", ".join(f"{f} = {v[f]!r}" for f in fields.split()) + f": {right}")

    def divides(small, large, factor=1):
        what = large if factor == 1 else f"{large} * {factor} = {v[large] * factor}"
        holds = v[small] <= 0 or v[large] * factor % v[small] == 0
        require(holds, f"{small} {large}", f"{small} must divide {what}")

    divides("model.kv_heads", "model.heads")
    divides("train.mini_batch_prompts", "train.prompts")
    divides("train.micro_batch", "train.mini_batch_prompts", factor=v["train.samples"])
    divides("sft.micro_batch", "sft.batch")
    rotated = v["model.head_dim"] * v["model.rotary_fraction"]
    both = "model.head_dim model.rotary_fraction"
    require(rotated % 2 == 0, both, "the channels that are rotated must be even in number (pairs)")
    divides("model.full_attention_every", "model.layers")
    linear = [f"model.linear_{f}" for f in ("key_heads", "value_heads", "key_dim", "value_dim")]
    fields = " ".join(["model.full_attention_every", *linear])
    if v["model.full_attention_every"] > 1:
        require(all(v[f] > 0 for f in linear), fields, "the layers between need their sizes")
        divides("model.linear_key_heads", "model.linear_value_heads")
        divides("mesh.tensor", "model.linear_key_heads")
    else:
        require(not any(v[f] for f in linear), fields, "without layers between, 0 in all")
    low = v["compute.dtype"] == "bfloat16" or v["compute.attention"] not in ("splash", "cudnn")
    kernel = "compute.attention compute.dtype"
    require(low, kernel, "this kernel multiplies in bfloat16; auto and chunked take any")
    shared = "model.shared_expert_size model.experts"
    require(v["model.experts"] or not v["model.shared_expert_size"], shared, "without experts, 0")

    experts, per_token = v["model.experts"], v["model.experts_per_token"]
    sizes = "model.experts model.experts_per_token model.expert_size"
    if experts:
        require(1 <= per_token <= experts, sizes, "a token visits 1 to all experts")
        require(v["model.expert_size"] > 0, sizes, "experts need a size")
        divides("mesh.expert", "model.experts")
    else:
        require(v["model.mlp_size"] > 0, "model.mlp_size model.experts", "without experts, above 0")
        require(not any(v[f] for f in sizes.split()), sizes, "without experts, 0 in all three")
        require(v["mesh.expert"] == 1, "mesh.expert model.experts", "without experts, an axis of 1")
        replay = "train.routing_replay model.experts"
        require(not v["train.routing_replay"], replay, "without experts there are no routes")
    axes = [f for f in v if f.startswith("mesh.")]
    require(sum(v[f] == -1 for f in axes) <= 1, " ".join(axes), "only one can take the rest (-1)")

    samples = "train.samples objective.advantage"
    needs_groups = v["objective.advantage"] in NEEDS_GROUPS
    require(v["train.samples"] >= 2 or not needs_groups, samples, "it compares 2 samples or more")
    name, threshold = v["objective.name"], v["objective.threshold"]
    if name in OBJECTIVES and threshold:
        field = _thresholded(name)
        require(
            field and threshold in THRESHOLDS[field],
            "objective.threshold objective.name",
            f"this objective takes {', '.join(THRESHOLDS[field])}" if field else "takes none",
        )
        both = f"objective.threshold objective.{field}"
        require(not field or v[f"objective.{field}"] is None, both, "give one of the two")
    kl = "objective.kl objective.kl_coefficient"
    require(
        (v["objective.kl"] != "none") == (v["objective.kl_coefficient"] > 0),
        kl,
        "give both, or neither",
    )
    rescored = v["objective.behavior"] == "rescored" or v["objective.correction"] == "none"
    correction = "objective.correction objective.behavior"
    require(rescored, correction, "a correction needs objective.behavior = 'rescored'")
    bounds = "objective.correction_floor objective.correction_cap"
    require(v[bounds.split()[0]] < v[bounds.split()[1]], bounds, "the floor lies below the cap")
    token_level = v["objective.correction"] != "none" and v["objective.correction_level"] == "token"
    level = "objective.correction_level objective.name"
    require(name != "gspo" or not token_level, level, "gspo takes sequence or geometric")
    recorded = "sampler.top_logprobs model.vocab_size"
    require(v["sampler.top_logprobs"] <= v["model.vocab_size"], recorded, "at most the vocabulary")
    fp8 = "precision.sampler_weights precision.recipe"
    codes = v["precision.sampler_weights"] == "codes"
    require(v["precision.recipe"] != "none" or not codes, fp8, "without a recipe, no codes to hold")

    if v["model.path"] or v["data.tokenizer"]:
        require(not v["sft.steps"], "sft.steps", "demonstrations are made of single characters; 0")
    else:
        tokens = data.CharTokenizer.vocab_size
        enough = v["model.vocab_size"] >= tokens
        require(enough, "model.vocab_size", f"must be at least the tokenizer's {tokens}")
        missing = "a chat template needs a model.path, or a data.tokenizer"
        require(not v["data.chat"], "data.chat", missing)
        words = v["data.task"] != "arithmetic"
        right = "problems in words need a model.path, or a data.tokenizer"
        require(not words or v["data.problems"], "data.task", right)
    given = v["data.task"] in data.TASKS or v["data.problems"]
    require(given, "data.task data.problems", "name a file of problems, or a data set")
    procedural = v["evaluate.sets"] and not v["data.problems"] and not v["reward.name"]
    judged = "evaluate.sets reward.name"
    require(
        not procedural, judged, "name the reward of problems that are not the task's, such as math"
    )
    passed = "data.rollouts data.filter"
    require(not v["data.rollouts"] or v["data.filter"] != "none", passed, "a filter: clean or dapo")
    within = "data.pass_low data.pass_high"
    require(v["data.pass_low"] <= v["data.pass_high"], within, "the first is at most the second")
    buffer = "reward.overlong_buffer sampler.max_response_length"
    fits = v["reward.overlong_buffer"] <= v["sampler.max_response_length"]
    require(fits, buffer, "the buffer lies within the response")
    opened = v["data.chat"] or (v["data.thinking"] == "default" and not v["data.system"])
    require(opened, "data.chat data.thinking data.system", "the last two belong to a chat")
    arithmetic = v["data.task"] == "arithmetic" and not v["data.tokenizer"] + v["model.path"]
    require(
        arithmetic or not v["sft.steps"], "sft.steps data.task", "demonstrations are arithmetic"
    )
    if arithmetic and (not v["data.problems"] or v["sft.steps"]):
        with contextlib.suppress(ValueError):  # a task that is no task
            task = _task(v)
            for field, longest, what in (
                ("sampler.max_prompt_length", data.max_prompt_length(task), "prompt"),
                ("sampler.max_response_length", data.max_response_length(task), "demonstration"),
            ):
                holds = v[field] >= longest or (what == "demonstration" and not v["sft.steps"])
                require(holds, f"{field} data.digits", f"the longest {what} has {longest} tokens")

    name = v["objective.name"]
    for field in HYPER if name in OBJECTIVES else ():
        hyper = field.removeprefix("objective.")
        takers = [o for o in OBJECTIVES if hyper in OBJECTIVES[o].hyper]
        right = f"{name} does not take {hyper}; taken by {', '.join(takers) or 'none'}"
        require(v[field] is None or name in takers, f"{field} objective.name", right)
    return problems


def resolve(config: Mapping[str, Any]) -> FrozenConfigDict:
    """Returns a validated, frozen copy in which the fields that follow from others are filled in:
    the architecture of model.path, reward.name, objective.horizon, sampler.top_logprobs."""
    values = flatten(config)
    _raise(_field_problems(values))
    if values["model.path"]:
        values |= _architecture(values)
    config = from_dict(values)
    validate(config)
    in_words = config.data.problems and (config.data.tokenizer or config.model.path)
    own = "math" if in_words else TASK_REWARDS[config.data.task]
    config.reward.name = config.reward.name or own
    if not config.objective.horizon:
        config.objective.horizon = config.sampler.max_response_length
    if not config.sampler.top_logprobs and "topk_logp" in OBJECTIVES[config.objective.name].arrays:
        config.sampler.top_logprobs = min(TOP_LOGPROBS, config.model.vocab_size)
    return FrozenConfigDict(config)


def _architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `model` as the directory model.path has them.

    Raises:
      BadInput: it cannot be read, or the config asks for another one (fields at their default ask
        for nothing).
    """
    path, default = values["model.path"], flatten(default_config())
    try:
        read = dataclasses.asdict(read_config(path))
    except (ValueError, OSError) as error:
        raise BadInput(f"model.path = {path!r}: {error}") from None
    found = {f"model.{name}": value for name, value in read.items()}
    differing = [
        f"{f}: {values[f]!r} -> {found[f]!r}"
        for f in found
        if values[f] not in (default[f], found[f])
    ]
    if differing:
        raise BadInput(
            f"model.path = {path!r} holds another architecture than the config asks for (the "
            "config's value -> its own):\n  " + "\n  ".join(differing)
        )
    return found


def _task(values: Mapping[str, Any]):
    """The procedural task that `data` describes. Raises ValueError that begins with the field."""
    settings = {f.removeprefix("data."): v for f, v in values.items() if f.startswith("data.")}
    return data.TASKS[settings["task"]](settings)


def objective_hyper(config: Mapping[str, Any]) -> dict[str, float | bool]:
    """Returns the hyperparameters set for the objective, as keywords of `token_objective`."""
    return _hyper(flatten(config))


def _hyper(values: Mapping[str, Any]) -> dict[str, float | bool]:
    hyper = {f.removeprefix("objective."): values[f] for f in HYPER if values[f] is not None}
    field, threshold = _thresholded(values["objective.name"]), values["objective.threshold"]
    return hyper | ({field: THRESHOLDS[field][threshold]} if threshold else {})


def _thresholded(name: str) -> str | None:
    """The hyperparameter of objective `name` that `objective.threshold` sets; None: it has none."""
    fields = [f for f in THRESHOLDS if f in OBJECTIVES[name].hyper and not name.endswith("_kl")]
    return fields[0] if fields else None


def boundary(config: Mapping[str, Any]) -> float:
    """The boundary of |pi - mu| at which the sampler's mismatch is judged: the objective's own where
    a token can reach it, else DPPO's."""
    name, default = config["objective"]["name"], THRESHOLDS["delta"]["boundary"]
    delta = resolve_hyper(name, objective_hyper(config)).get("delta", default)
    return delta if delta < 1 and not name.endswith("_kl") else default


def to_json(config: Mapping[str, Any]) -> str:
    """The config as indented JSON with sorted keys, null for an unset hyperparameter."""
    return json.dumps(ConfigDict(config).to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; fields that were not there then are at their defaults.

    Raises BadInput like `validate`, and for other text.
    """
    values = _parse_json(text, "the config")
    validate(values)
    return from_dict(values)


def run_config(workdir: Path) -> ConfigDict:
    """The resolved config of the run in `workdir`.

    Raises BadInput where it holds no run, or one with a config that this version does not take.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise BadInput(
            f"{workdir} holds no run (there is no config.json); give the --workdir of one"
        )
    try:
        return from_json(path.read_text())
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Binds `workdir` to `config` by writing `config.json` into it. True where it was bound before.

    Fields that steer watching rather than learning (and the mesh) may differ from the last time,
    and the file is then brought up to date. train.steps may where the learning rate is constant:
    the other schedules are stretched over it. model.path may where no KL penalty refers to it.

    Raises:
      BadInput: the directory holds a run with another config; lists the fields that differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise BadInput(f"{workdir} is a file: --workdir must be a directory or not exist yet")
    path, new = workdir / "config.json", flatten(config)
    claimed = path.exists()
    if claimed:
        # What was not a field then was as its default is now.
        old = flatten(default_config()) | _parse_json(path.read_text(), str(path))
        fixed = set() if new["optimizer.schedule"] == "constant" else {"train.steps"}
        if new["objective.kl"] != "none":
            fixed.add("model.path")  # the reference is read from there
        differing = [
            f"{f}: {old.get(f, 'not a field')!r} -> {new.get(f, 'not a field')!r}"
            for f in sorted({*old, *new})
            if old.get(f) != new.get(f) and (f in fixed or not MAY_CHANGE_ON_RESUME.fullmatch(f))
        ]
        if differing:
            stretched = any(d.startswith("train.steps") for d in differing)
            raise BadInput(
                f"{workdir} holds a run with another config (its value -> this run's value):\n  "
                + "\n  ".join(differing)
                + "\nTake another --workdir for a new run, or the old values to resume that one."
                + (
                    " (A learning rate that falls is stretched over train.steps; with "
                    "optimizer.schedule = 'constant' a run can be made longer.)"
                    if stretched
                    else ""
                )
            )
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(config))
    return claimed


def from_dict(flat: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `flatten`, for a complete and valid config."""
    config = default_config()
    for field, value in flat.items():
        section, _, leaf = field.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


def _parse_json(text: str, where: str) -> dict[str, Any]:
    """The flat fields of `to_json`, those that it lacks (an older version's) at their defaults."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{where} must be a JSON object, not {type(values).__name__}")
    return flatten(default_config()) | flatten(values)


def field_types() -> dict[str, type]:
    """The fields of a config by their dotted names, and their types."""
    config, types = default_config(), {}
    for field in flatten(config):
        section, _, leaf = field.rpartition(".")
        types[field] = (config[section] if section else config).get_type(leaf)
    return types


def _has_type(value: Any, expected: type, optional: bool) -> bool:
    if value is None:
        return optional
    return type(value) is expected or (expected is float and type(value) is int)


def type_name(kind: type) -> str:
    """A field's type in words."""
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


def suggest(field: str, names: Mapping[str, Any]) -> str:
    """What was probably meant by a field that is not among `names`."""
    section, _, leaf = field.rpartition(".")
    sections = sorted({n.partition(".")[0] for n in names if "." in n})
    if field in sections:
        section, leaf = field, ""
    near = difflib.get_close_matches(section, sections, 1)
    inside = [n for n in names if n.startswith(f"{near[0]}.")] if near else list(names)
    leaves = [n.rpartition(".")[2] for n in inside]
    close = difflib.get_close_matches(leaf, leaves, 1, 0.5)
    found = [n for n, other in zip(inside, leaves) if other in close]
    if found:
        return f"did you mean {' or '.join(found)}?"
    if near:
        return f"{near[0]} has {', '.join(leaves)}"
    return f"the sections are {', '.join(sections)}"
