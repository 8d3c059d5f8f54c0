import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.models import Compute, ModelConfig, Prefix, Transformer, router_metrics

SIZES = dict(vocab_size=64, hidden_size=32, layers=2, heads=6, kv_heads=2, head_dim=8)
CONFIGS = {
    "dense": ModelConfig(**SIZES, mlp_size=48, rope_theta=1e4),
    "moe": ModelConfig(**SIZES, experts=5, experts_per_token=2, expert_size=24, rope_theta=1e4),
}
B, T = 2, 12
pytestmark = pytest.mark.usefixtures("compile_quickly")
forward = jax.jit(lambda model, *args: model(*args))


def new_model(name):
    return jax.jit(lambda key: Transformer(CONFIGS[name], key))(jax.random.key(3))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return new_model(request.param)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=(B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def defaults():
    return np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)


def test_a_token_sees_only_itself_and_the_past(model, tokens, defaults):
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    before, after = forward(model, tokens, *defaults), forward(model, changed, *defaults)
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=2e-6)
    assert np.all(np.max(np.abs(before - after)[:, 7:], axis=-1) > 1e-3)
    assert before.dtype == jnp.float32
    np.testing.assert_allclose(forward(model, tokens), before, atol=2e-6)  # the defaults


def test_packed_segments_do_not_see_each_other(model, tokens, defaults):
    # Two segments of 5 and 7 tokens, packed into each row, then each on its own.
    segments = np.repeat([[1, 2]] * B, [5, 7], axis=1).astype(np.int32)
    positions = np.tile(np.r_[0:5, 0:7].astype(np.int32), (B, 1))
    packed = forward(model, tokens, positions, segments)
    for start, end in ((0, 5), (5, 12)):
        alone = np.zeros_like(tokens)
        alone[:, : end - start] = tokens[:, start:end]
        logits = forward(model, alone, *defaults)[:, : end - start]
        np.testing.assert_allclose(packed[:, start:end], logits, atol=2e-6)
    whole = forward(model, tokens, positions, defaults[1])
    assert np.max(np.abs(packed - whole)[:, 5:]) > 1e-3


@pytest.mark.parametrize("real", [slice(0, 8), slice(4, 12)], ids=["right", "left"])
def test_padding_never_changes_real_tokens(model, tokens, defaults, real):
    segments = np.zeros((B, T), np.int32)
    segments[:, real] = 1
    positions = np.maximum(np.arange(T) - real.start, 0) + np.zeros((B, 1), np.int32)
    other = np.where(segments, tokens, (tokens + 17) % 64)
    a, b = (forward(model, t, positions.astype(np.int32), segments) for t in (tokens, other))
    np.testing.assert_array_equal(a[:, real], b[:, real])
    assert np.all(np.isfinite(a))
    alone = np.zeros_like(tokens)
    alone[:, :8] = tokens[:, real]
    np.testing.assert_allclose(a[:, real], forward(model, alone, *defaults)[:, :8], atol=2e-6)


def test_padding_reaches_no_router_statistic(tokens):
    model = new_model("moe")
    segments = (np.arange(T) < np.array([[12], [5]])).astype(np.int32)
    router = jax.jit(lambda m: m.hidden(tokens, segment_ids=segments).router)(model)
    assert router["load"].shape == (2, 5)
    np.testing.assert_allclose(np.sum(router["load"], axis=-1), 2 * 17)
    np.testing.assert_allclose(np.sum(router["probability"], axis=-1), 17, rtol=1e-5)
    metrics = router_metrics(router)
    assert 0.9 < metrics["router/balance_loss"] < 5 and 1 <= metrics["router/max_load"] <= 2.5


@pytest.mark.slow
def test_a_prefix_then_decoding_equals_the_full_forward(model, tokens, defaults):
    """Prefills right-aligned rows of two lengths in two chunks, then decodes in a ring."""
    full, chunk, columns, clock = forward(model, tokens, *defaults), 3, 70, 67
    lengths = np.array([6, 4])
    rows = np.stack([tokens[0][:6], [0, 0, *tokens[1][:4]]])
    valid = np.arange(6) >= 6 - lengths[:, None]
    positions = np.maximum(np.arange(6) - (6 - lengths[:, None]), 0)
    caches = model.empty_prefix(B, 6, jnp.float32)
    extend = jax.jit(lambda m, t, p, s, prefix: m.hidden(t, p, s, prefix=prefix))
    for start in (0, chunk):
        part = slice(start, start + chunk)
        prefix = Prefix(caches, jnp.int32(start), valid)
        segments = valid[:, part].astype(np.int32)
        out = extend(model, rows[:, part], positions[:, part], segments, prefix)
        caches = out.caches
    np.testing.assert_allclose(
        model.logits(out.hidden[:, -1]), full[np.arange(B), lengths - 1], atol=1e-5
    )
    rings = model.empty_caches(B, columns)
    rings = jax.tree.map(lambda x: x + 1e3, rings)  # columns that were not written must not be read
    for slot in range(B):
        of_slot = lambda cache: jax.tree.map(lambda x: x[slot], cache)  # noqa: E731, B023
        rings = [ring.put(slot, of_slot(kv), clock) for ring, kv in zip(rings, caches)]

    @jax.jit
    def decode(*args):
        hidden, caches, _ = model.decode(*args)
        return model.logits(hidden), caches

    for _ in range(5):
        token = tokens[np.arange(B), lengths]
        args = token, model.angles(lengths), rings, clock, lengths + 1
        logits, rings = decode(*args)
        np.testing.assert_allclose(logits, full[np.arange(B), lengths], atol=1e-5)
        clock, lengths = (clock + 1) % columns, lengths + 1
        if lengths[0] == 8:  # resize in the middle
            rings, clock = [ring.resized(clock, 66, True) for ring in rings], min(columns, 66) % 66
            columns = 66


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, change", [("dense", {"remat": "full"}), ("moe", {"remat": "dots", "unroll": 2})]
)
def test_remat_and_unroll_change_no_number(tokens, name, change):
    model = new_model(name)
    loss, grads = loss_and_grads(model, tokens, Compute(**change))
    plain_loss, plain_grads = loss_and_grads(model, tokens, Compute())
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads)):
        assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b) and np.any(b)


def loss_and_grads(model, tokens, compute):
    def loss(model):
        logits = model(tokens, compute=compute)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))(model)


def test_remat_recomputes_as_documented(tokens):
    """The backward pass has as many matmuls with "dots" as with "none", and more with "full"."""
    model = new_model("dense")

    def matmuls(remat):
        def loss(model):
            return jnp.sum(model.hidden(tokens, compute=Compute(remat=remat)).hidden)

        text = jax.jit(jax.grad(loss)).lower(model).as_text()
        return text.count("stablehlo.dot_general")

    none, dots, full = (matmuls(remat) for remat in ("none", "dots", "full"))
    assert none < full and dots < full


def test_remat_selects_experts_once(tokens):
    """Recomputed probabilities could select other experts than the forward pass."""
    model = new_model("moe")
    for remat in ("dots", "full"):

        def again(model, remat=remat):
            return jnp.sum(model.hidden(tokens, compute=Compute(remat=remat)).hidden)

        assert str(jax.make_jaxpr(jax.grad(again))(model)).count("top_k[") == 1


def test_bfloat16_compute_keeps_float32_weights_and_logits(model, tokens, defaults):
    logits = jax.jit(lambda m: m(tokens, compute=Compute(dtype="bfloat16")))(model)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    exact = forward(model, tokens, *defaults)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.15  # a router may select other experts
