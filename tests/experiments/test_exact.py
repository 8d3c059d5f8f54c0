"""Level 1 of the laboratory: exact expectations, training runs, cells and their cache."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.errors import BadInput
from drpo_jax.objectives import advantages
from experiments.exact import cells, claims, gradients, problem, sweep
from experiments.exact.analysis import CollapseRate, Results, Row
from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell, Runner, Setup
from experiments.exact.problem import Shape
from experiments.exact.run import Rollout, Schedule, loss, sample

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = Shape(prompts=1, length=2, vocabulary=3, width=2, keys=1, common=1, fit=20)
SMALL = Setup(
    Shape(prompts=4, length=3, vocabulary=16, width=8, keys=2, common=4, fit=100),
    Schedule(rollouts=20, batch=4, samples=8, mini_batch=2, epochs=2, oldest=4),
    tuning=(0,),
    reported=(1, 2, 3),
)


@pytest.fixture(scope="module")
def tiny():
    """A task of 9 responses, its policy, and log π, log µ and log π_old, all different."""
    task, params = problem.warm_start(jax.random.key(3), TINY)
    z = problem.logits(params)
    noise = 0.7 * jax.random.normal(jax.random.key(4), (2, *z.shape))
    return task, params, tuple(map(jax.nn.log_softmax, (z, z + noise[0], z + noise[1])))


@pytest.fixture(scope="module")
def runner():
    return Runner(SMALL)


def responses(task):
    """All responses of the tiny task: contexts and tokens, int32 [9, T]."""
    tokens = np.array(list(itertools.product(range(TINY.vocabulary), repeat=TINY.length)))
    rows = problem.rows_of(task.key_V[tokens[:, 0]].astype(jnp.int32), TINY.steps)
    return rows, jnp.asarray(tokens)


def test_the_expected_reward_is_the_sum_over_all_responses(tiny):
    task, _, (logp, *_) = tiny
    rows, tokens = responses(task)
    probability = np.exp(np.asarray(logp)[0, rows, tokens].sum(axis=1))
    reward = problem.reward_probability(task, jnp.zeros(len(tokens), int), tokens)
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(
        problem.expected_reward(task, logp)[0], probability @ np.asarray(reward), rtol=1e-5
    )


def test_the_surrogate_at_the_sampler_is_the_autodiff_of_the_expected_reward(tiny):
    """With π = µ, its expected gradient is (1 − 1/G)/T times that of the reward: unbiased."""
    task, params, (logp, *_) = tiny
    terms = gradients.expected(ARMS["surrogate"], task, (logp,) * 3, samples=4, threshold=0.0)
    ours = gradients.parameter_gradient(params, terms)

    def reward(params):
        return problem.expected_reward(task, jax.nn.log_softmax(problem.logits(params))).mean()

    true = jax.tree.map(lambda g: (1 - 1 / 4) * g / TINY.length, jax.grad(reward)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, true)


@pytest.mark.parametrize("name", ["drpo", "drpo_decoupled", "mask_drpo", "grpo", "prime_rl"])
def test_the_sampled_gradient_averages_to_the_exact_one(tiny, name):
    """Over all 9² groups of two responses and their rewards, each with its probability under µ."""
    task, params, (logp, mu, old) = tiny
    rows, tokens = responses(task)
    probability = np.exp(np.asarray(mu)[0, rows, tokens].sum(axis=1))
    chance = np.asarray(problem.reward_probability(task, jnp.zeros(9, int), tokens))
    outcomes = itertools.product(range(9), range(9), (0.0, 1.0), (0.0, 1.0))
    first, second, *reward = np.array(list(outcomes)).T
    pairs, reward = np.stack([first, second], axis=1).astype(int), np.stack(reward, axis=1)
    weight = probability[pairs] * np.where(reward, chance[pairs], 1 - chance[pairs])
    advantage = advantages("dr_grpo", reward.reshape(-1), 2).reshape(-1, 2)
    dials = Cell(name, 0.1).dials

    def gradient(pair, advantage):
        part = Rollout(
            jnp.zeros(1, int), rows[None, pair], tokens[None, pair], advantage[None], old, mu
        )
        return jax.grad(loss, has_aux=True)(params, part, dials)[0]

    sampled = jax.jit(jax.vmap(gradient))(pairs, advantage)
    terms = gradients.expected(ARMS[name], task, (logp, mu, old), 2, ARMS[name].value)
    exact = gradients.parameter_gradient(params, terms)
    for key, values in exact.items():
        mean = -np.tensordot(weight.prod(axis=1), np.asarray(sampled[key]), axes=1)
        np.testing.assert_allclose(mean, values, rtol=1e-3, atol=1e-6)


def test_arms_that_need_whole_responses_have_no_exact_gradient(tiny):
    task, _, tables = tiny
    with pytest.raises(ValueError, match="GSPO: c of a token depends on its whole response"):
        gradients.expected(ARMS["gspo"], task, tables, 2, 0.0)


def test_tokens_are_drawn_from_the_distribution(tiny):
    task, _, (_, mu, _) = tiny
    _, tokens = sample(task, mu, 20_000, jax.random.key(0))
    share = np.bincount(np.asarray(tokens)[0, :, 0], minlength=3) / 20_000
    np.testing.assert_allclose(share, np.exp(np.asarray(mu)[0, 0]), atol=0.015)


def test_training_learns_or_collapses(runner):
    """Two fixed cells: a small learning rate without mismatch, and a large one."""
    learned = np.array(runner(Cell("drpo", 0.02))["reward"])
    collapsed = np.array(runner(Cell("surrogate", 1.0, noise=1.0))["reward"])
    assert (learned[:, -1] > learned[:, 0] + 0.1).all()
    assert (collapsed[:, -1] < collapsed[:, 0]).all()


def test_a_run_is_a_function_of_its_settings_and_seed(runner):
    cell = Cell("drpo", 0.02, noise=0.3, staleness=1)
    first = runner(cell)
    assert runner(cell) == first
    assert Runner(SMALL)(cell) == first
    assert runner(replace(cell, fixed=True)) != first
    assert len({tuple(curve) for curve in first["reward"]}) == len(SMALL.seeds)


def test_what_is_off_changes_no_bit(runner):
    """Age without staleness, numerics without noise; a fixed noise of size 0 is none."""
    result = runner(Cell("drpo", 0.02))
    assert set(result["age"]) == set(result["numerics"]) == {0.0}
    assert runner(Cell("drpo", 0.02, fixed=True)) == result


def test_reward_scale_moves_no_boundary_of_drpo(runner):
    """With |Â|, Adam makes a run independent of the scale, but for its ε; without, it is not.

    The ε changes the last bits, and these may change a sample: hence the median.
    """
    by_arm = {
        arm: [np.array(runner(Cell(arm, 0.02, scale=s))["reward"]) for s in (1.0, 4.0)]
        for arm in ("drpo", "drpo_no_advantage")
    }
    assert np.median(abs(np.subtract(*by_arm["drpo"]))) < 1e-4
    assert np.median(abs(np.subtract(*by_arm["drpo_no_advantage"]))) > 0.01


def test_cells_are_cached_by_content(tmp_path, runner, monkeypatch):
    cell = Cell("grpo", 0.02)
    assert list(cells.missing(tmp_path, [cell], SMALL)) == [cell]
    result = runner(cell)
    cells.store(tmp_path, cell, SMALL, result)
    assert cells.load(tmp_path, cell, SMALL) == json.loads(json.dumps(result))
    assert not list(cells.missing(tmp_path, [cell], SMALL))
    other = replace(SMALL, reported=(1, 2, 4))
    assert cells.load(tmp_path, cell, other) is None
    assert cells.load(tmp_path, replace(cell, learning_rate=0.03), SMALL) is None
    monkeypatch.setattr(cells, "_code", lambda: "another version of the code")
    assert cells.load(tmp_path, cell, SMALL) is None


def test_the_name_of_a_cell_reruns_it():
    cell = Cell("spo", 0.005, noise=0.3, fixed=True, staleness=2, threshold=0.2)
    assert cells.parse(cell.name) == cell
    assert cells.parse("arm=drpo,learning_rate=0.01") == Cell("drpo", 0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm=drop,learning_rate=0.1", "there is no arm 'drop'; known: surrogate"),
        ("arm=drpo", "lacks learning_rate"),
        ("arm=drpo,lr=0.1", "there is no setting 'lr'; known: arm, learning_rate"),
        ("arm=drpo,learning_rate=fast", "learning_rate needs a value of type float, not 'fast'"),
        ("arm=drpo,learning_rate=0.1,fixed=yes", "fixed needs a value of type truth, not 'yes'"),
        ("arm=drpo,learning_rate=0.1,staleness=9", "staleness must be 0 to 4, not 9"),
        ("arm=grpo,learning_rate=0.1,threshold=0.1", "the arm 'grpo' has no threshold"),
        ("arm=drpo,learning_rate=-1", "learning_rate must be finite and at least 0"),
    ],
)
def test_bad_cells_say_what_would_be_right(text, message):
    with pytest.raises(BadInput, match=message):
        cells.parse(text)


SETUP = Setup()


def row(learning_rate, final, arm="drpo", **condition):
    """A row whose seeds start at 0.2 and end at `final`."""
    seeds = len(SETUP.seeds)
    values = np.resize(np.asarray(final, float), seeds)
    return Row(Cell(arm, learning_rate, **condition), np.full(seeds, 0.2), values, {})


def test_the_collapse_rate_is_interpolated_between_the_rates():
    results = Results([row(0.01, 0.4), row(0.1, 0.0), row(1.0, 0.1)])
    rate = results.collapse_rate(Cell("drpo", 0.01))
    assert rate.estimate.mean == pytest.approx(10**-1.5) and rate.sign == ""
    never = Results([row(0.01, 0.4), row(0.1, 0.3)]).collapse_rate(Cell("drpo", 0.01))
    assert never.estimate.mean == pytest.approx(0.1) and never.sign == "≥ "
    always = Results([row(0.01, 0.1), row(0.1, 0.1)]).collapse_rate(Cell("drpo", 0.01))
    assert always.estimate.mean == pytest.approx(0.01) and always.sign == "≤ "


def test_a_rate_that_is_too_small_to_learn_is_no_collapse():
    results = Results([row(0.001, 0.19), row(0.01, 0.4), row(0.1, 0.0)])
    rate = results.collapse_rate(Cell("drpo", 0.01))
    assert rate.estimate.mean == pytest.approx(10**-1.5) and rate.sign == ""


def test_a_ratio_of_collapse_rates_says_in_which_direction_it_is_a_bound():
    half, one = np.log(0.5), 0.0
    inside, above, below = (CollapseRate((half,) * 12, (b,) * 12) for b in (0, 1, -1))
    base = CollapseRate((one,) * 12, (0,) * 12)
    assert [x.over(base).sign for x in (inside, above, below)] == ["", "≥ ", "≤ "]
    assert base.over(below).sign == "≥ " and above.over(above).sign == "~ "
    assert inside.over(base).estimate.mean == pytest.approx(0.5)


def test_learning_rates_are_chosen_on_seeds_that_are_not_reported():
    tuning = len(cells.TUNING)
    better, worse = (
        np.r_[np.full(tuning, x), np.full(len(cells.REPORTED), 1 - x)] for x in (0.9, 0.1)
    )
    results = Results([row(0.01, better), row(0.1, worse)])
    assert results.chosen(Cell("drpo", 0.01)).cell.learning_rate == 0.01
    np.testing.assert_allclose(results.chosen(Cell("drpo", 0.01)).reported, 0.1)
    assert results.in_hindsight().chosen(Cell("drpo", 0.01)).cell.learning_rate == 0.1


def test_an_interval_that_contains_no_difference_refutes_no_claim():
    """DPPO is neither less stable than the surrogate nor higher than DRPO, here; then it is higher."""
    noise = np.random.default_rng(0).normal(0, 0.01, (3, len(SETUP.seeds)))
    verdicts = []
    for dppo in (0.0, 0.3):
        rows = []
        for arm, shift, e in zip(("drpo", "surrogate", "dppo_tv"), (0, 0, dppo), noise):
            for condition in (sweep.MISMATCH, sweep.STALE):
                at = [(0.003, 0.4), (0.01, 0.6 + shift), (0.3, 0.05)]
                rows += [row(rate, x + e, arm=arm, **condition) for rate, x in at]
        verdicts.append(claims.lower_but_stable(Results(rows)).verdict)
    assert verdicts == [claims.UNSEEN, claims.FAILS]


def test_the_sweep_contains_each_cell_once_and_by_name():
    planned = sweep.cells()
    assert len(set(planned)) == len(planned)
    assert [cells.parse(cell.name) for cell in planned] == planned
