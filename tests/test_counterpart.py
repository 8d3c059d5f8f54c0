"""--compare: the same run with another objective, from the same warm start, and the table of both."""

import pytest

from drpo_jax import config as C
from drpo_jax import loop, train
from drpo_jax.config import changed_fields, objective_hyper
from drpo_jax.counterpart import counterpart, paired_table
from drpo_jax.errors import BadInput
from tests.runs import killed_at, logged, odd, one_device, smallest


def differing(config, other):
    """Returns {field: value in `other`} for the fields that differ."""
    ours, theirs = C.flatten(config), C.flatten(other)
    return {f: theirs[f] for f in theirs if ours[f] != theirs[f]}


def test_only_the_objective_and_the_source_of_the_warm_start_differ(tmp_path):
    config = smallest()
    other, directory = counterpart(config, tmp_path / "run", "surrogate")
    assert directory == tmp_path / "run" / "compare" / "surrogate"
    assert differing(config, other) == {
        "objective.name": "surrogate",
        "objective.delta": None,
        "data.init_from": str(tmp_path / "run"),
    }


def test_the_warm_start_is_named_alike_however_the_workdir_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spellings = (tmp_path / "run", (tmp_path / "run").relative_to(tmp_path))
    ours, theirs = (counterpart(smallest(), path, "grpo")[0] for path in spellings)
    assert ours == theirs


@pytest.mark.parametrize("fields", [{"sft__steps": 0}, {"data__init_from": "runs/warm"}])
def test_a_run_without_a_warm_start_of_its_own_lends_none(fields, tmp_path):
    config = smallest(**fields)
    other, _ = counterpart(config, tmp_path, "surrogate")
    assert other.data.init_from == config.data.init_from


@pytest.mark.parametrize(
    ("fields", "name", "hyper"),
    [
        # Both boundaries are probabilities, and 0.01 is not the default.
        ({"delta": 0.01}, "dppo_tv", {"delta": 0.01}),
        # This boundary is a KL divergence.
        ({"delta": 0.01}, "dppo_kl", {"delta": 0.05}),
        ({"delta": 0.15}, "ipo", {"delta": 0.1}),
        ({"delta": None, "threshold": "released"}, "mask_drpo", {"delta": 12.5}),
        ({"delta": None, "threshold": "released"}, "dppo_tv", {"delta": 0.15}),
        ({"delta": None, "name": "grpo", "epsilon_high": 0.28}, "cispo", {"epsilon_high": 0.28}),
        ({"delta": None, "name": "grpo", "epsilon_high": 0.28}, "spo", {"epsilon": 12.5}),
    ],
)
def test_hyperparameters_carry_over_where_they_mean_the_same(fields, name, hyper, tmp_path):
    config = smallest({f"objective.{field}": value for field, value in fields.items()})
    resolved = objective_hyper(counterpart(config, tmp_path, name)[0])
    assert resolved | hyper == resolved


def test_an_objective_that_defines_its_aggregation_gets_it(tmp_path):
    other, _ = counterpart(smallest(), tmp_path, "gspo")
    assert other.objective.aggregation == "seq-mean-token-mean"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "surogate",
            {},
            "--compare=surogate: Unknown objective 'surogate'. Did you mean 'surrogate'",
        ),
        ("drpo", {}, "--compare=drpo: the run has this objective already"),
        ("cppo", {"objective.delta": 0.01}, r"--compare=cppo: .*\s.*delta_b \(0.02\) must not"),
    ],
)
def test_a_wrong_objective_is_an_error_before_anything_runs(name, fields, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        train.main(smallest(fields), tmp_path / "run", compare=name)
    assert not (tmp_path / "run").exists()


def test_one_update_is_explained_for_one_objective(tmp_path):
    with pytest.raises(BadInput, match="remove --compare"):
        train.main(smallest(), tmp_path, explained=True, compare="grpo")


def test_the_table_pairs_evaluations_and_the_steps_since_the_one_before():
    drpo = [
        {"step": 0, "eval/avg": 0.25},
        {"step": 1, "reward/mean": 0.3, "weight/corrected": 0.01, "policy/shift": 0.002},
        {"step": 2, "reward/mean": 0.5, "weight/corrected": 0.03, "policy/shift": 0.004}
        | {"eval/avg": 0.5},
        {"step": 3, "reward/mean": 0.9, "eval/avg": 0.9},
    ]
    grpo = [
        {"step": 0, "eval/avg": 0.25},
        {"step": 2, "reward/mean": 0.2, "weight/masked": 0.02, "weight/corrected": float("nan")}
        | {"eval/avg": 0.625, "policy/shift": 0.001},
        {"step": 3, "reward/mean": 0.9},
    ]
    table = paired_table({"drpo": drpo, "grpo": grpo}, 4)
    title, *lines = [line.split() for line in table.splitlines()]
    assert title == "step avg@4 % reward corrected % masked % |π−µ|".split()
    assert lines == [
        line.split()
        for line in (
            "0 drpo 25.0 – – – –",
            "grpo 25.0 – – – –",
            "drpo − grpo +0.0 – – – –",
            "2 drpo 50.0 0.400 2.00 – 0.0030",
            "grpo 62.5 0.200 – 2.00 0.0010",
            "drpo − grpo -12.5 +0.200 – – +0.0020",
        )
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


@pytest.mark.slow
def test_either_run_resumes_and_both_are_those_of_their_own_commands(
    tmp_path, compile_quickly, capsys
):
    fields = dict(
        train__steps=2, checkpoint__every=1, evaluate__every=1, evaluate__greedy=False,
        evaluate__precision="sampler", train__save_rollout_every=0,
    )  # fmt: skip
    config, workdir, directory = smallest(**fields), tmp_path / "a", tmp_path / "a/compare/dppo_tv"
    with one_device(odd):
        with killed_at(loop.loop, "rl_step", 1):
            train.main(config, workdir, compare="dppo_tv")
        assert not directory.exists()
        loop.train(config, workdir)
        with killed_at(loop.loop, "rl_step", 1):
            train.main(config, workdir, compare="dppo_tv")
        assert [r["step"] for r in logged(directory)] == [0, 1]
        train.main(config, workdir, compare="dppo_tv")
        out = capsys.readouterr().out
        loop.train(config, tmp_path / "b")
        alone = smallest(**fields, objective__name="dppo_tv", data__init_from=str(workdir))
        loop.train(alone, tmp_path / "c")
    assert logged(workdir) == logged(tmp_path / "b")
    assert logged(directory) == logged(tmp_path / "c")
    assert not changed_fields(directory, alone)
    assert not (directory / "sft").exists()
    runs = {"drpo": logged(workdir), "dppo_tv": logged(directory)}
    assert runs["drpo"][0] == runs["dppo_tv"][0] and runs["drpo"][2] != runs["dppo_tv"][2]
    assert paired_table(runs, config.evaluate.samples) in out
