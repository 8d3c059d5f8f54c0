"""The loop end to end: resuming, random streams, control experiments, files, early stops."""

import json
import re
import shutil
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax import data, loop, problems, rewards, train
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.data import CharTokenizer
from drpo_jax.errors import BadInput, TrainingStopped
from drpo_jax.learner import record
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.lock import hold
from drpo_jax.loop.rollout import Example
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.metrics import describe, read_metrics, read_starts
from drpo_jax.objectives import advantages, optimal_token_baseline, token_objective
from drpo_jax.programs import Programs
from drpo_jax.reporting.explain import explain
from drpo_jax.run import SHUFFLE
from tests.runs import (
    DENSE,
    check_resume,
    checkpoint_bytes,
    killed_at,
    logged,
    one_device,
    smallest,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quick_and_rewarding(compile_quickly):
    """One device (sharding has tests of its own), and a reward that an untrained model earns, too."""

    def reward(prompt, text, answer):
        return float(len(text) % 2 or text == f"#{answer}")

    with one_device(reward):
        yield


def problem_file(directory, lines=10):
    path = directory / "problems.jsonl"
    records = ({"prompt": f"{i}+{i}=", "answer": str(2 * i), "id": i} for i in range(lines))
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run: 4 warm-start updates, 4 rollout steps."""
    workdir = tmp_path_factory.mktemp("whole")
    before, after = loop.train(smallest(), workdir)
    assert (before["step"], after["step"]) == (0, 4)
    return workdir


@pytest.fixture(scope="module")
def other(whole, tmp_path_factory):
    """The workdir of two steps from the same warm start: problems from a file, shuffled rewards,
    rescored µ, and a boundary that no token reaches."""
    workdir = tmp_path_factory.mktemp("other")
    settings = smallest(
        data__problems=str(problem_file(workdir)), data__init_from=str(whole), train__steps=2,
        train__shuffle_rewards=True, objective__behavior="rescored", objective__delta=12.5,
        evaluate__precision="sampler", train__save_rollout_every=1,
    )  # fmt: skip
    loop.train(settings, workdir, profile="2")
    return workdir


def test_a_profile_has_the_phases_of_its_step(other):
    [path] = other.glob("profile/**/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    phases = {"sync", "sample", "reward", "score", "update"}
    assert phases <= {event.name for event in events}
    steps = [event for event in events if event.name == "step"]
    assert [dict(event.stats)["step_num"] for event in steps] == [2]
    assert any("policy_update" in event.name or "update" in event.name for event in events)


@pytest.fixture
def own_programs(monkeypatch):
    """Every start compiles its programs, as in a new process."""
    monkeypatch.setattr("drpo_jax.run.Programs", Programs)
    monkeypatch.setattr("drpo_jax.sampler.engine.partial", partial)


@pytest.mark.usefixtures("own_programs")
def test_a_killed_run_resumes_to_the_same_metrics(whole, tmp_path):
    kills = (
        (loop.warm_start, "demonstration_batch", 2),
        (loop.loop, "rl_step", 0),
        (loop.loop, "rl_step", 3),
    )
    for module, name, step in kills:
        with killed_at(module, name, step):
            loop.train(smallest(), tmp_path)
    # The checkpoint is that of step 2; step 3 was logged and is computed again.
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    loop.train(smallest(), tmp_path)
    assert [r["step"] for r in logged(whole)] == [0, 1, 2, 3, 4]
    assert logged(tmp_path) == logged(whole)
    assert logged(tmp_path / "sft") == logged(whole / "sft")
    for step in (1, 3):
        paths = (rollout_path(d, step) for d in (whole, tmp_path))
        a, b = (load_rollout(path) for path in paths)
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_killed_run_by_tokens_resumes_to_the_same_bits(tmp_path):
    settings = smallest(
        DENSE, train__steps=2, train__micro_batch=0, train__micro_tokens=64,
        train__save_rollout_every=1, checkpoint__every=1,
    )  # fmt: skip
    check_resume(settings, tmp_path)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(whole, tmp_path, caplog):
    """The run continues from the one before, and ends as if nothing had happened."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "checkpoints" / "4" / "default" / "_METADATA").write_text("{}")
    before, after = loop.train(smallest(), workdir)
    assert (before["step"], after["step"]) == (0, 4)
    assert "step 4 in" in caplog.text and "the run continues from step 2" in caplog.text
    assert logged(workdir) == logged(whole)
    assert checkpoint_bytes(smallest(), workdir, 4) == checkpoint_bytes(smallest(), whole, 4)


def test_a_damaged_warm_start_is_named_or_made_again(whole, tmp_path, caplog):
    source = shutil.copytree(whole, tmp_path / "source")
    (source / "sft" / "checkpoints" / "4" / "SHA256SUMS").unlink()
    with pytest.raises(BadInput, match=r"step 4 in .*source/sft/checkpoints is damaged"):
        loop.train(smallest(data__init_from=str(source)), tmp_path / "other")
    assert (source / "sft" / "checkpoints" / "4").is_dir()
    # The warm start is made again from the same config, and RL starts over.
    shutil.rmtree(source / "checkpoints")
    loop.train(smallest(), source)
    assert "the run continues from step 3" in caplog.text
    assert logged(source) == logged(whole) and logged(source / "sft") == logged(whole / "sft")


def test_missing_records_are_said(whole, tmp_path, caplog, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    before, after = loop.train(smallest(), workdir)  # It is complete.
    assert before == {"step": 0} and after["step"] == 4 and "eval/avg" in after
    shutil.rmtree(workdir / "checkpoints" / "4")
    train.main(smallest(), workdir)
    assert "1 of 3 records are missing (steps 0)" in caplog.text
    out = capsys.readouterr().out
    assert "metrics.jsonl lacks the evaluation of step 0" in out and "held-out accuracy" not in out


def test_a_workdir_in_use_is_refused(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with hold(workdir), pytest.raises(BadInput, match="two runs cannot share a workdir"):
        loop.train(smallest(), workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    files = {path: content for path, content in files.items() if path.exists()}
    with hold(workdir), pytest.raises(BadInput, match="two runs cannot share a workdir"):
        loop.train(smallest(), workdir)
    assert files == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_evaluation_and_the_warm_start_elsewhere_do_not_change_training(whole, tmp_path):
    loop.train(smallest(evaluate__every=1, data__init_from=str(whole)), tmp_path)
    records, expected = logged(tmp_path), logged(whole)
    assert all("eval/avg" in r for r in records)
    for mine, theirs in zip(records, expected, strict=True):
        assert {k: mine[k] for k in theirs} == theirs
    assert not (tmp_path / "sft").exists()
    # The same weights sample the same responses, whatever was sampled before.
    assert records[0]["eval/avg"] == expected[0]["eval/avg"]


def test_a_saved_rollout_matches_its_documentation(whole):
    saved = load_rollout(rollout_path(whole, 1))
    settings = smallest()
    documented = re.findall(
        r"^    ([a-z_][a-z_, ]*?)  +\w+ ?(?:\[(.*)\])?", record.__doc__, re.MULTILINE
    )
    saved_pieces = len(load_rollout(rollout_path(whole, 1))["piece_ids"])
    sizes = {"N": 16, "R": 23, "T": 23 + 6, "U": saved_pieces}
    names = [(name, shape) for group, shape in documented for name in group.split(", ")]
    assert {name for name, _ in names} == set(saved)
    for name, shape in names:
        assert saved[name].shape == tuple(sizes[s] for s in shape.split(", ") if s), name
    mask, lengths = saved["response_mask"], saved["response_lengths"]
    np.testing.assert_array_equal(mask.sum(1), lengths)
    hyper = {"delta": settings.objective.delta}
    _, c = token_objective(
        "drpo", saved["logp"], saved["behavior_logp"], saved["advantage"][:, None], **hyper
    )
    np.testing.assert_allclose(np.where(mask, saved["coefficient"], 0), np.where(mask, c, 0), 1e-5)
    ratio = np.exp(saved["logp"] - saved["behavior_logp"])
    c = saved["weight"] * ratio * saved["advantage"][:, None]
    np.testing.assert_allclose(saved["coefficient"][mask], c[mask], rtol=1e-4, atol=1e-6)
    assert (saved["weight"][mask] < 0).any()  # later mini-batches are off-policy
    np.testing.assert_allclose(
        saved["advantage"],
        advantages(settings.objective.advantage, saved["reward"], settings.train.samples),
    )
    decode = CharTokenizer().decode
    for row in range(16):
        start = saved["prompt_lengths"][row]
        assert decode(saved["tokens"][row, :start]) == saved["prompt"][row]
        response = saved["tokens"][row, start : start + lengths[row]]
        assert decode(response) == saved["response"][row]
        assert saved["finished"][row] == (response[-1] == CharTokenizer.eos_id)
        assert not saved["tokens"][row, start + lengths[row] :].any()
    assert (saved["step"], len(set(saved["prompt"]))) == (1, 4)


def test_nothing_is_corrected_beyond_every_boundary(other, whole):
    assert [r["weight/corrected"] for r in logged(other)[1:]] == [0, 0]
    assert all(r["weight/corrected"] > 0 for r in logged(whole)[1:])
    assert all(r["policy/shift"] > 0 for r in logged(other)[1:])


def test_rescored_logprobs_are_the_learners(other, whole):
    for workdir, rescored in ((other, True), (whole, False)):
        saved = load_rollout(rollout_path(workdir, 1))
        # The mini-batch that is updated first still has unchanged weights.
        first = loop.learn.mini_batches(smallest(), 0, 0)[0]
        mask = saved["response_mask"][first]
        gap = np.abs(saved["logp"] - saved["behavior_logp"])[first][mask].max()
        assert (gap < 1e-5) == rescored
        same = np.allclose(saved["behavior_logp"], saved["sampled_logp"], atol=1e-6)
        assert same != rescored


def test_everything_at_once_packed_or_not(tmp_path):
    """Top-k masks, rescored µ, masked correction, KL to the reference and entropy bonus together."""
    warm = dict(data__init_from=str(tmp_path / "rows"))
    layouts = {
        "rows": dict(train__micro_batch=2),
        "packed": dict(train__micro_batch=2, train__pack=True) | warm,
        "by tokens": dict(train__micro_batch=0, train__micro_tokens=64) | warm,
    }
    results = {}
    for layout, fields in layouts.items():
        settings = smallest(
            DENSE, sft__steps=4, train__steps=1, train__epochs=2, **fields,
            objective__name="dppo_topk_tv", objective__behavior="rescored",
            objective__correction="mis", objective__correction_floor=0.98,
            objective__correction_cap=1.05, objective__kl="k3", objective__kl_coefficient=0.1,
            objective__entropy_bonus=0.01,
        )  # fmt: skip
        assert settings.sampler.top_logprobs == 20
        loop.train(settings, tmp_path / layout)
        saved = load_rollout(rollout_path(tmp_path / layout, 1))
        results[layout] = logged(tmp_path / layout)[1], saved
    ours, saved = results.pop("rows")
    for other, others in results.values():
        for name in ours.keys() - {"batch/padding"}:
            np.testing.assert_allclose(other[name], ours[name], rtol=1e-3, atol=1e-6, err_msg=name)
        for name in ("logp", "coefficient", "weight", "entropy", "old_logp"):
            np.testing.assert_allclose(
                others[name], saved[name], rtol=1e-3, atol=1e-4, err_msg=name
            )
    lengths = saved["prompt_lengths"] + saved["response_lengths"]
    assert ours["batch/padding"] == pytest.approx(1 - lengths.mean() / 29)
    assert all(
        0 <= other["batch/padding"] <= ours["batch/padding"] for other, _ in results.values()
    )
    mask = saved["response_mask"]
    ratio = np.exp(saved["old_logp"] - saved["sampled_logp"])[mask]
    assert (saved["logp"][mask] < 0).all()  # dropped by the correction or not
    kept = (ratio >= 0.98) & (ratio <= 1.05)
    assert 0 < kept.mean() < 1
    assert ours["correction/dropped"] == pytest.approx(1 - kept.mean())
    assert ours["correction/mean"] == pytest.approx((ratio * kept).mean(), rel=1e-4)
    assert ours["mismatch/ratio"] == pytest.approx(ratio.mean(), rel=1e-5)
    assert 0 < ours["policy/kl_reference"] < 1  # the reference is the initial model
    assert not saved["coefficient"][mask][~kept].any() and saved["coefficient"][mask][kept].any()


def test_overlong_filtering_and_the_token_baseline(tmp_path, monkeypatch):
    """One step: truncated responses count in the baseline and carry no loss, and Â is per token."""
    calls = []

    def recorded(*arguments):
        calls.append(arguments)
        return optimal_token_baseline(*arguments)

    monkeypatch.setattr(loop.learn, "optimal_token_baseline", recorded)
    settings = smallest(
        train__overlong_filtering=True, objective__baseline="otb", train__steps=1, sft__steps=0,
        sampler__max_response_length=12, train__save_rollout_every=1, log__mismatch_every=1,
        data__digits=1, evaluate__samples=1, evaluate__greedy=False, train__pack=True,
    )  # fmt: skip
    run = loop.Run.create(settings, tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.programs.restart(loop.initial_model(run))
        _, measured, _ = loop.rl_step(run, loop.Collector(), state, 0)
    saved = load_rollout(rollout_path(tmp_path, 1))
    sampled, finished = saved["response_mask"], saved["finished"]
    assert 0 < finished.mean() < 1
    np.testing.assert_array_equal(saved["loss_mask"], sampled & finished[:, None])
    assert measured["response/filtered"] == pytest.approx(1 - finished.mean())
    ((reward, logp, squares, mask, samples, rho),) = calls
    np.testing.assert_array_equal(reward, saved["reward"])
    np.testing.assert_array_equal(logp, saved["old_logp"])
    np.testing.assert_array_equal(mask, sampled)
    assert samples == 4 and rho == 1.0
    p = np.exp(logp)[sampled]
    assert (squares[sampled] >= p**2).all() and (squares[sampled] < 1).all()
    expected = optimal_token_baseline(reward, logp, squares, sampled, 4)
    np.testing.assert_array_equal(saved["advantage"], expected)
    assert np.ptp(expected, axis=1).max() > 0  # Â differs between the tokens of a response.
    for name in ("logp", "coefficient", "weight", "entropy"):
        assert saved[name][saved["loss_mask"]].any() and not saved[name][~saved["loss_mask"]].any()
    gap = np.exp(saved["old_logp"]) - np.exp(saved["sampled_logp"])
    assert measured["mismatch/shift"] == pytest.approx(
        abs(gap[saved["loss_mask"]]).mean(), rel=1e-3
    )
    page = explain(saved, run.tokenizer, run.config)
    assert "ended with a stop token" in page
    filtered = explain(saved, run.tokenizer, run.config, int(np.argmin(finished)))
    assert "This response carries no loss." in filtered


def test_a_curriculum_continues_where_it_was(tmp_path, monkeypatch):
    """Problems of two files, selected by pass rates: a run killed after step 2 equals a whole one."""
    for name, sign in ("a", "+"), ("b", "-"):
        lines = [{"prompt": f"{i}{sign}1=", "answer": f"{i}", "id": f"p{i}"} for i in range(1, 6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings = smallest(
        data__problems=f"{tmp_path}/a.jsonl:1,{tmp_path}/b.jsonl:1", data__window_low=0.5,
        data__window_high=0.7, data__window_rest=2, evaluate__problems=2, sft__steps=0,
        evaluate__samples=1, evaluate__greedy=False, evaluate__precision="sampler",
        checkpoint__every=1, checkpoint__keep=4,
    )  # fmt: skip
    batches, original = [], data.Curriculum.batch

    def recorded(self, step, count):
        batches.append([p.id for p in original(self, step, count)])
        return original(self, step, count)

    monkeypatch.setattr(data.Curriculum, "batch", recorded)
    loop.train(settings, tmp_path / "run")
    before, whole = [*batches], logged(tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    del batches[:]
    loop.train(settings, tmp_path / "run")
    assert batches == before[2:] and logged(tmp_path / "run") == whole
    plain = data.ProblemStream(problems.load(settings, CharTokenizer()).train, settings.seed)
    assert before != [[p.id for p in plain.batch(step, 4)] for step in range(4)]


def test_a_filtered_anchor_and_a_penalty_in_the_reward(whole, tmp_path, monkeypatch):
    settings = smallest(
        data__init_from=str(whole), train__steps=1, sampler__top_p=0.9, objective__name="minirl",
        objective__delta=None, objective__behavior="sampler_filtered", objective__kl="k1",
        objective__kl_coefficient=0.5,
    )  # fmt: skip
    seen = []
    original = loop.learn.reward_penalty

    def recorded(mu, reference, mask):
        seen.append((mu, reference, original(mu, reference, mask)))
        return seen[0][2]

    monkeypatch.setattr(loop.learn, "reward_penalty", recorded)
    loop.train(settings, tmp_path)
    saved = load_rollout(rollout_path(tmp_path, 1))
    mask = saved["response_mask"]
    np.testing.assert_array_equal(saved["behavior_logp"], saved["sampled_logp"])
    log_ratio = np.where(mask, saved["behavior_logp"] - saved["old_logp"], 0)
    # k1 compares full softmaxes: it includes the effect of FP8, but not the mass that top-p drops.
    mu, reference, penalty = seen[0]
    np.testing.assert_allclose(reference, saved["old_logp"], atol=1e-5)  # the first policy
    assert (mu <= saved["sampled_logp"] + 1e-6).all()
    assert abs(penalty.mean()) < 0.3 * log_ratio.sum(1).mean()
    expected = advantages("dr_grpo", saved["reward"] - 0.5 * penalty, settings.train.samples)
    np.testing.assert_allclose(saved["advantage"], expected, atol=1e-5)
    # π/π_old is 1 in the first mini-batch, so nothing is clipped: c = min(π/µ, 5)·Â.
    first = loop.learn.mini_batches(settings, 0, 0)[0]
    ratio = np.minimum(np.exp(-log_ratio), 5)[first][mask[first]]
    advantage = np.broadcast_to(expected[:, None], mask.shape)[first][mask[first]]
    coefficient = saved["coefficient"][first][mask[first]]
    np.testing.assert_allclose(coefficient, ratio * advantage, rtol=1e-3, atol=1e-4)


def test_the_mismatch_is_measured_when_it_is_due(whole):
    assert ["mismatch/kl" in r for r in logged(whole)] == [False, True, False, True, False]
    saved = load_rollout(rollout_path(whole, 3))
    mask = saved["response_mask"]
    shift = abs(np.exp(saved["old_logp"]) - np.exp(saved["behavior_logp"]))[mask]
    assert logged(whole)[3]["mismatch/shift"] == pytest.approx(shift.mean(), rel=1e-4)
    assert 0 < shift.mean() < 0.05  # FP8 weights in the sampler
    for row, text in enumerate(saved["response"]):
        assert "".join(record.pieces(saved, row)) == text


def test_shuffled_rewards_are_permuted_over_the_rollout(other):
    settings, moved = smallest(), False
    for step in (0, 1):
        saved = load_rollout(rollout_path(other, step + 1))
        reward = saved["reward"]
        assert set(reward) == {0, 1} and logged(other)[step + 1]["reward/mean"] == reward.mean()
        np.testing.assert_array_equal(reward, [len(r) % 2 for r in saved["response"]])
        rng = np.random.default_rng([settings.seed, step, SHUFFLE, 1])
        shuffled = rng.permutation(reward)
        assert sorted(shuffled) == sorted(reward)
        expected = advantages(settings.objective.advantage, shuffled, settings.train.samples)
        np.testing.assert_allclose(saved["advantage"], expected)
        moved |= bool((shuffled != reward).any())
    assert moved


def test_problems_from_a_file(other):
    heldout = loop.Run.create(smallest(data__problems=str(other / "problems.jsonl")), other).heldout
    trained = {p for step in (1, 2) for p in load_rollout(rollout_path(other, step))["prompt"]}
    assert len(heldout) == 6 and len(trained) == 4
    assert trained.isdisjoint(p.prompt for p in heldout)


def test_a_run_records_its_environment(whole):
    (start,) = read_starts(whole)
    assert start["step"] == 0 and start["jax"] == jax.__version__


def test_every_metric_of_a_run_is_in_the_catalogue(whole, other):
    records = [r for d in (whole, whole / "sft", other) for r in read_metrics(d)]
    names = {name for record in records for name in record} - {"step"}
    assert len(names) > 50
    assert [name for name in sorted(names) if not describe(name).definition] == []


def test_bad_problem_files_cost_nothing(tmp_path):
    path = problem_file(tmp_path)
    good = path.read_text()
    malformed = good.replace('"answer": "6"', '"answer": [6]', 1)
    too_long = good.replace('"3+3="', '"3000+3="', 1)
    cases = {
        malformed: r"problems.jsonl, line 4: field 'answer' is \[6\], but must be a string",
        too_long: r"problems.jsonl: 1 of 10 prompts .*max_prompt_length = 6 .* problem '3' with 7:",
        good.partition("\n")[0] + "\n": r"has 1 problems, .* 4 per rollout .* are held out",
        "": r"problems.jsonl: the file is empty",
        None: r"data.problems = .*problems.jsonl': there is no such file",
    }
    for text, message in cases.items():
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(BadInput, match=message):
            loop.train(smallest(data__problems=str(path)), tmp_path / "run")
        assert not (tmp_path / "run").exists()  # a corrected config can use the directory


def test_a_missing_warm_start_is_an_error(tmp_path, whole):
    missing = smallest(data__init_from=str(tmp_path / "typo"))
    with pytest.raises(BadInput, match="typo.*no checkpoint of a warm start below it"):
        loop.initial_model(loop.Run.create(missing, tmp_path))
    assert not (tmp_path / "typo").exists()
    wider = smallest(data__init_from=str(whole), model__vocab_size=48)
    with pytest.raises(BadInput, match=r"model.embed: expected \(48, 32\), .* has \(32, 32\)"):
        loop.initial_model(loop.Run.create(wider, tmp_path))


def test_non_finite_updates_are_skipped_and_stop_the_run(whole, tmp_path, monkeypatch, caplog):
    settings = smallest(
        data__init_from=str(whole),
        evaluate__precision="sampler",
        train__steps=9,
        train__max_skipped=3,
    )
    original, skipped = loop.rl_step, []

    def poisoned(run, collector, state, step, first):
        """From step 2 on, one weight is NaN."""
        if step == 2:
            head = state.model.lm_head[...].at[0, 0].set(jnp.nan)
            flat, tree = jax.tree.flatten(state)
            place = [i for i, leaf in enumerate(flat) if leaf is state.model.lm_head[...]]
            flat[place[0]] = head
            state = jax.tree.unflatten(tree, flat)
        before = int(state.updates)
        state, *rest = original(run, collector, state, step, first)
        skipped.append((int(state.skipped), int(state.updates) - before))
        return state, *rest

    monkeypatch.setattr(loop.loop, "rl_step", poisoned)
    with pytest.raises(TrainingStopped) as error:
        loop.train(settings, tmp_path)
    assert skipped == [(0, 2), (0, 2), (2, 0), (4, 0)]
    message = str(error.value)
    assert message.startswith("step 4: the last 4 updates had a non-finite loss or gradient")
    assert "The checkpoint of step 2 is now 2.unconfirmed-1: no update after" in message
    assert f"continues from step 0 in {tmp_path}" in message and "train.max_skipped = 3" in message
    assert "2 update(s) in a row skipped" in caplog.text
    assert (tmp_path / "checkpoints" / "2.unconfirmed-1").is_dir()
    run = loop.Run.create(settings, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [0]
        state = checkpoints.restore(0, run.programs.abstract_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_run_with_a_wild_learning_rate_goes_on_with_a_lower_one(whole, tmp_path):
    """Its first update is finite and leaves weights with which no loss is finite."""
    wild = dict(data__init_from=str(whole), checkpoint__every=1, checkpoint__keep=1)
    with pytest.raises(TrainingStopped, match="lower --config.optimizer.learning_rate"):
        loop.train(smallest(**wild, optimizer__learning_rate=1e30), tmp_path)
    assert loop.train(smallest(**wild), tmp_path)[1]["step"] == 4
    assert logged(tmp_path) == logged(whole)
    first, second = read_starts(tmp_path)
    assert first["changes"] == {}
    assert second["changes"] == {"optimizer.learning_rate": [1e30, 3e-3]}


def test_reward_shaping():
    settings = smallest(
        reward__format=0.5, reward__overlong_buffer=4, sampler__max_response_length=40
    )
    texts = [r"so \boxed{1}", "so 1", "so 1"]
    added = loop.verdicts.shaping(settings, texts, np.array([30, 38, 40]))
    np.testing.assert_allclose(added, [0.5, -0.5, -1.0])
    assert loop.verdicts.shaping(smallest(), texts, np.array([30, 38, 40])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("parity", ["warn", "stop", "off"])
def test_sampler_and_learner_are_compared_on_the_first_rollout(parity, tmp_path, caplog, capsys):
    fields = dict(train__steps=1, sft__steps=0, evaluate__greedy=False, sampler__parity=parity)
    fields |= dict(evaluate__precision="sampler")
    if parity == "warn":  # the bound allows for the recipe's rounding of the weights
        loop.train(smallest(**fields), tmp_path / "a")
        assert re.search(r"first rollout: mean .* over \d+ tokens \(bound", capsys.readouterr().out)
    fields["sampler__parity_bound"] = 1e-7
    if parity == "stop":
        with pytest.raises(TrainingStopped, match="bound of the mean: 1e-07.*routing_replay"):
            loop.train(smallest(**fields), tmp_path / "b")
    else:
        loop.train(smallest(**fields), tmp_path / "b")
    assert ("bound of the mean: 1e-07" in caplog.text) == (parity == "warn")


def test_replayed_routes_bring_sampler_and_learner_together(whole, tmp_path):
    """FP8 rollouts change routes. With replay, only the rounding of the experts' matmuls remains."""
    gaps, changed = {}, {}
    for replay in (False, True):
        fields = dict(train__steps=1, evaluate__greedy=False, train__routing_replay=replay)
        fields |= dict(log__mismatch_every=1, train__pack=True, evaluate__precision="sampler")
        fields |= dict(data__init_from=str(whole))
        loop.train(smallest(**fields), tmp_path / str(replay))
        record = logged(tmp_path / str(replay))[1]
        gaps[replay] = record["mismatch/kl"]
        changed[replay] = record.get("router/changed")
    assert changed[False] is None and 0 < changed[True] < 0.2
    assert gaps[True] < gaps[False]


def test_a_complete_run_computes_nothing(whole, monkeypatch, capsys):
    def fail(*args, **keywords):
        raise AssertionError("a complete run has nothing to compute")

    monkeypatch.setattr("drpo_jax.run.make_mesh", fail)
    monkeypatch.setattr(jax, "devices", fail)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    first, last = loop.train(smallest(), whole)
    assert (first["step"], last["step"]) == (0, 4)
    out = capsys.readouterr().out
    assert "this run is complete (step 4 of 4)" in out and "--config.train.steps=8" in out
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="holds a run with another config"):
        loop.train(smallest(seed=1), whole)


def test_the_console_begins_with_what_will_happen(tmp_path):
    settings = smallest(
        objective__delta=0.15,
        objective__kl_behavior=1e-3,
        evaluate__every=3,
        model__load_balance=0.0,
        train__dynamic_sampling=True,
        train__partial_tokens=7,
    )
    text = loop.console.introduction(loop.Run.create(settings, tmp_path))
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    model = (
        r"qwen3_moe, [\d.]+K parameters, 2 layers of 4 experts \(2 per token\), from a warm start"
    )
    assert re.match(model, lines["model"])
    assert lines["model"].endswith("from a warm start of 4 supervised updates on demonstrations")
    assert lines["objective"].startswith("drpo, δ = 0.15 (a probability")
    assert lines["objective"].endswith("; advantage dr_grpo; kl_behavior 0.001")
    assert lines["precision"] == "float32 compute, precision recipe 'rollout'"
    assert lines["rollouts"].startswith("4 of 4 prompts × 4 responses (arithmetic)")
    assert lines["groups"] == (
        "groups with equal rewards are replaced; responses get up to 7 tokens per step; "
        "at most 16 problems per step"
    )
    assert lines["updates"].startswith("2 per rollout, on 8 responses each")
    assert lines["evaluation"] == (
        "6 held-out problems, 2 sampled and 1 greedy response to each, before and after training and "
        "every 3 steps"
    )
    assert lines["devices"].startswith("1 × ") and str(tmp_path) in lines["files"]


@pytest.mark.usefixtures("own_programs")
def test_rollouts_without_mixed_rewards_are_announced_once(tmp_path, monkeypatch, capsys):
    exact = lambda prompt, text, answer: float(text == f"#{answer}")  # noqa: E731
    monkeypatch.setitem(rewards.REWARDS, "arithmetic", exact)
    settings = smallest(DENSE, log__samples_every=2, train__steps=3, evaluate__greedy=False)
    loop.train(settings, tmp_path)
    out = capsys.readouterr().out
    notice = "no group has mixed rewards, so there is no gradient; first response (reward 0): "
    assert out.count(notice) == 1
    saved = load_rollout(rollout_path(tmp_path, 1))
    assert f"step 1: {notice}" in out
    assert repr(saved["response"][0]) in out
    assert re.findall(r"step (\d+), a sampled response with reward 0:", out) == ["2"]
    assert out.count("compiling the update") == 1
    assert out.count("evaluating the held-out problems") == 1


def test_explaining_a_run_without_its_warm_start_warns(whole, tmp_path):
    page = train.explain_batch(smallest(), tmp_path / "run")
    assert page.startswith("WARNING: the model is random, because") and "\nPROBLEM " in page
    assert not (tmp_path / "run").exists()
    page = train.explain_batch(smallest(data__init_from=str(whole)), tmp_path / "run")
    assert page.startswith("PROBLEM ")


def test_long_responses_are_shortened():
    text = loop.console.show_example(1, Example("a\nb", "x" * 1000 + "end", "3", 0.5))
    assert "with reward 0.5:" in text and len(text) < 600
    assert "    prompt    a\n              b" in text and text.splitlines()[-2].endswith("xend")


def test_the_timer_measures_phases(capsys):
    timer = PhaseTimer({"a": "compiling a"})
    for phase in ("a", "b"):
        with timer(phase):
            pass
    seconds = timer.metrics()
    assert list(seconds) == ["time/step", "time/idle", "time/a", "time/b"]
    assert seconds["time/step"] >= seconds["time/a"] + seconds["time/b"] >= 0
    with timer("a"):
        time.sleep(0.01)
    assert timer.metrics()["time/a"] >= seconds["time/a"] + 0.01
    assert capsys.readouterr().out == "compiling a\n"
