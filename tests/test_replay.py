"""A run that learns from the rollouts of another run: the same bits, and errors for other files."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from drpo_jax import compare, loop, score, train
from drpo_jax.data import CharTokenizer
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import load_rollout, rollout_path, save_rollout, saved_rollouts
from drpo_jax.learner.replay import Replay, check_advantages, check_replayable
from drpo_jax.learner.rollout_checks import Limits, read_rollouts
from drpo_jax.learner.rollout_file import load_table, rollout_table, write_rollouts
from drpo_jax.loop.rollout import Rollout, replayed
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.objectives import by_token
from tests.runs import DENSE, checkpoint_bytes, killed_at, logged, odd, one_device, smallest

STEPS = 2
FIELDS = DENSE | {
    "train.steps": STEPS, "train.save_rollout_every": 1, "evaluate.problems": 1,
    "evaluate.samples": 1, "evaluate.greedy": False, "checkpoint.every": 1, "checkpoint.keep": 5,
}  # fmt: skip


def config(**fields):
    return smallest(FIELDS, **fields)


@pytest.fixture(scope="module", autouse=True)
def quick_and_rewarding(compile_quickly):
    with one_device(odd):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a run that samples and saves every rollout."""
    workdir = tmp_path_factory.mktemp("source")
    loop.train(config(), workdir)
    return workdir


def learned(workdir):
    """The records without the metrics of sampling and verification."""
    verifier = ("reward/limited", "reward/lost", "reward/retries")
    return logged(workdir, "sync/", "sampler/", *verifier)


def weights(workdir):
    return checkpoint_bytes(config(), workdir, STEPS)


@pytest.mark.slow
def test_a_replay_killed_and_resumed_makes_the_updates_of_the_run(source, tmp_path):
    files = source / "rollouts"
    with killed_at(loop.loop, "rl_step", 1):
        loop.train(config(), tmp_path, files)
    with pytest.raises(
        BadInput, match=r"learns from files \(replay.json\); --replay=DIR is missing"
    ):
        loop.train(config(), tmp_path)
    loop.train(config(), tmp_path, files)
    assert learned(tmp_path) == learned(source)
    assert weights(tmp_path) == weights(source)
    for number in (1, 2):
        ours, theirs = (load_rollout(rollout_path(d, number)) for d in (tmp_path, source))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.slow
def test_advantages_from_files_make_the_same_updates(source, tmp_path, caplog):
    """The config's own advantages would be others. Saved rollouts keep the columns of the files."""
    files = tmp_path / "files"
    files.mkdir()
    for path in saved_rollouts(source).values():
        rollout = load_rollout(path)
        rollout["file_advantage"] = by_token(rollout["advantage"]) * rollout["response_mask"]
        write_rollouts(files / f"{path.stem}.parquet", rollout_table(rollout))
    changed = config(objective__advantage="batch_norm", reward__overlong_buffer=1)
    with caplog.at_level("WARNING", "absl"):
        loop.train(changed, tmp_path / "run", files)
    assert "reward.overlong_buffer = 1: without effect" in caplog.text
    assert weights(tmp_path / "run") == weights(source)
    again = Replay.open(tmp_path / "run/rollouts", Limits.of(config()), config().train.prompts)
    assert again.advantages and str(again).endswith("rollouts, advantages included")


def test_fields_that_change_advantages_exclude_those_of_files(tmp_path):
    write_groups(tmp_path / "a.parquet", 0, 2, advantage=1.0)
    replay = Replay.open(tmp_path, LIMITS, 2)
    assert replay.advantages and not replay.per_token
    for fields, message in (
        (
            {"objective__kl": "k1", "objective__kl_coefficient": 0.1},
            "objective.kl = 'k1': it changes",
        ),
        (
            {"objective__baseline": "otb"},
            "objective.baseline = 'otb'.* set it to 'group', or remove",
        ),
        ({"train__shuffle_rewards": True}, "train.shuffle_rewards = True: it changes"),
    ):
        with pytest.raises(ValueError, match=message):
            check_advantages(config(**fields), replay.per_token)
    write_groups(tmp_path / "b.parquet", 2, 1)
    with pytest.raises(
        ValueError, match="column advantage is missing in b.parquet, but other files"
    ):
        Replay.open(tmp_path, LIMITS, 2)


def test_gspo_excludes_advantages_that_differ_within_a_response(tmp_path):
    """Its c is the derivative of the sum of J over a response only if all tokens have the same Â."""
    gspo = config(objective__name="gspo", objective__delta=None)
    for values, differ in ((1.0, False), ([1.0, 0.5], True)):
        write_groups(tmp_path / "a.parquet", 0, 2, advantage=values)
        assert Replay.open(tmp_path, LIMITS, 2).per_token == differ
    check_advantages(gspo, per_token=False)
    check_advantages(config(), per_token=True)
    with pytest.raises(ValueError, match="'gspo': it needs one advantage for all tokens of a resp"):
        check_advantages(gspo, per_token=True)


@pytest.mark.slow
def test_the_files_of_a_replay_are_those_that_it_began_with(source, tmp_path):
    """Errors come before anything is compiled."""
    files = shutil.copytree(source / "rollouts", tmp_path / "files")
    workdir = tmp_path / "run"
    Replay.open(files, Limits.of(config()), 4).claim(source_of(workdir))
    (files / "step_000002.npz").unlink()
    with pytest.raises(BadInput, match="no longer holds the files .*: step_000002.npz; restore"):
        loop.train(config(), workdir, files)
    again = shutil.copytree(source, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "2")
    with pytest.raises(BadInput, match="this run samples; resume it without --replay=DIR"):
        loop.train(config(), again, files)
    with pytest.raises(BadInput, match="routing_replay = True: rollout files do not contain"):
        loop.train(config(model__experts=2, model__experts_per_token=1, model__expert_size=32,
                          model__mlp_size=0, train__routing_replay=True), workdir, files)  # fmt: skip
    with pytest.raises(BadInput, match="'dppo_topk_tv': it needs the logprobs of the most likely"):
        loop.train(config(objective__name="dppo_topk_tv"), workdir, files)


def test_what_a_replay_cannot_do_is_said(caplog):
    with pytest.raises(ValueError, match="mine.py:steps': it rewards tokens, but rollout files"):
        values = SimpleNamespace(reward=SimpleNamespace(path="mine.py:steps"), train=config().train)
        check_replayable(values, topk=False, per_token=True)
    with caplog.at_level("WARNING", "absl"):
        check_replayable(config(train__staleness=2), topk=False, per_token=False)
    assert "train.staleness = 2: without effect, because --replay samples" in caplog.text


def source_of(workdir):
    workdir.mkdir()
    return workdir


@pytest.mark.slow
def test_score_adds_the_logprobs_of_the_model_that_sampled(source, tmp_path, capsys):
    """Checkpoint 1 sampled rollout 2, so its scores are the log π_old that the run saved."""
    path, output = rollout_path(source, 2), tmp_path / "scored.parquet"
    score.main(config(), source, str(path), str(output), step=1)
    scored, saved = read_rollouts(output), load_rollout(path)
    np.testing.assert_allclose(scored["logp"], saved["old_logp"], atol=1e-5)
    report = json.loads((tmp_path / "scored.json").read_text())
    gap = np.abs(saved["old_logp"] - saved["full_logp"])[saved["response_mask"]]
    assert report["logp"]["mean"] == pytest.approx(gap.mean(), rel=1e-3)
    assert report["tokens"] == sum(entry["tokens"] for entry in report["by_mu"]) == len(gap)
    assert report["worst"][0]["id"] in saved["tokens"]
    assert "effective sample size" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_writes_a_table_and_a_page(source, tmp_path, capsys):
    """Checkpoint 2 has moved away from the weights that sampled rollout 1."""
    path, output = rollout_path(source, 1), tmp_path / "page.html"
    names = ["surrogate", "drpo", "grpo"]
    compare.main(config(objective__delta=1e-3), source, str(path), names, str(output))
    page = output.read_text()
    assert "default-src 'none'" in page and "<script" not in page
    entries = json.loads((tmp_path / "page.json").read_text())["objectives"]
    assert [entry["name"] for entry in entries] == names
    for entry in entries:
        assert entry["cosines"][entry["name"]] == pytest.approx(1, abs=1e-5)
        assert entry["norm"] > 0 and f"<code>{entry['name']}</code>" in page
        shares = [v for k, v in entry["metrics"].items() if k.endswith("/gradient")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    plain, drpo, _ = entries
    assert plain["cosines"]["drpo"] == drpo["cosines"]["surrogate"] < 1
    assert drpo["hyper"]["delta"] == 1e-3 and plain["metrics"]["weight/corrected"] == 0
    assert "cos surrogate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rollouts, objectives, output, message",
    [
        (None, None, None, "--rollouts=FILE is missing"),
        ("rollouts.parquet", None, "page.txt", "must be a file that ends with .html"),
        ("rollouts.parquet", ["drop"], None, "Did you mean 'drpo'"),
        ("rollouts.parquet", ["drpo", "drpo"], None, "'drpo' is listed twice"),
        ("rollouts.parquet", ["dppo_topk_tv"], None, "needs the logprobs of the most likely tokens"),
        ("nowhere.parquet", None, None, "nowhere.parquet: no such file"),
    ],
)  # fmt: skip
def test_wrong_flags_of_compare_are_named(tmp_path, rollouts, objectives, output, message):
    with pytest.raises(BadInput, match=message):
        compare.main(config(), tmp_path, rollouts, objectives, output)


@pytest.mark.parametrize("command", [score, compare])
def test_single_responses_are_named_before_a_model_is_loaded(tmp_path, command):
    path = tmp_path / "single.parquet"
    write_groups(path, 0, 2, size=1)
    output = tmp_path / ("page.html" if command is compare else "scored.parquet")
    with pytest.raises(BadInput, match="use 'batch_norm'"):
        command.main(config(), tmp_path, str(path), output=str(output))


def test_wrong_flags_of_score_are_named(tmp_path):
    with pytest.raises(BadInput, match="--rollouts=FILE is missing"):
        score.main(config(), tmp_path, None, "scored.parquet")
    with pytest.raises(
        BadInput, match="--output=scored.npz: must be a file that ends with .parquet"
    ):
        score.main(config(), tmp_path, "rollouts.parquet", "scored.npz")
    with pytest.raises(BadInput, match="--output=FILE is missing"):
        score.main(config(), tmp_path, "rollouts.parquet", None)
    with pytest.raises(BadInput, match="--output=a.parquet: is the file to score; name another"):
        score.main(config(), tmp_path, "a.parquet", "a.parquet")


# ------------------------------------------------------------------------------- the stream of groups


def write_groups(path, first, count, size=2, **columns):
    """Writes groups of `size` responses, numbered from `first`, which is the reward, too.

    Args:
      columns: values of further columns, for every token or for each of the two tokens of a response.
    """
    numbers = np.repeat(np.arange(first, first + count), size)
    rollout = {
        "group": numbers,
        "tokens": np.full((len(numbers), 4), 5, np.int32),
        "prompt_lengths": np.full(len(numbers), 2, np.int32),
        "response_lengths": np.full(len(numbers), 2, np.int32),
        "full_logp": np.full((len(numbers), 2), -1, np.float32),
        "version": np.zeros((len(numbers), 2), np.int32),
        "reward": numbers.astype(np.float32),
        "finished": np.ones(len(numbers), bool),
    }
    for name, value in columns.items():
        rollout[f"file_{name}"] = np.full((len(numbers), 2), value)
    write_rollouts(path, rollout_table(rollout))


LIMITS = Limits(vocab_size=10, prompt_tokens=3, response_tokens=4, samples=2)


def test_steps_take_the_groups_in_turn_and_begin_anew(tmp_path):
    write_groups(tmp_path / "b.parquet", 3, 2)
    write_groups(tmp_path / "a.parquet", 0, 3)
    replay = Replay.open(tmp_path, LIMITS, prompts=2)
    groups = [replay.rollout(step, 2)["reward"][::2].tolist() for step in range(5)]
    assert groups == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    assert replay.rollout(1, 2)["tokens"].shape == (4, 7)
    assert str(replay) == f"5 groups in 2 files of {tmp_path}"


def test_a_directory_that_is_no_replay_is_said(tmp_path):
    with pytest.raises(ValueError, match="no such directory; --replay=DIR takes"):
        Replay.open(tmp_path / "nowhere", LIMITS, 2)
    (tmp_path / "rollouts").mkdir()
    with pytest.raises(
        ValueError, match=r"no file \*.parquet or \*.npz; did you mean .*/rollouts\?"
    ):
        Replay.open(tmp_path, LIMITS, 2)
    write_groups(tmp_path / "a.parquet", 0, 3)
    with pytest.raises(ValueError, match="have 3 groups, but a step learns from train.prompts = 4"):
        Replay.open(tmp_path, LIMITS, 4)
    (tmp_path / "step_000001.npz").touch()
    with pytest.raises(ValueError, match=r"it contains \*.npz and \*.parquet; keep one kind"):
        Replay.open(tmp_path, LIMITS, 2)


def test_a_file_that_changes_during_the_run_is_named(tmp_path):
    for name in "abc":
        write_groups(tmp_path / f"{name}.parquet", 0, 1)
    replay = Replay.open(tmp_path, LIMITS, prompts=1)
    write_groups(tmp_path / "a.parquet", 7, 1)
    with pytest.raises(
        ValueError, match="a.parquet: the file changed while the run was reading it"
    ):
        replay.rollout(0, 1)


def test_a_replayed_rollout_has_what_a_step_needs(tmp_path):
    write_groups(tmp_path / "a.parquet", 0, 4, advantage=0.5)
    ours = config(train__samples=2, train__micro_batch=4, reward__overlong_buffer=1)
    limits = Limits.of(ours)
    run = SimpleNamespace(
        config=ours,
        tokenizer=CharTokenizer(),
        replay=Replay.open(tmp_path, limits, ours.train.prompts),
        interrupts=SimpleNamespace(check=lambda: None),
    )
    rollout = replayed(run, 1, PhaseTimer())
    count, width = 8, limits.prompt_tokens + limits.response_tokens
    responses = rollout.responses
    assert responses.tokens.shape == (count, width) and responses.mask().sum() == 2 * count
    assert responses.full_logp.shape == (count, limits.response_tokens)
    assert rollout.reward.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.added.shape == (count,) and len(rollout.problems) == count
    assert rollout.loss_mask is None and (rollout.advantage[responses.mask()] == 0.5).all()
    again = Rollout.restore(rollout.state())
    np.testing.assert_array_equal(again.advantage, rollout.advantage)
    np.testing.assert_array_equal(again.responses.version, responses.version)
    saved = save_rollout(tmp_path, 2, **rollout.arrays(run.tokenizer, 2), behavior_logp=0)
    np.testing.assert_array_equal(read_rollouts(saved, limits)["tokens"], responses.tokens)


def test_explaining_a_batch_takes_no_replay(tmp_path):
    with pytest.raises(BadInput, match="--explain_batch samples .*; remove --replay"):
        train.main(config(), tmp_path, explained=True, replay="files")


def test_the_readers_of_one_table_agree(tmp_path):
    write_groups(tmp_path / "a.parquet", 0, 3)
    content = (tmp_path / "a.parquet").read_bytes()
    assert len(load_table(content, "a.parquet")) == len(
        read_rollouts(tmp_path / "a.parquet")["group"]
    )
