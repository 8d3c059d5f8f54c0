"""The fused head against the unfused one: log-softmax and autodiff in float64.

One compiled program per mesh serves every objective: `any_of` selects the objective of each token.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.learner import head_loss, likelihood, policy
from drpo_jax.learner.head import chunk_tokens, precomputed
from drpo_jax.objectives import OBJECTIVES, gradient_weight, policy_objective, table
from drpo_jax.parallel import BATCH_AXES, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

N, D, V, K, ROW = 48, 16, 40, 4, 12  # ROW: tokens per response, for gspo
TEMPERATURE, CHUNK, BETA = 0.8, 7, 0.3  # 7 divides neither 48 nor the tokens of one device
MESHES = {
    "1 device": {},
    "data": {"data": 8},
    "fsdp, expert, tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "tensor": {"tensor": 8},
    "fsdp, sequence": {"data": 1, "fsdp": 2, "sequence": 4},
}
# Every objective of the table, penalties, supervised learning, and precomputed terms. gspo stands for
# the objectives that need whole responses.
HEADS = {name: policy(name) for name in OBJECTIVES if not OBJECTIVES[name].needs_sequences} | {
    "drpo + k2": policy("drpo", kl="k2", kl_coefficient=BETA),
    "drpo + k3": policy("drpo", kl="k3", kl_coefficient=BETA),
    "drpo + behavior": policy("drpo", kl_behavior=BETA),
    "likelihood": likelihood,
    "gspo": precomputed,
}


def DRPO(logp, behavior_logp, advantage, **_):
    """NaN at Â = 0: no token of the example has it, but the padding of the last chunk might."""
    nan = jnp.where(advantage == 0, jnp.nan, 0.0)
    return [x + nan for x in policy("drpo")(logp, behavior_logp, advantage)]


def any_of(logp, which, **inputs):
    """(J, c, w) of the objective number `which` of HEADS, token by token."""
    terms = []
    for head in HEADS.values():
        if head is precomputed:
            names = ("J", "coefficient", "weight")
        else:
            names = ("behavior_logp", "advantage", *getattr(head, "arrays", ()))
        terms.append(head(logp, **{name: inputs[name] for name in names}))
    return [jnp.take_along_axis(jnp.stack(x), which[None], axis=0)[0] for x in zip(*terms)]


def number(name):
    return np.full(N, list(HEADS).index(name), np.int32)


def log_softmax(hidden, weight):
    return jax.nn.log_softmax(hidden @ weight / TEMPERATURE)


@functools.cache
def example(dtype=np.float32):
    """(hidden, weight, targets, token_weight, inputs) with π near µ; a fifth of the tokens is masked."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(N, D)).astype(np.float32).astype(dtype)
    weight = (rng.normal(size=(D, V)) / 2).astype(np.float32)
    targets = rng.integers(V, size=N).astype(np.int32)
    logp = np.asarray(log_softmax(*(a.astype(dtype).astype(np.float32) for a in (hidden, weight))))
    topk_ids = np.argsort(-logp, axis=-1)[:, :K].astype(np.int32)

    def near(x, scale=0.6):
        return np.minimum(x + scale * rng.normal(size=x.shape), -1e-3).astype(np.float32)

    sampled = logp[np.arange(N), targets]
    inputs = {
        "which": number("drpo"),
        "behavior_logp": near(sampled),
        "advantage": np.repeat(rng.normal(size=N // ROW), ROW).astype(np.float32),
        "old_logp": near(sampled, 0.3),
        "ref_logp": near(sampled),
        "topk_ids": topk_ids,
        "behavior_topk_logp": near(np.take_along_axis(logp, topk_ids, 1), 0.3),
        "J": np.zeros(N, np.float32),
        "coefficient": np.zeros(N, np.float32),
        "weight": np.zeros(N, np.float32),
    }
    token_weight = (rng.uniform(0.1, 1, size=N) * (rng.uniform(size=N) < 0.8)).astype(np.float32)
    return hidden, weight, targets, token_weight, inputs


@functools.cache
def program(mesh, objective, tied=False, chunk=CHUNK, entropy_bonus=0.0):
    """(hidden, weight, targets, token_weight, inputs) → (loss, trace, d_hidden, d_weight) of NumPy."""
    mesh = make_mesh(**MESHES[mesh]) if MESHES[mesh] else make_mesh(devices=jax.devices()[:1])
    batch, matrix = P(BATCH_AXES), P("tensor", "fsdp") if tied else P("fsdp", "tensor")

    def loss(hidden, weight, *arrays):
        return head_loss(
            hidden, weight.T if tied else weight, *arrays,
            objective=objective, temperature=TEMPERATURE, chunk=chunk, entropy_bonus=entropy_bonus,
        )  # fmt: skip

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def place(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    def call(hidden, weight, *arrays):
        weight = place(weight.T if tied else weight, matrix)
        hidden, arrays = jax.tree.map(lambda a: place(a, batch), (hidden, arrays))
        with jax.set_mesh(mesh):
            (loss, trace), grads = jax.tree.map(np.asarray, run(hidden, weight, *arrays))
        return loss, trace, grads[0], grads[1].T if tied else grads[1]

    return call


def unfused(hidden, weight, targets, token_weight, inputs):
    """Loss and gradients of every objective by autodiff, the last one drpo with an entropy bonus.

    Returns:
      (loss [objectives], d_hidden and d_weight with the same leading axis, (loss, logp, entropy,
      topk_logp)).
    """
    mask = np.ones((N // ROW, ROW), bool)

    def objective(name, logp, topk_logp):
        common = inputs["behavior_logp"], inputs["advantage"]
        if name == "gspo":
            rows = (x.reshape(mask.shape) for x in (logp, *common))
            return policy_objective("gspo", *rows, mask=mask).reshape(N)
        if name == "likelihood":
            return logp
        name, _, kl = name.partition(" + ")
        arrays = inputs | {"topk_logp": topk_logp}
        arrays = {array: arrays[array] for array in OBJECTIVES[name].arrays}
        J = policy_objective(name, logp, *common, **arrays)
        d = inputs["ref_logp"] - logp
        log_r = logp - inputs["behavior_logp"]
        ratio = jax.lax.stop_gradient(jnp.exp(log_r))
        penalty = {"": 0.0, "k2": ratio * d**2 / 2, "k3": ratio * (jnp.exp(d) - d - 1)}
        penalty["behavior"] = log_r**2
        return J - BETA * penalty[kl]

    def losses(hidden, weight):
        every = log_softmax(hidden, weight)
        logp = every[jnp.arange(N), targets]
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        topk_logp = jnp.take_along_axis(every, inputs["topk_ids"], axis=-1)
        J = {name: objective(name, logp, topk_logp) for name in HEADS}
        J["drpo + entropy"] = J["drpo"] + BETA * entropy
        loss = -jnp.stack(list(J.values())) @ token_weight
        return loss, (loss, logp, entropy, topk_logp)

    grads, (loss, *trace) = jax.jacrev(losses, argnums=(0, 1), has_aux=True)(hidden, weight)
    return loss, *grads, trace


unfused = jax.jit(unfused)


@functools.cache
def reference(dtype=np.float32):
    """({objective: (loss, d_hidden, d_weight)}, logp, entropy, topk_logp), computed in float64.

    For bfloat16 only the inputs are rounded to it.
    """
    hidden, weight, *arrays = example(dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float64),
            (hidden, weight.astype(dtype), *arrays),
        )
        loss, d_hidden, d_weight, trace = jax.tree.map(np.asarray, unfused(*wide))
    assert d_weight.dtype == np.float64
    return dict(zip([*HEADS, "drpo + entropy"], zip(loss, d_hidden, d_weight))), *trace


def arrays_of(name, run):
    """The example with objective `name` for all tokens. The terms of gspo come from a first pass."""
    *arrays, inputs = example()
    if name == "gspo":
        first = run(*arrays[:3], np.ones(N, np.float32), inputs | {"which": number("likelihood")})
        rows = first[1].logp, inputs["behavior_logp"], inputs["advantage"]
        mask = np.ones((N // ROW, ROW), bool)
        terms = policy("gspo")(*(x.reshape(-1, ROW) for x in rows), mask=mask)
        inputs = inputs | dict(zip(("J", "coefficient", "weight"), map(np.ravel, terms)))
    return *arrays, inputs | {"which": number(name)}


def weights(name):
    """w of every token, by the table in float64."""
    *_, inputs = example()
    _, logp, _, topk_logp = reference()
    if name == "likelihood":
        return np.ones(N)
    name = name.partition(" + ")[0]
    arrays = inputs | {"topk_logp": topk_logp, "mask": np.ones(N, bool)}
    rows = {key: a.reshape(-1, ROW, *a.shape[1:]) for key, a in arrays.items()}
    needed = {key: rows[key] for key in OBJECTIVES[name].arrays}
    with jax.enable_x64(True):
        common = logp.reshape(-1, ROW), rows["behavior_logp"], rows["advantage"]
        return np.ravel(gradient_weight(name, *common, **needed))


def error(ours, expected):
    """‖a − b‖/‖b‖"""
    norm = np.linalg.norm(expected)
    assert norm > 0.01
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / norm


def agree(ours, expected, tolerance=3e-6):
    """Asserts that two results are equal up to the order of sums."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_objective_equals_float64_autodiff(mesh):
    """loss, trace, d_hidden and d_weight on 1 and on 8 devices. Masked tokens have a trace of 0."""
    expected, logp, entropy, topk_logp = reference()
    run = program(mesh, any_of)
    counts = example()[3] != 0
    assert 0 < counts.sum() < N and counts.sum() % CHUNK
    for name in HEADS:
        loss, trace, d_hidden, d_weight = run(*arrays_of(name, run))
        for ours, reference_ in zip((loss, d_hidden, d_weight), expected[name]):
            assert error(ours, reference_) <= 5e-6, name
        assert error(trace.logp, logp * counts) <= 5e-6
        assert error(trace.entropy, entropy * counts) <= 5e-6
        assert error(trace.weight, weights(name) * counts) <= 5e-6, name
        assert error(trace.topk_logp, topk_logp * counts[:, None]) <= 5e-6
        for array in (*trace, d_hidden):
            assert not np.any(array[~counts])


@pytest.mark.parametrize("mesh", ["1 device", "tensor"])
def test_the_sum_of_squared_probabilities(mesh):
    """Σπ² in chunks, and with a sharded vocabulary, equals that of the dense softmax in float64."""
    mesh = make_mesh(**MESHES[mesh]) if MESHES[mesh] else make_mesh(devices=jax.devices()[:1])
    hidden, weight, targets, token_weight, _ = example()
    run = functools.partial(
        head_loss, inputs={}, objective=likelihood, temperature=TEMPERATURE, chunk=CHUNK
    )
    with jax.set_mesh(mesh):
        place = jax.jit(functools.partial(run, sum_squares=True))
        trace = place(hidden, weight, targets, token_weight)[1]
        plain = jax.eval_shape(run, hidden, weight, targets, token_weight)[1]
    logits = hidden.astype(np.float64) @ weight.astype(np.float64) / TEMPERATURE
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.where(token_weight != 0, (p**2).sum(-1), 0)[:, None]
    assert trace.sum_squares.shape == (N, 1) and plain.sum_squares.shape == (N, 0)
    np.testing.assert_allclose(trace.sum_squares, expected, rtol=2e-6)


@pytest.mark.parametrize("mesh", ["1 device", "fsdp, expert, tensor"])
@pytest.mark.parametrize(
    "name, options", [("drpo", {"tied": True}), ("drpo + entropy", {"entropy_bonus": BETA})]
)
def test_tied_weights_and_the_entropy_bonus(mesh, name, options):
    """The transposed embedding as the head, and the gradient of the entropy against autodiff."""
    loss, _, *grads = program(mesh, DRPO, **options)(*example())
    for ours, expected in zip((loss, *grads), reference()[0][name]):
        assert error(ours, expected) <= 5e-6
    drpo, entropy = (reference()[0][name] for name in ("drpo", "drpo + entropy"))
    assert all(error(a, b) > 0.01 for a, b in zip(drpo, entropy))


@pytest.mark.parametrize("mesh", ["1 device", "fsdp, expert, tensor"])
def test_bfloat16_hidden_states_have_float32_logits(mesh):
    """For rounded inputs, loss, logp and entropy keep float32 accuracy.

    The gradients contain the rounding to bfloat16 (relative 2⁻⁸ at most) of d(logits), an operand of the
    last two matmuls, and of d(hidden), an output: 2.4e-3 and 3.0e-3 here.
    """
    dtype = ml_dtypes.bfloat16
    expected, logp, entropy, _ = reference(dtype=dtype)
    hidden, weight, targets, token_weight, inputs = example(dtype)
    run = program(mesh, DRPO)
    loss, trace, d_hidden, d_weight = run(hidden, weight, targets, token_weight, inputs)
    counts = token_weight != 0
    assert error(loss, expected["drpo"][0]) <= 5e-6
    assert error(trace.logp, logp * counts) <= 5e-6
    assert error(trace.entropy, entropy * counts) <= 5e-6
    assert d_hidden.dtype == dtype and d_weight.dtype == np.float32
    for ours, reference_ in zip((d_hidden, d_weight), expected["drpo"][1:]):
        assert 1e-4 < error(ours, reference_) < 4e-3

    h, W = (a.astype(dtype).astype(np.float64) for a in (hidden, weight))
    p = np.asarray(jax.nn.softmax((h @ W) / TEMPERATURE), np.float64)
    d_logits = -token_weight * trace.coefficient / TEMPERATURE * (np.eye(V)[targets] - p).T
    d_logits = d_logits.T.astype(np.float32).astype(dtype).astype(np.float64)
    assert error(d_weight, h.T @ d_logits) <= 2e-4  # not 5e-6: a few values round the other way
    assert error(d_hidden, (d_logits @ W.T).astype(dtype).astype(np.float64)) <= 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", ["1 device", "fsdp, expert, tensor"])
def test_tokens_of_weight_zero_do_not_poison(mesh, bad):
    """NaN or Inf in their inputs and hidden states changes no bit of any other number."""
    hidden, weight, targets, token_weight, inputs = example()
    off = token_weight == 0
    inputs = inputs | {"which": np.arange(N, dtype=np.int32) % len(HEADS)}

    def poisoned(a):
        return np.where(off.reshape(-1, *[1] * (a.ndim - 1)), bad, a).astype(a.dtype)

    floats = {name: poisoned(a) for name, a in inputs.items() if a.dtype == np.float32}
    run = program(mesh, any_of)
    clean = run(hidden, weight, targets, token_weight, inputs)
    dirty = run(poisoned(hidden), weight, targets, token_weight, inputs | floats)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(clean[0]) and np.any(clean[3])


@pytest.mark.parametrize("mesh", ["1 device", "fsdp, expert, tensor"])
def test_without_a_token_that_counts_everything_is_zero(mesh):
    hidden, weight, targets, _, inputs = example()
    results = program(mesh, any_of)(hidden, weight, targets, np.zeros(N, np.float32), inputs)
    assert not any(np.any(x) for x in jax.tree.leaves(results))


@pytest.mark.parametrize("chunk", [1, 1024])
def test_the_chunk_size_changes_no_number(chunk):
    run = program("1 device", DRPO, chunk=chunk)
    agree(run(*example()), program("1 device", DRPO)(*example()))


CALLS = []


def counting(logp, **_):
    jax.debug.callback(lambda: CALLS.append(1))
    return likelihood(logp)


@pytest.mark.parametrize("live", [0, 1, CHUNK, CHUNK + 1, N])
def test_only_chunks_of_tokens_that_count_are_computed(live):
    hidden, weight, targets, _, inputs = example()
    token_weight = np.random.default_rng(live).permutation(np.arange(N) < live).astype(np.float32)
    CALLS.clear()
    _, trace, _, _ = program("1 device", counting)(hidden, weight, targets, token_weight, inputs)
    jax.effects_barrier()
    assert len(CALLS) == -(-live // CHUNK)
    np.testing.assert_array_equal(trace.coefficient, token_weight)


def test_three_matmuls_and_no_array_of_tokens_by_vocabulary():
    hidden, weight, *arrays = example()

    def loss(hidden, weight):
        return head_loss(hidden, weight, *arrays, objective=any_of, chunk=CHUNK)[0]

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, weight))
    assert jaxpr.count("dot_general[") == 3
    assert f"{CHUNK},{V}]" in jaxpr and f"{N},{V}]" not in jaxpr


def test_a_cotangent_scales_the_gradient():
    hidden, weight, *arrays = example()
    _, _, d_hidden, d_weight = program("1 device", DRPO)(hidden, weight, *arrays)

    def scaled(hidden, weight):
        static = {"objective": DRPO, "temperature": TEMPERATURE, "chunk": CHUNK}
        return -3.0 * head_loss(hidden, weight, *arrays, **static)[0]

    agree(jax.jit(jax.grad(scaled, (0, 1)))(hidden, weight), (-3 * d_hidden, -3 * d_weight))


def test_head_and_custom_vjp_share_one_coefficient(monkeypatch):
    """Replacing token_terms in the table changes both gradients in the same way."""
    *arrays, inputs = example()
    counts = arrays[-1] != 0
    mu, advantage = inputs["behavior_logp"], inputs["advantage"]

    def gradients():
        run = program.__wrapped__("1 device", DRPO)
        _, trace, _, d_weight = run(*arrays, inputs)
        objective = functools.partial(policy_objective, "drpo")
        through_vjp = jax.vmap(jax.grad(objective))(trace.logp, mu, advantage)
        return through_vjp[counts], trace.coefficient[counts], d_weight

    before = gradients()
    original = table.token_terms

    def perturbed(*args, **hyper):
        J, c, w = original(*args, **hyper)
        return J, 2 * c + 0.25, w

    monkeypatch.setattr(table, "token_terms", perturbed)
    after = gradients()
    for through_vjp, coefficient, _ in (before, after):
        np.testing.assert_allclose(through_vjp, coefficient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after[0], 2 * before[0] + 0.25, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(after[2] - before[2]) > 0.1 * np.linalg.norm(before[2])


def test_chunks_are_larger_where_the_gradient_of_the_head_is_slow_to_move():
    assert chunk_tokens(151_936, "cpu") == 512 and chunk_tokens(32, "cpu") == 2**26 // 32
    assert chunk_tokens(151_936, "tpu") == chunk_tokens(151_936, "gpu") == 2**28 // 151_936
