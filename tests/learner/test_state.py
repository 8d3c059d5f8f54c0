import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.meshes import FAMILIES, small_config
from drpo_jax.config import default_config
from drpo_jax.learner import lay_out, make_batch, make_optimizer
from drpo_jax.models import Transformer
from drpo_jax.parallel import is_param
from drpo_jax.programs import model_config


def optimizer_config(**fields):
    config = default_config().optimizer
    config.update(learning_rate=0.1, weight_decay=0.0, **fields)
    return config


def steps(optimizer, params, gradients):
    """The change of each step for a sequence of gradients."""
    state, changes = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        change, state = step(gradient, state, params)
        changes.append(np.asarray(change))
    return np.array(changes)


@pytest.mark.parametrize(
    "fields, expected",
    [
        # The first steps of Adam with a constant gradient are the learning rate itself.
        (dict(), [0.1] * 6),
        (dict(warmup_steps=4), [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]),
        (dict(warmup_steps=1), [0.1] * 6),
        (dict(schedule="linear"), 0.1 * (1 - np.arange(6) / 10)),
        (
            dict(schedule="linear", final_fraction=0.5, warmup_steps=2),
            [0.05, 0.1, 0.1, 0.09375, 0.0875, 0.08125],
        ),
        (dict(schedule="cosine"), 0.05 * (1 + np.cos(np.pi * np.arange(6) / 10))),
    ],
    ids=str,
)
def test_schedules(fields, expected):
    optimizer = make_optimizer(optimizer_config(**fields), total_updates=10)
    changes = steps(optimizer, jnp.zeros(3), [jnp.full(3, 0.2)] * 6)
    np.testing.assert_allclose(-changes, np.tile(np.array(expected)[:, None], 3), rtol=1e-4)


def test_the_first_moment_may_be_bfloat16():
    """Only the first moment: a second moment in bfloat16 would stop changing."""
    exact, ours = (
        make_optimizer(optimizer_config(mu_dtype=name), 10) for name in ("float32", "bfloat16")
    )
    gradients = list(np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32))
    a, b = (steps(o, jnp.zeros(50), gradients) for o in (exact, ours))
    assert 0 < np.max(np.abs(a - b)) < 0.01 * np.max(np.abs(a)) and b.dtype == np.float32
    adam = ours.init(jnp.zeros(50))[1][0]
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_the_final_fraction(schedule):
    optimizer = make_optimizer(optimizer_config(schedule=schedule, final_fraction=0.2), 10)
    changes = steps(optimizer, jnp.zeros(1), [jnp.ones(1)] * 13)
    np.testing.assert_allclose(-changes[10:], 0.02, rtol=1e-4)


def test_the_gradient_is_clipped_by_its_global_norm_and_weights_decay():
    optimizer = make_optimizer(optimizer_config(clip_norm=1.0), 10)
    small, large = jnp.array([0.6, 0.8]), jnp.array([60.0, 80.0])
    clipped = steps(optimizer, jnp.zeros(2), [small, large, small])
    same = steps(optimizer, jnp.zeros(2), [small] * 3)
    np.testing.assert_allclose(clipped, same, rtol=1e-5)
    config = optimizer_config()
    config.weight_decay = 0.5
    decay = steps(make_optimizer(config, 10), jnp.array([2.0]), [jnp.zeros(1)])
    np.testing.assert_allclose(decay, [[-0.1 * 0.5 * 2.0]], rtol=1e-5)


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("family", FAMILIES)
def test_only_matrices_decay_unless_norms_are_included(family):
    """With zero gradients, an update consists of weight decay alone."""
    fields = FAMILIES[family] | {"model.attention_bias": family == "dense"}
    architecture = model_config(small_config(fields))
    abstract = jax.eval_shape(lambda: Transformer(architecture, jax.random.key(0)))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract)
    for decay_norms in (False, True):
        config = optimizer_config(decay_norms=decay_norms)
        config.weight_decay = 0.5
        optimizer = make_optimizer(config, 10)

        @jax.jit
        def update(model, optimizer=optimizer):
            zeros = jax.tree.map(jnp.zeros_like, model)
            return optimizer.update(zeros, optimizer.init(model), model)[0]

        changes = update(model)
        changes = jax.tree_util.tree_leaves_with_path(changes, is_leaf=is_param)
        for (path, change), weight in zip(changes, jax.tree.leaves(model, is_leaf=is_param)):
            decays = decay_norms or weight.get_metadata()["decay"]
            expected = -0.1 * 0.5 * weight.get_value() if decays else 0
            np.testing.assert_allclose(change.get_value(), expected, rtol=1e-5, err_msg=str(path))


def test_the_state_of_the_optimizer_is_the_same_with_and_without_decayed_norms():
    """Checkpoints that were saved before optimizer.decay_norms existed therefore still load."""
    params = {"w": jnp.ones(2)}
    states = [
        make_optimizer(optimizer_config(decay_norms=decay_norms), 10).init(params)
        for decay_norms in (False, True)
    ]
    paths = [
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        for state in states
    ]
    assert paths[0] == paths[1]


def test_a_batch_follows_from_the_lengths():
    tokens = np.arange(1, 22, dtype=np.int32).reshape(3, 7)
    layout = lay_out([2, 3, 1], [4, 1, 0], width=7)
    logp = np.array([[1, 2, 3, 4], [5, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    topk = np.stack([logp, -logp], axis=-1)
    batch = make_batch(layout, tokens, {"logp": logp, "advantage": np.arange(7, 10), "topk": topk})
    assert batch.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
    ]
    # A token is predicted one position before it.
    assert batch.mask.tolist() == [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0] * 7]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0]
    np.testing.assert_array_equal(batch.tokens, np.where(batch.segment_ids, tokens, 0))
    assert batch.inputs["logp"].tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 0, 5, 0, 0, 0, 0], [0] * 7]
    assert batch.inputs["advantage"].tolist() == [
        [0, 7, 7, 7, 7, 0, 0],
        [0] * 2 + [8] + [0] * 4,
        [0] * 7,
    ]
    np.testing.assert_array_equal(batch.inputs["topk"][..., 1], -batch.inputs["logp"])
