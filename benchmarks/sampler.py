"""Throughput of the sampler relative to its matmuls, and the gain from continuous batching.

    python -m benchmarks.sampler [--output=FILE.json]

Floor: the baseline model of benchmarks.cpu_baseline samples 128 sequences of 16 prompt tokens and 64
response tokens in 128 slots. It alternates with two jitted loops: the model's matmuls alone, and one
read of the keys and values alone (rings of 56 columns, the mean).
Recording: the same without logprobs and entropy, with the token alone.
Long tail: four times as many responses as slots, 95 % of them 16 tokens long and 5 % 256. Static batches
come from the same sampler, called with one batch of its slots at a time.
Partial rollouts: responses with lognormal lengths, 32 tokens at the median and 256 at most. Without a
budget, a step samples as many whole responses as there are slots. With a budget, it samples at most 32
tokens of each response, continues the unfinished responses of the previous step, and begins new groups
in the free slots.
Bandwidth (on GPU): decode steps of a 1.7B-shaped and a 4B-shaped model in bfloat16, relative to the time
in which the memory delivers weights and caches once.
"""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks.common import OUTPUT, machine, write_results
from benchmarks.cpu_baseline import PROMPT, RESPONSE, SEQUENCES, baseline_config, floors
from drpo_jax.models import Compute, ModelConfig, Transformer
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs
from drpo_jax.sampler import Sampler, SamplingParams, slots
from drpo_jax.sampler.token import Sampled, draw

# Memory bandwidth in bytes/s, from the vendor's data sheets (SXM).
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
QWEN3 = dict(heads=16, kv_heads=8, head_dim=128, vocab_size=151936, tie_embeddings=True)
SHAPES = {
    "1.7B": ModelConfig(**QWEN3, layers=28, hidden_size=2048, mlp_size=6144),
    "4B": ModelConfig(**QWEN3 | {"heads": 32}, layers=36, hidden_size=2560, mlp_size=9728),
}


def token_alone(logits, uniform, params):
    """`sample_token` without its records."""
    zeros = jnp.zeros(len(logits))
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    token = draw(mass, uniform)
    none = jnp.zeros((len(logits), 0))
    return Sampled(token, zeros, zeros, zeros, none.astype(jnp.int32), none)


def in_turn(work, rounds=8):
    """Returns {name: median seconds} of functions that run in turn, so that noise affects all."""
    seconds = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def reading(config, columns=56):
    """Returns a function that reads the caches of `RESPONSE` steps."""
    shape = SEQUENCES, config.kv_heads, columns, config.head_dim
    caches = [jnp.full(shape, float(i)) for i in range(2 * config.layers)]

    @jax.jit
    def read(caches):
        def step(_, total):  # Depends on the carry: no read moves out of the loop.
            return sum(jnp.sum(cache + 1e-9 * total, axis=2, keepdims=True) for cache in caches)

        return jax.lax.fori_loop(0, RESPONSE, step, jnp.zeros((*shape[:2], 1, shape[-1])))

    return lambda: read(caches)


def against_the_floor(model, matmuls, compute):
    """Returns figures, and lines to print, of the rate, the floors and the cost of recording."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 128, size=(16, PROMPT)).tolist()
    params = SamplingParams(max_tokens=RESPONSE, samples=SEQUENCES // len(prompts))
    new = partial(Sampler, model, SEQUENCES, 16, PROMPT, compute=compute)
    sampler, bare, real = new(), new(), slots.sample_token

    def run_bare():
        slots.sample_token = token_alone
        try:
            return bare.generate(prompts, params, jax.random.key(1)).tokens
        finally:
            slots.sample_token = real

    times = in_turn(
        {
            "sampler": lambda: sampler.generate(prompts, params, jax.random.key(1)).tokens,
            "token alone": run_bare,
            "matmuls": matmuls,
            "caches": reading(model.config),
        }
    )
    times["floor"] = times["matmuls"] + times["caches"]
    rate = {name: SEQUENCES * RESPONSE / seconds for name, seconds in times.items()}
    cost = 1 - rate["sampler"] / rate["token alone"]
    share, of_matmuls = (rate["sampler"] / rate[name] for name in ("floor", "matmuls"))
    lines = [
        f"{rate['sampler']:,.0f} tokens/s, {share:.0%} of the floor ({rate['floor']:,.0f}); "
        f"{of_matmuls:.0%} of the matmuls alone ({rate['matmuls']:,.0f})",
        f"recording logprobs and entropy costs {cost:.1%} (without: {rate['token alone']:,.0f})",
    ]
    figures = {
        "tokens/s": round(rate["sampler"]),
        "floor tokens/s": round(rate["floor"]),
        "of floor": round(share, 3),
        "of the matmuls alone": round(of_matmuls, 3),
        "cost of recording": round(cost, 4),
    }
    return figures, lines


def long_tail(model, compute, count=4):
    """Returns figures, and lines to print, of continuous batching against static batches."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 128, size=(count * 16, PROMPT)).tolist()
    limits = np.where(rng.random((len(prompts), SEQUENCES // 16)) < 0.05, 256, 16)
    params = SamplingParams(max_tokens=256, samples=SEQUENCES // 16)
    sampler = Sampler(model, SEQUENCES, 16, PROMPT, compute=compute)
    key = jax.random.key(2)

    def static():
        for i in range(0, len(prompts), 16):
            sampler.generate(prompts[i : i + 16], params, key, limits[i : i + 16])
        return ()

    def continuous():
        sampler.generate(prompts, params, key, limits)
        return ()

    continuous()
    sampler.read_statistics()
    continuous()
    statistics = sampler.read_statistics()
    static()
    static_steps = sampler.read_statistics()["steps"]
    times = in_turn({"continuous": continuous, "static": static}, rounds=3)
    live = statistics["busy_live_rows"] / statistics["busy_steps"] / SEQUENCES
    rate = {name: limits.sum() / seconds for name, seconds in times.items()}
    gain = rate["continuous"] / rate["static"]
    lines = [
        f"long tail: {rate['continuous']:,.0f} tokens/s, {rate['static']:,.0f} in static batches: "
        f"{gain:.1f} times as fast",
        f"  {live:.0%} of the rows live until the queue is empty; {statistics['steps']} decode steps "
        f"in {statistics['rounds']} rounds, {static_steps} steps in static batches",
    ]
    figures = {
        "long tail tokens/s": round(rate["continuous"]),
        "static tokens/s": round(rate["static"]),
        "speed-up": round(gain, 2),
        "live rows until the queue is empty": round(live, 3),
        "compilations": sampler.compilations(),
    }
    return figures, lines


def partial_rollouts(model, compute, steps=8, budget=32):
    """Returns figures and printed lines for steps that leave long responses to the next step."""
    rng, samples = np.random.default_rng(0), SEQUENCES // 16
    prompts = rng.integers(1, 128, size=(steps * 16, PROMPT)).tolist()
    lengths = np.exp(rng.normal(np.log(32), 1, size=(len(prompts), samples)))
    lengths = np.clip(lengths, 1, 256).astype(int)
    params, key = SamplingParams(max_tokens=256, samples=samples), jax.random.key(2)
    sampler = Sampler(model, SEQUENCES, 16, PROMPT, prefill_chunk=64, compute=compute)
    calls = {"whole": 0, "budget": 0}

    def whole():
        for i in range(0, len(prompts), 16):
            sampler.generate(prompts[i : i + 16], params, key, lengths[i : i + 16])
        calls["whole"] = steps
        return ()

    def with_a_budget():
        begun, drawn, calls["budget"] = {}, 0, 0
        while begun or drawn < len(prompts):
            rows = sum(np.sum(begun[i].response_lengths < lengths[i]) for i in begun)
            new = min((SEQUENCES - rows) // samples, len(prompts) - drawn)
            groups = [*begun, *range(drawn, drawn + new)]
            drawn += new
            sampled = [begun[i].response_lengths if i in begun else 0 * lengths[i] for i in groups]
            limits = np.minimum(lengths[groups], np.array(sampled) + budget)
            earlier = {k: begun[i] for k, i in enumerate(groups) if i in begun}
            now = [prompts[i] for i in groups]
            stream = sampler.stream(now, params, key, groups, limits, earlier)
            ended = {groups[k]: rollouts for k, rollouts in stream}
            begun = {i: r for i, r in ended.items() if np.any(r.response_lengths < lengths[i])}
            calls["budget"] += 1
        return ()

    counted = {}
    for name, run in (("whole", whole), ("budget", with_a_budget)):
        sampler.read_statistics()
        run()
        counted[name] = sampler.read_statistics()
    times = in_turn({"whole": whole, "budget": with_a_budget}, rounds=2)
    gain = times["whole"] / times["budget"]
    decode = {name: counts["steps"] for name, counts in counted.items()}
    again = counted["budget"]["prompt_tokens"] - counted["whole"]["prompt_tokens"]
    lines = [
        f"partial rollouts: {lengths.sum():,} tokens in {calls['whole']} steps with {decode['whole']} "
        f"decode steps, {times['whole']:.1f} s",
        f"  with a budget of {budget} tokens: {calls['budget']} steps with {decode['budget']} decode "
        f"steps, {times['budget']:.1f} s: {gain:.2f} times as fast; {again:,} tokens prefilled again",
    ]
    figures = {
        "decode steps, whole responses": decode["whole"],
        "decode steps, partial rollouts": decode["budget"],
        "tokens prefilled again": again,
        "speed-up of partial rollouts": round(gain, 2),
    }
    return figures, lines


def bandwidth(peak, context=1024, steps=64):
    """Returns figures, and lines to print, of decoding relative to the bandwidth bound."""
    figures, lines = {}, [f"{'':<6}{'batch':>6}{'tokens/s':>11}{'of the bandwidth bound':>25}"]
    compute = Compute(dtype="bfloat16")
    for name, config in SHAPES.items():
        model = jax.jit(
            lambda key, config=config: jax.tree.map(
                lambda x: x.astype(jnp.bfloat16), Transformer(config, key)
            )
        )(jax.random.key(0))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        for batch in (1, 32, 256):
            empty = partial(slots.empty_slots, compute=compute)
            state = jax.jit(empty, static_argnums=(1, 2))(model, batch, context)
            full = dict(lengths=state.lengths + context - steps - 1, limits=state.limits + 9999)
            state = dataclasses.replace(state, live=~state.live, **full)
            params = SamplingParams(max_tokens=9999)
            decode = partial(slots.decode, room=steps, params=params, compute=compute)
            run = jax.jit(decode, donate_argnums=1)
            key, state = jax.random.key(0), [state]

            def once(run=run, state=state, key=key, model=model):
                new, record = run(model, state[0], key, np.int32(steps), np.int32(0))
                lengths = new.lengths * 0 + context - steps - 1
                state[0] = dataclasses.replace(new, lengths=lengths)
                return record.sampled.token

            seconds = in_turn({"decode": once}, rounds=5)["decode"] / steps
            caches = sum(leaf.nbytes for leaf in jax.tree.leaves(state[0].caches))
            share = (weights + caches) / peak / seconds
            lines.append(f"{name:<6}{batch:>6}{batch / seconds:>11,.0f}{share:>25.0%}")
            figures[f"{name} batch {batch}: tokens/s"] = round(batch / seconds)
            figures[f"{name} batch {batch}: of bandwidth"] = round(share, 3)
    return figures, lines


def main(_):
    config = baseline_config()
    mesh = make_mesh(devices=jax.devices()[:1])
    programs = Programs(config, mesh, stop=())
    with jax.set_mesh(mesh):
        learner = programs.init(jax.random.key(0)).model
        model, compute = programs.sync(learner), programs.sampler.compute
        parts = [
            partial(against_the_floor, model, floors(learner, 8)["sample"], compute),
            partial(long_tail, model, compute),
            partial(partial_rollouts, model, compute),
        ]
        kind = jax.devices()[0].device_kind
        peak = next((rate for name, rate in BANDWIDTH.items() if name in kind), None)
        if peak:
            parts.append(partial(bandwidth, peak))
        figures = {}
        for part in parts:
            some, lines = part()
            print("\n".join(lines), flush=True)
            figures |= some
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.sampler", figures)


if __name__ == "__main__":
    app.run(main)
