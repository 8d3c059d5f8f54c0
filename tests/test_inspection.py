"""Gradients of a saved rollout against an unfused model, autodiff, and sums by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.checkpoint import Checkpoints, flatten
from drpo_jax.config import default_config, resolve, to_json
from drpo_jax.errors import BadInput
from drpo_jax.inspection import Inspection, cosines, judge, norms, products, select
from drpo_jax.learner.record import save_rollout
from drpo_jax.models import ModelConfig, Transformer
from drpo_jax.objectives import policy_objective

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
N, PROMPT, RESPONSE = 6, 5, 7
ONE = dict(data=1)
MIXED = dict(data=2, fsdp=2, tensor=2)


def config(**fields):
    config = default_config()
    config.model.update(
        vocab_size=32, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_size=48,
        rope_theta=1e4,
    )  # fmt: skip
    config.data.digits, config.data.operations = 1, "+"
    config.sampler.update(max_prompt_length=PROMPT, max_response_length=RESPONSE, slots=16)
    # Responses of different lengths have different weights.
    config.objective.update(delta=0.01, aggregation="token-mean")
    config.train.update(prompts=8, samples=2, mini_batch_prompts=8, micro_batch=8)
    config.sft.update(batch=16, micro_batch=8)
    config.evaluate.samples = 1
    config.update_from_flattened_dict(fields)
    return resolve(config)


def new_rollout(n=N):
    """Returns a rollout of n sequences with a third of their tokens in the tail."""
    rng = np.random.default_rng(0)
    lengths = np.resize([7, 2, 5, 1, 4, 6], n).astype(np.int32)
    mask = np.arange(RESPONSE) < lengths[:, None]
    tail = rng.uniform(size=mask.shape) < 0.3
    mu = rng.normal(np.where(tail, -6, -3.5), 0.2).astype(np.float32) * mask
    advantage = rng.normal(size=n).astype(np.float32)
    return {
        "tokens": rng.integers(32, size=(n, PROMPT + RESPONSE)).astype(np.int32),
        "prompt_lengths": np.resize([3, 5, 2, 4], n).astype(np.int32),
        "response_lengths": lengths,
        "response_mask": mask,
        "loss_mask": mask,
        "behavior_logp": mu,
        "old_logp": mu + 0.1 * mask,
        "advantage": advantage,
        "reward": (advantage > 0).astype(np.float32),
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of steps 2 (the best), 4 and 6, and with rollouts 0 and 4."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.json").write_text(to_json(config()))
    like = Inspection(directory, one_device()).programs.abstract_state.model
    with Checkpoints(directory / "checkpoints", 2) as checkpoints:
        for step, score in ((2, 0.5), (4, 0.1), (6, 0.2)):
            checkpoints.save(step, {"model": numbers(like, step)}, {"eval/avg": score})
    for step in (0, 4):
        save_rollout(directory, step, **new_rollout())
    (directory / "rollouts" / "step_000008.tmp").touch()  # of a run in progress
    (directory / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    return directory


def numbers(like, seed):
    """Returns a tree shaped like `like`, of small random numbers around 0.1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.float32(rng.normal(0.1, 0.2, size=a.shape)), like)


def one_device():
    return ONE | {"devices": jax.devices()[:1]}


@pytest.fixture(scope="module")
def run(workdir):
    return Inspection(workdir, one_device())


@pytest.fixture(scope="module")
def model(run):
    return run.model()


@pytest.fixture(scope="module")
def scored(run, model):
    return run.score(model, run.rollout())


@jax.jit
def reference(model, tokens_T, first, token_R):
    """Returns the unfused gradient of DRPO's −Σ J over one response, and logp [T − 1] of its row."""

    def loss(model):
        logp = jax.nn.log_softmax(model(tokens_T[None])[0, :-1])
        logp = jnp.take_along_axis(logp, tokens_T[1:, None], axis=-1)[:, 0]
        of_response = jax.lax.dynamic_slice(logp, (first - 1,), (RESPONSE,))
        mask, mu, advantage = token_R
        return -jnp.sum(
            mask * policy_objective("drpo", of_response, mu, advantage, delta=0.01)
        ), logp

    return jax.grad(loss, has_aux=True)(model)


@pytest.fixture(scope="module")
def by_hand(model, scored):
    """For every sequence, its share of DRPO's gradient, {path: float64 array}, and its logp [R]."""
    shares = []
    for i in range(N):
        start, count = scored["prompt_lengths"][i], scored["response_lengths"][i]
        token = scored["response_mask"][i], scored["behavior_logp"][i], scored["advantage"][i]
        grads, logp = reference(model, scored["tokens"][i], start, token)
        tokens = scored["response_mask"].sum()
        share = {k: np.asarray(a, np.float64) / tokens for k, a in flatten(grads).items()}
        shares.append((share, logp[start - 1 :][:count]))
    return shares


def assert_close(ours, expected, tolerance=2e-5):
    for name, a in flatten(ours).items():
        error = np.linalg.norm(a - expected[name]) / np.linalg.norm(expected[name])
        assert error < tolerance, name


def test_score_and_gradient_against_an_unfused_model(run, model, scored, by_hand):
    for i, (_, logp) in enumerate(by_hand):
        np.testing.assert_allclose(scored["logp"][i, : len(logp)], logp, atol=1e-5)
    assert not scored["logp"][~scored["response_mask"]].any() and "weight" not in scored
    grads = run.gradient(model, judge(scored, "drpo", delta=0.01))
    assert_close(grads, {k: sum(g[k] for g, _ in by_hand) for k in by_hand[0][0]})


def test_spread_by_hand(run, model, scored, by_hand):
    spread = run.spread(model, judge(scored, "drpo", delta=0.01))
    each = [{k: N * a for k, a in g.items()} for g, _ in by_hand]
    mean = {k: sum(g[k] for g in each) / N for k in each[0]}
    assert spread.count == N
    assert_close(spread.mean, mean)
    variance = sum(np.sum((g[k] - mean[k]) ** 2) for g in each for k in mean) / N
    np.testing.assert_allclose(spread.variance["total"], variance, rtol=1e-5)
    mlp = [k for k in mean if ".mlp." in k]
    by_layer = sum(np.sum((g[k] - mean[k]) ** 2, axis=(1, 2)) for g in each for k in mlp) / N
    np.testing.assert_allclose(spread.variance["mlp"], by_layer, rtol=1e-5)
    signal = sum(np.sum(a**2) for a in mean.values())
    np.testing.assert_allclose(spread.signal["total"], signal, rtol=1e-5)


def test_the_gradient_has_the_norm_that_an_update_reports(run, model, scored):
    rollout = new_rollout(16)
    inputs = {name: rollout[name] for name in ("behavior_logp", "advantage")}
    lengths = rollout["prompt_lengths"], rollout["response_lengths"]
    with jax.set_mesh(run.mesh):
        batch, _ = run.programs.batch(rollout["tokens"], *lengths, inputs)
        state = run.programs.restart(model)
        _, report = run.programs.policy_update(state, batch)
    grads = run.gradient(model, judge(run.score(model, rollout), "drpo", delta=0.01))
    np.testing.assert_allclose(norms(grads)["total"], report.metrics["grad_norm"], rtol=1e-5)


def test_coefficients_set_to_zero_leave_the_other_tokens(run, model, scored):
    whole = judge(scored, "spo")
    tail = scored["behavior_logp"] < np.log(0.01)
    parts = [
        run.gradient(model, whole | {"coefficient": whole["coefficient"] * tokens})
        for tokens in (tail, ~tail)
    ]
    together = jax.tree.map(jnp.add, *parts)
    assert 1e-3 < cosines(*parts)["total"] ** 2 < 1
    assert_close(together, flatten(run.gradient(model, whole)))


def test_eight_devices_agree_with_one(run, workdir, model, scored):
    mixed = Inspection(workdir, MIXED)
    ours = mixed.model()
    drpo = judge(scored, "drpo", delta=0.01)
    theirs = mixed.score(ours, mixed.rollout())
    np.testing.assert_allclose(theirs["logp"], scored["logp"], atol=1e-5)
    assert_close(mixed.gradient(ours, drpo), flatten(jax.device_get(run.gradient(model, drpo))))
    few = select(drpo, slice(0, 2))
    a, b = mixed.spread(ours, few), run.spread(model, few)
    np.testing.assert_allclose(a.variance["total"], b.variance["total"], rtol=1e-5)


# ------------------------------------------------------------------------- without a compilation


@pytest.mark.parametrize("experts", [0, 4])
def test_products_and_cosines_by_module(experts):
    sizes = dict(vocab_size=8, hidden_size=8, layers=3, heads=2, kv_heads=2, head_dim=4)
    inner = dict(experts=4, experts_per_token=2, expert_size=4) if experts else dict(mlp_size=4)
    new = partial(Transformer, ModelConfig(**sizes, **inner))
    like = jax.eval_shape(new, jax.random.key(0))
    a, b = numbers(like, 0), numbers(like, 1)
    ours = products(a, b)
    leaves = {k: (np.asarray(x), np.asarray(flatten(b)[k])) for k, x in flatten(a).items()}
    expected = {
        k: np.sum(x * y, axis=tuple(range(k[0] == "b", x.ndim))) for k, (x, y) in leaves.items()
    }
    blocks = {k.removeprefix("blocks."): x for k, x in expected.items() if x.ndim}
    inner = ("gate_proj", "up_proj", "down_proj")
    grouped = {
        "attention": [blocks[f"attention.{k}_proj"] for k in "qkvo"],
        "experts" if experts else "mlp": [blocks[f"mlp.{k}"] for k in inner],
        "norms": [x for k, x in blocks.items() if k.endswith("norm")],
        "embedding": [expected["embed"]],
        "final_norm": [expected["final_norm"]],
        "head": [expected["lm_head"]],
        "layer": [*blocks.values()],
        "total": [np.sum(x) for x in expected.values()],
    } | ({"router": [blocks["mlp.router"]]} if experts else {})
    assert set(ours) == set(grouped) and len(grouped["norms"]) == 4
    for name, parts in grouped.items():
        assert ours[name].shape == ((3,) if np.ndim(parts[0]) else ())
        np.testing.assert_allclose(ours[name], sum(parts), rtol=2e-5, atol=1e-6, err_msg=name)
    cosine = ours["total"] / (norms(a)["total"] * norms(b)["total"])
    np.testing.assert_allclose(cosines(a, b)["total"], cosine)
    np.testing.assert_allclose(
        cosines(a, jax.tree.map(lambda x: -3 * x, a))["layer"], -1, rtol=1e-6
    )
    assert np.isnan(cosines(a, jax.tree.map(jnp.zeros_like, a))["total"])


def test_judge_passes_the_arrays_that_an_objective_needs():
    rollout = new_rollout() | {"logp": new_rollout()["behavior_logp"] * 0.9}
    mask = rollout["response_mask"]
    for name in ("drpo", "gspo", "minirl"):
        judged = judge(rollout, name)
        assert judged["weight"].shape == judged["coefficient"].shape == mask.shape
        assert not judged["weight"][~mask].any() and not judged["coefficient"][~mask].any()
    r = np.exp(rollout["logp"] - rollout["old_logp"])  # MiniRL clips by π/π_old.
    up = (rollout["advantage"] > 0)[:, None]
    np.testing.assert_array_equal(
        judged["weight"] == 0, ~mask | (up & (r > 1.27)) | (~up & (r < 0.8))
    )
    log_r = (rollout["logp"] - rollout["behavior_logp"])[
        0
    ].mean()  # All seven positions are tokens.
    s = judge(rollout, "gspo", epsilon_low=9.0, epsilon_high=9.0)["coefficient"][0]
    np.testing.assert_allclose(s, np.exp(log_r) * rollout["advantage"][0], rtol=1e-5)
    per_token = np.repeat(rollout["advantage"][:, None], RESPONSE, axis=1)
    per_token[:, 2] *= -1
    ours, other = (judge(rollout | {"advantage": A}, "drpo") for A in (per_token, -per_token))
    first, plain = np.arange(RESPONSE) != 2, judge(rollout, "drpo")["coefficient"]
    np.testing.assert_array_equal(ours["coefficient"][:, first], plain[:, first])
    np.testing.assert_array_equal(other["coefficient"][:, 2], plain[:, 2])
    filtered = judge(rollout | {"loss_mask": mask & (np.arange(N) > 1)[:, None]}, "drpo")
    assert not filtered["coefficient"][:2].any() and filtered["coefficient"][2].any()
    with pytest.raises(ValueError, match="missing: topk_logp, behavior_topk_logp"):
        judge(rollout, "dppo_topk_tv")
    with pytest.raises(ValueError, match="Did you mean 'drpo'"):
        judge(rollout, "drop")


def test_saved_steps_are_listed_and_loaded(run, model):
    assert (run.checkpoints, run.rollouts) == ([2, 4, 6], [0, 4])
    assert run.rollout()["step"] == 4 and run.rollout(0)["step"] == 0
    best, second = (norms(run.model(step))["total"] for step in ("best", 2))
    assert best == second != norms(model)["total"] == norms(run.model(6))["total"]
    few = select(run.rollout(), [1, 3])
    np.testing.assert_array_equal(few["prompt_lengths"], [5, 4])
    assert few["step"] == 4


def test_missing_steps_are_named(run, model, scored, workdir, tmp_path):
    with pytest.raises(BadInput, match="no checkpoint of step 3; there are 2, 4, 6"):
        run.model(3)
    with pytest.raises(BadInput, match="no rollout .* of step 2; there are 0, 4"):
        run.rollout(2)
    with pytest.raises(BadInput, match="call judge"):
        run.gradient(model, scored)
    with pytest.raises(BadInput, match="needs 3 devices"):
        Inspection(workdir, dict(data=3))
    with pytest.raises(BadInput, match="holds no run"):
        Inspection(tmp_path / "nowhere")
    path = tmp_path / "config.json"
    path.write_text(to_json(config()))
    empty = Inspection(tmp_path, one_device())
    with pytest.raises(BadInput, match="no checkpoint yet"):
        empty.model()
    with pytest.raises(BadInput, match=r"no rollout saved \(train.save_rollout_every\) yet"):
        empty.rollout()
    path.write_text("[]")
    with pytest.raises(BadInput, match="must be a JSON object"):
        Inspection(tmp_path)
