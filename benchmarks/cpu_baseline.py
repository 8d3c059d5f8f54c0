"""Throughput of sampling, update and RL step of a small dense model, relative to its matmuls alone.

    python -m benchmarks.cpu_baseline [--output=FILE.json]

The model has 4 layers of width 256, MLP width 768, 8 query heads and 4 key heads of 32 channels, and a
vocabulary of 128 (3.2M parameters, float32). A batch has 128 sequences of 16 prompt tokens and 64
response tokens. The programs are those that `train` runs. The floor is a jitted loop of the model's
matmuls alone, with the same shapes and in the same order. Programs and floor are timed in turn on the
same machine, whose load is printed: compare ratios, not seconds.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks.common import OUTPUT, machine, write_results
from drpo_jax.config import default_config, resolve
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs

SEQUENCES, PROMPT, RESPONSE = 128, 16, 64


def baseline_config():
    """Returns the config: the model above, one update per rollout, micro-batches of 8 sequences."""
    config = default_config()
    config.model.update(
        vocab_size=128, hidden_size=256, layers=4, heads=8, kv_heads=4, head_dim=32, mlp_size=768
    )
    config.sampler.update(
        max_prompt_length=PROMPT, max_response_length=RESPONSE, slots=SEQUENCES, decode_steps=16
    )
    config.train.update(prompts=16, samples=8, mini_batch_prompts=16, micro_batch=8)
    config.compute.unroll = 4
    config.optimizer.learning_rate = 1e-5
    return resolve(config)


def matmul_shapes(model):
    """Returns (k, n) of every weight matmul of a forward pass."""
    shapes = [tuple(x.shape[-2:]) for x in jax.tree.leaves(model.blocks) if x.ndim == 3]
    layers = model.config.layers
    return [shape for shape in shapes for _ in range(layers)] + [model.head_weight().shape]


def floors(model, micro_batch):
    """Returns {program: a function that computes its matmuls alone, in the model's order}."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention, mlp = model.blocks.attention, model.blocks.mlp
    stacked = [getattr(attention, n)[...] for n in names]
    stacked += [w[...] for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    weights = (
        [[w[i] for w in stacked] for i in range(model.config.layers)],
        model.head_weight() * 1,
    )

    def chain(weights, x):
        layers, head = weights
        for q, k, v, o, gate, up, down in layers:
            kv = x @ k + x @ v
            y = (x @ q + jnp.concatenate([kv, kv], axis=-1)) @ o
            x = (y @ gate + y @ up) @ down
        return x @ head

    @jax.jit
    def sample(weights, x):
        return jax.lax.fori_loop(0, RESPONSE, lambda _, x: x + 1e-9 * chain(weights, x)[:, :1], x)

    @jax.jit
    def learn(weights, x):
        def step(dw, x):
            new = jax.grad(lambda w: jnp.sum(chain(w, x) ** 2))(weights)
            return jax.tree.map(jnp.add, dw, new), None

        return jax.lax.scan(step, weights, x)[0]

    width = model.config.hidden_size
    tokens = micro_batch * (PROMPT + RESPONSE)
    rows, long = jnp.ones((SEQUENCES, width)), jnp.ones((SEQUENCES // micro_batch, tokens, width))
    return {"sample": lambda: sample(weights, rows), "update": lambda: learn(weights, long)}


def main(_):
    config = baseline_config()
    mesh = make_mesh(devices=jax.devices()[:1])
    programs = Programs(config, mesh, stop=())
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 128, size=(16, PROMPT)).tolist()
    with jax.set_mesh(mesh):
        state = [programs.restart(programs.init(jax.random.key(0)).model)]
        run_floor = floors(state[0].model, config.train.micro_batch)
        sampler = programs.sampler
        advantage = rng.standard_normal(SEQUENCES).astype(np.float32)

        def sample():
            sampler.load(programs.sync(state[0].model))
            return sampler.generate(prompts, programs.sampling_params, jax.random.key(1))

        def update(rollouts):
            inputs = {"behavior_logp": rollouts.full_logp, "advantage": advantage}
            batch, _ = programs.rollout_batch(rollouts, slice(None), inputs)
            state[0], report = programs.policy_update(state[0], batch)
            return report.metrics

        started = time.perf_counter()
        rollouts = sample()
        jax.block_until_ready(update(rollouts))
        compile_seconds = time.perf_counter() - started
        work = {
            "sample": sample,
            "update": lambda: update(rollouts),
            "step": lambda: update(sample()),
            "sample floor": run_floor["sample"],
            "update floor": run_floor["update"],
        }
        seconds = {name: [] for name in work}
        for _ in range(8):  # In turn, so that a busy moment affects all of them.
            for name, run in work.items():
                started = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - started)
    best = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    completion, tokens = SEQUENCES * RESPONSE, SEQUENCES * (PROMPT + RESPONSE)
    rate = {
        "sample": completion / best["sample"],
        "sample floor": completion / best["sample floor"],
        "update": tokens / best["update"],
        "update floor": tokens / best["update floor"],
        "step": completion / best["step"],
    }
    parameters = sum(x.size for x in jax.tree.leaves(state[0].model))
    flops = 2 * sum(k * n for k, n in matmul_shapes(state[0].model))
    print(
        f"{parameters / 1e6:.1f}M parameters; first calls, with compilation: {compile_seconds:.1f} s"
    )
    print(f"{'':<10}{'tokens/s':>10}{'floor':>10}{'of floor':>10}{'floor GFLOP/s':>15}")
    for name, factor in (("sample", 1), ("update", 3)):
        floor = rate[f"{name} floor"]
        print(
            f"{name:<10}{rate[name]:>10,.0f}{floor:>10,.0f}{rate[name] / floor:>10.0%}"
            f"{factor * flops * floor / 1e9:>15.0f}"
        )
    print(f"{'RL step':<10}{rate['step']:>10,.0f}  completion tokens/s, including the weight sync")
    figures = {f"{name} tokens/s": round(value) for name, value in rate.items()}
    figures |= {
        "sample of floor": round(rate["sample"] / rate["sample floor"], 3),
        "update of floor": round(rate["update"] / rate["update floor"], 3),
        "compile seconds": round(compile_seconds, 1),
    }
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.cpu_baseline", figures)


if __name__ == "__main__":
    app.run(main)
