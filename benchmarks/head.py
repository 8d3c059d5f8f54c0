"""Memory and time of the fused head, compared with a naive head and a checkpointed scan over chunks.

    python -m benchmarks.head [--output=FILE.json]

Three programs return the same loss, logprobs, entropies and gradients for hidden states and weight:

    naive   all logits at once, log-softmax, autodiff
    scan    chunks of tokens in a `lax.scan` whose body is under `jax.checkpoint`, autodiff; computes
            the logits twice, four matmuls
    fused   `learner.head_loss`: three matmuls

Memory is the compiler's temporary size (`memory_analysis().temp_size_in_bytes`, GB = 1e9 bytes) for
8,192 tokens × width 2,048 × vocabulary 151,936 on one device: this backend's, and a TPU v5p's if libtpu
is installed (no TPU required). Arguments and results are not included. Each program is compiled for both
gradients, and for the gradient of the hidden states alone ("without d_weight"): on the CPU the
temporaries include a float32 product [width, vocab] per chunk, which the TPU adds to the result in
place.

The programs are timed in turn, one whole call each, and the ratio is the median over rounds. Wall time
is unreliable on a shared machine, so the table shows CPU time as well. On the CPU there are 1,024 tokens
in float32 (bfloat16 is emulated there), at full width and vocabulary; on other devices 8,192 tokens in
bfloat16.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks.common import OUTPUT, machine, tpu, write_results
from drpo_jax.learner import head_loss, policy
from drpo_jax.objectives import policy_objective
from drpo_jax.precision import dot_precision

TOKENS, WIDTH, VOCAB, CHUNK = 8192, 2048, 151_936, 512
ROUNDS = 4  # An additional first round warms up and does not count.


def fused(chunk):
    def loss(hidden, weight, targets, token_weight, inputs):
        value, trace = head_loss(
            hidden, weight, targets, token_weight, inputs, objective=policy("drpo"), chunk=chunk
        )
        return value, (trace.logp, trace.entropy)

    return loss


def naive(hidden, weight, targets, token_weight, inputs):
    logits = jnp.dot(
        hidden, weight.astype(hidden.dtype),
        precision=dot_precision(hidden.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    every = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(every, targets[:, None], axis=1)[:, 0]
    loss = -jnp.sum(token_weight * policy_objective("drpo", logp, **inputs))
    every = jax.lax.stop_gradient(every)
    return loss, (logp, -jnp.sum(jnp.exp(every) * every, axis=1))


def scan(chunk):
    def loss(hidden, weight, *arrays):
        @jax.checkpoint
        def body(total, piece):
            value, trace = naive(piece[0], weight, *piece[1:])
            return total + value, trace

        pieces = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), (hidden, *arrays))
        total, trace = jax.lax.scan(body, jnp.zeros(()), pieces)
        return total, jax.tree.map(jnp.ravel, trace)

    return loss


def compiled(loss, dtype, tokens, device, argnums=(0, 1)):
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    floats = array((tokens,))
    inputs = {"behavior_logp": floats, "advantage": floats}
    gradients = jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))
    return gradients.lower(
        array((tokens, WIDTH), dtype),
        array((WIDTH, VOCAB)),
        array((tokens,), jnp.int32),
        floats,
        inputs,
    ).compile()


def memory(device, dtype):
    """Prints and returns {program: {"GB": with both gradients, "GB without d_weight": …}}."""
    heads = {"naive": naive, "scan": scan(CHUNK), "fused": fused(CHUNK)}
    heads[f"fused, chunk {2 * CHUNK}"] = fused(2 * CHUNK)
    figures = {}
    print(f"\n{device.device_kind}, {dtype.__name__}, chunk {CHUNK}: temporaries, GB")
    print(f"{'':<18}{'naive/this':>12}{'without d_weight':>18}{'GB':>8}{'without d_weight':>18}")
    for name, loss in heads.items():
        figures[name] = [
            compiled(loss, dtype, TOKENS, device, n).memory_analysis().temp_size_in_bytes / 1e9
            for n in ((0, 1), 0)
        ]
        full, rest = (a / b for a, b in zip(figures["naive"], figures[name]))
        print(
            f"{name:<18}{full:>12.1f}{rest:>18.1f}{figures[name][0]:>8.2f}{figures[name][1]:>18.2f}"
        )
    columns = ("GB", "GB without d_weight")
    return {name: dict(zip(columns, (round(x, 3) for x in row))) for name, row in figures.items()}


def seconds(device, tokens, dtype):
    """Prints and returns {program: median seconds, CPU seconds, and the ratios of fused to them}."""
    rng = np.random.default_rng(0)
    arrays = (
        jnp.asarray(rng.normal(size=(tokens, WIDTH)), dtype),
        jnp.asarray(rng.normal(size=(WIDTH, VOCAB)) / WIDTH**0.5, jnp.float32),
        jnp.asarray(rng.integers(VOCAB, size=tokens), jnp.int32),
        jnp.full(tokens, 1 / tokens),
        {
            "behavior_logp": jnp.full(tokens, -np.log(VOCAB)),
            "advantage": jnp.asarray(rng.normal(size=tokens), jnp.float32),
        },
    )
    arrays = jax.device_put(arrays, device)
    heads = {"naive": naive, "scan": scan(CHUNK), "fused": fused(CHUNK)}
    heads = {name: compiled(loss, dtype, tokens, device) for name, loss in heads.items()}
    measured = {name: [] for name in heads}
    for _ in range(ROUNDS + 1):
        for name, run in heads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*arrays))
            measured[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    measured = {name: np.array(times[1:]) for name, times in measured.items()}
    print(f"\n{device.device_kind}, {dtype.__name__}, {tokens} tokens, chunk {CHUNK}: time")
    print(f"{'':<18}{'fused/this':>12}{'in CPU time':>13}{'s':>8}{'CPU s':>8}")
    figures = {}
    for name, times in measured.items():
        ratio, s = np.median(measured["fused"] / times, axis=0), np.median(times, axis=0)
        print(f"{name:<18}{ratio[0]:>12.2f}{ratio[1]:>13.2f}{s[0]:>8.1f}{s[1]:>8.1f}")
        keys = ("fused/this", "fused/this, CPU time", "seconds", "CPU seconds")
        figures[name] = dict(zip(keys, (round(float(x), 3) for x in (*ratio, *s))))
    return figures


def main(_):
    # A program from the cache has no memory analysis.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    print(machine())
    print(f"{TOKENS} tokens x width {WIDTH} x vocabulary {VOCAB}")
    on_cpu = device.platform == "cpu"
    figures = {"memory": {}}
    devices = [(device, jnp.float32), (device, jnp.bfloat16)]
    if on_cpu and (chip := tpu()):
        devices.append((chip, jnp.bfloat16))
    for where, dtype in devices:
        key = f"{where.device_kind}, {dtype.__name__}"
        figures["memory"][key] = memory(where, dtype)
    tokens, dtype = (1024, jnp.float32) if on_cpu else (TOKENS, jnp.bfloat16)
    figures["time"] = seconds(device, tokens, dtype)
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.head", figures)


if __name__ == "__main__":
    app.run(main)
