"""Checks that all meshes compute the same: every way to split eight devices over the five mesh axes.

    python -m benchmarks.meshes [--family=dense --family=moe --family=hybrid] [--output=FILE.json]

For each family of models and each mesh that its sizes allow, the programs of a run compute three
supervised updates and greedy samples on eight virtual CPU devices and on one. Prints the largest
relative differences of the losses and gradient norms, and the largest differences of the updated
parameters and of the sampled logprobs. Exits with 1 if one exceeds float32 rounding or if a token
differs. The tests run the meshes in `NAMED` only.
"""

import math
import sys
from itertools import product
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks.common import OUTPUT, write_results
from drpo_jax.config import default_config, resolve
from drpo_jax.models import Transformer
from drpo_jax.parallel import MESH_AXES, make_mesh
from drpo_jax.programs import Programs
from drpo_jax.sampler import Rollouts, SamplingParams

FAMILY = flags.DEFINE_multi_string(
    "family", ["dense", "moe", "hybrid"], "Family of models; may be repeated."
)
DEVICES, ROWS, PROMPT, RESPONSE, SEED = 8, 16, 10, 6, 7
GREEDY = SamplingParams(max_tokens=RESPONSE, temperature=0.0)
MOE = {"model.experts": 8, "model.experts_per_token": 2, "model.expert_size": 16}
FAMILIES = {
    "dense": {"model.mlp_size": 48},
    "moe": MOE,
    # Qwen3.5: alternating gated DeltaNet and gated attention, a shared expert, partial rotary embedding.
    "hybrid": MOE
    | {
        "model.full_attention_every": 2,
        "model.attention_gate": True,
        "model.rotary_fraction": 0.5,
        "model.norm_offset": 1.0,
        "model.shared_expert_size": 16,
        "model.linear_key_heads": 4,
        "model.linear_value_heads": 4,
        "model.linear_key_dim": 8,
        "model.linear_value_dim": 8,
        "sft.learning_rate": 3e-3,
    },
}
NAMED = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "expert": dict(data=1, expert=8),
    "tensor": dict(data=2, tensor=4),
    "fsdp and tensor": dict(data=1, fsdp=4, tensor=2),
    "all but data": dict(data=1, fsdp=2, expert=2, tensor=2),
    "sequence and expert": dict(data=1, sequence=4, expert=2),
    "sequence, fsdp and tensor": dict(data=1, fsdp=2, sequence=2, tensor=2),
}


def small_config(fields):
    """Returns a config with the smallest model that all axes divide, and few, short sequences."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.vocab_size": 64,
            "model.hidden_size": 32,
            "model.layers": 2,
            "model.heads": 8,
            "model.kv_heads": 4,
            "model.head_dim": 8,
            "model.mlp_size": 0,
            "model.rope_theta": 1e4,
            "optimizer.eps": 1e-3,  # Keeps Adam from amplifying float32 errors.
            "optimizer.learning_rate": 1e-2,
            "data.digits": 2,
            "sampler.max_prompt_length": PROMPT,
            "sampler.max_response_length": RESPONSE,
            "sampler.slots": 16,
            "evaluate.samples": 1,
            "sampler.decode_steps": PROMPT + RESPONSE,  # One ring size, so one compilation.
            "train.prompts": 8,
            "train.samples": 2,
            "train.mini_batch_prompts": 8,
            "train.micro_batch": 8,
            "sft.batch": ROWS,
            "sft.micro_batch": 8,
            "sft.learning_rate": 1e-2,
            "sft.warmup_steps": 0,
            **fields,
        }
    )
    return resolve(config)


def new_programs(fields, **sizes):
    """Returns the programs on eight devices, or on one device without `sizes`."""
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    return Programs(small_config(fields), mesh, stop=(1,))


def new_batch(programs):
    """Returns one packed batch of random sequences, the same on every mesh."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(64, size=(ROWS, PROMPT + RESPONSE)).astype(np.int32)
    prompts = rng.integers(1, PROMPT + 1, size=ROWS).astype(np.int32)
    responses = rng.integers(0, RESPONSE + 1, size=ROWS).astype(np.int32)
    inputs = {"behavior_logp": rng.normal(-4, 0.5, size=(ROWS, RESPONSE)).astype(np.float32)}
    inputs["advantage"] = rng.normal(size=ROWS).astype(np.float32)
    return programs.batch(tokens, prompts, responses, inputs, pack=True)[0]


class Numbers(NamedTuple):
    """Results on one mesh: metrics of three updates, the model before and after, greedy samples."""

    metrics: list
    start: Transformer
    end: Transformer
    rollouts: Rollouts


def greedy_samples(programs, model):
    """Returns the Rollouts of eight prompts."""
    programs.exact_sampler.load(programs.sync_exact(model))
    prompts = [[2 + i] * (1 + i) for i in range(8)]
    return programs.exact_sampler.generate(prompts, GREEDY, jax.random.key(SEED))


def numbers(fields, policy=False, **sizes):
    """Returns the `Numbers` of a family's fields on a mesh, from supervised or policy updates."""
    programs = new_programs(fields, **sizes)
    with jax.set_mesh(programs.mesh):
        state = programs.init(jax.random.key(SEED))
        start = jax.device_get(state.model)
        rollouts = greedy_samples(programs, state.model)
        batch, metrics = new_batch(programs), []
        step, like = programs.supervised_update, programs.abstract_sft_state
        if policy:
            state, step = programs.restart(state.model), programs.policy_update
            like = programs.abstract_state
        for _ in range(3):
            state, report = step(state, batch)
            metrics.append(jax.device_get(report.metrics))
        assert step._cache_size() == 1  # The state keeps its shapes and shardings.
        placed = jax.tree.map(
            lambda a, b: (
                (a.shape, a.dtype) == (b.shape, b.dtype)
                and a.sharding.is_equivalent_to(b.sharding, a.ndim)
            ),
            state,
            like,
        )
        assert all(jax.tree.leaves(placed))
        return Numbers(metrics, start, jax.device_get(state.model), rollouts)


def bounds(family):
    """Returns the largest differences that the order of float32 sums explains.

    Losses and the gradient norm (the DeltaNet's is the most sensitive) are relative; parameters and
    logprobs are absolute.
    """
    gradient = 1e-4 if family == "hybrid" else 1e-5
    return {"losses": 1e-5, "gradient": gradient, "parameters": 1e-5, "logprobs": 2e-5}


def differences(ours, expected):
    """Returns the largest differences, named as in `bounds`, and the number of "tokens" that differ."""

    def largest(a, b):  # np.max propagates NaN; max may lose it.
        return float(np.max([np.max(abs(x - y)) for x, y in zip(*map(jax.tree.leaves, (a, b)))]))

    def relative(names):
        pairs = [(a[n], b[n]) for a, b in zip(ours.metrics, expected.metrics) for n in names]
        return float(np.max([abs(a - b) / max(abs(b), 1e-30) for a, b in pairs]))

    return {
        "losses": relative(expected.metrics[0].keys() - {"grad_norm", "update_norm"}),
        "gradient": relative(["grad_norm", "update_norm"]),
        "parameters": largest((ours.start, ours.end), (expected.start, expected.end)),
        "logprobs": largest(ours.rollouts.sampled_logp, expected.rollouts.sampled_logp),
        "tokens": int(np.sum(ours.rollouts.tokens != expected.rollouts.tokens)),
    }


def factorisations(devices):
    """Returns all mesh sizes, by axis, whose product is `devices`."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    sizes = product(divisors, repeat=len(MESH_AXES))
    return [dict(zip(MESH_AXES, s)) for s in sizes if math.prod(s) == devices]


def main(_):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)
    results, wrong = {}, 0
    for family in FAMILY.value:
        expected = numbers(FAMILIES[family])
        for sizes in factorisations(DEVICES):
            name = " × ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)
            try:
                new_programs(FAMILIES[family], **sizes)
            except ValueError as error:
                print(f"{family:<7}{name:<34} not possible: {error}", flush=True)
                results[f"{family}: {name}"] = "not possible"
                continue
            figures = differences(numbers(FAMILIES[family], **sizes), expected)
            good = figures["tokens"] == 0
            good &= all(figures[n] <= most for n, most in bounds(family).items())
            wrong += not good
            line = "  ".join(f"{n} {x:.1e}" for n, x in figures.items() if n != "tokens")
            print(f"{family:<7}{name:<34}{line}  {'same' if good else 'DIFFERENT'}", flush=True)
            results[f"{family}: {name}"] = {n: float(f"{x:.2g}") for n, x in figures.items()}
            jax.clear_caches()
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.meshes", results)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(app.run(main))
