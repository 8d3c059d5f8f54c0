"""Objectives from files: accepted and rejected forms, and the findings of the checks."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import HYPERPARAMETERS, OBJECTIVES, token_terms
from drpo_jax.objectives.by_path import load_objective
from drpo_jax.objectives.check import check, main, random_tokens

FILE = '''
import jax.numpy as jnp
from drpo_jax.objectives import Hyperparameter, Objective, Token

HYPERPARAMETERS = {"shift": Hyperparameter("σ", "Moves the ratio.", above=-2.0)}

def plain(logp, behavior_logp, advantage, gain=1.5, soft=False, shift=0.0):
    """J = g·r·Â."""
    r = jnp.exp(logp - behavior_logp + shift)
    return gain * r * advantage, gain * r * advantage, gain * jnp.exp(shift) * jnp.ones_like(r)

def by_token(t, old_logp, delta=0.3):
    return t.r * t.A, t.r * t.A, jnp.ones_like(t.r)

row = Objective(by_token, boundary="probability", aggregation="token-mean")

def scaled(logp, behavior_logp, advantage):
    r = jnp.exp(logp - behavior_logp)
    return r * advantage, 2 * r * advantage, 2 * jnp.ones_like(r)

def centred(t):
    w = 1 - t.A.mean() / t.A
    return t.r * t.A * w, t.r * t.A * w, w

def branches(t):
    return (t.r, t.r, t.r) if t.A > 0 else (t.A, t.A, t.A)

def pair(t): return t.r, t.r
def scalar(t): return t.r.sum(), t.r, t.r
def unknown_array(t, mu_logp): return t.r, t.r, t.r
def half(t, topk_logp): return t.r, t.r, t.r
def keywords(t, **hyper): return t.r, t.r, t.r
def arguments(advantage, logp): return logp, logp, logp
def text(t, mode="soft"): return t.r, t.r, t.r
def zero(t, level=0.0): return t.r, t.r, t.r
def flag(t, delta=True): return t.r, t.r, t.r
def kl(t, name=1.0): return t.r, t.r, t.r
number = 3
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of objectives; the tables are restored after the test."""
    monkeypatch.setattr("drpo_jax.objectives.by_path._loaded", {})
    monkeypatch.setattr("drpo_jax.objectives.by_path._own", set())
    before = dict(OBJECTIVES), dict(HYPERPARAMETERS)
    path = tmp_path / "objectives.py"
    path.write_text(FILE)
    yield path
    for table, rows in zip((OBJECTIVES, HYPERPARAMETERS), before):
        table.clear()
        table.update(rows)


def test_a_function_a_token_function_and_a_row_become_rows(file):
    assert load_objective(f"{file}:plain").name == "plain"
    row = OBJECTIVES["plain"]
    assert row.hyper == {"gain": 1.5, "soft": False, "shift": 0.0} and row.arrays == ()
    assert row.summary == "J = g·r·Â." and HYPERPARAMETERS["shift"].holds(-1.0)
    load_objective(f"{file}:row")
    assert OBJECTIVES["row"].arrays == ("old_logp",)
    assert OBJECTIVES["row"].aggregation == "token-mean"


def test_log_probabilities_and_tokens_yield_the_same(file):
    load_objective(f"{file}:plain")
    tokens = random_tokens().astype(np.float32)[:3]
    ours = token_terms("surrogate", *tokens)
    for mine, theirs in zip(token_terms("plain", *tokens, gain=1.0), ours):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    on_policy = token_terms("plain", tokens[0], tokens[0], tokens[2], gain=1.0)[1]
    np.testing.assert_array_equal(on_policy, tokens[2])


def test_a_ratio_that_overflows_has_no_influence(file):
    load_objective(f"{file}:plain")
    terms = token_terms("plain", jnp.float32(0.0), jnp.float32(-jnp.inf), jnp.float32(1.0))
    assert np.isfinite(terms).all() and not terms[1] and not terms[2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("plane", "does not define 'plane'; did you mean 'plain'"),
        ("pair", r"must return \(J, c, w\), .* it returns 2 values"),
        ("scalar", r"must return \(J, c, w\), each of the shape .* they are float32\[\], float32"),
        ("branches", "fails on arrays: ValueError: The truth value"),
        ("unknown_array", "Unknown array 'mu_logp'. .* A hyperparameter needs a default"),
        ("half", "must take both or none of behavior_topk_logp and topk_logp"),
        ("keywords", r"must name its arguments, without \*hyper"),
        ("arguments", "must begin with logp, behavior_logp, advantage, or be one Token t"),
        ("text", "mode = 'soft' must be a number, True, False or None"),
        ("zero", "level = 0.0 must be positive; HYPERPARAMETERS"),
        ("flag", "delta is a float in the table, so its default cannot be True"),
        ("kl", "already has fields name"),
        ("number", "must be a function or an Objective, not 3"),
    ],
)
def test_what_cannot_be_an_objective_is_refused(file, name, message):
    before = dict(OBJECTIVES), dict(HYPERPARAMETERS)
    with pytest.raises(ValueError, match=message):
        load_objective(f"{file}:{name}", reserved=("name",))
    assert (OBJECTIVES, HYPERPARAMETERS) == before


def test_names_of_the_table_are_taken(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def drpo(t): return t.r, t.r, t.r\n")
    with pytest.raises(ValueError, match="the table has the objective 'drpo'"):
        load_objective(f"{path}:drpo")


def test_hyperparameters_are_described_in_a_dictionary(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def mine(t): return t.r, t.r, t.r\nHYPERPARAMETERS = ['width']\n")
    with pytest.raises(ValueError, match="HYPERPARAMETERS must be a dictionary, not"):
        load_objective(f"{path}:mine")


def test_a_changed_file_replaces_its_row(file):
    load_objective(f"{file}:plain")
    file.write_text(FILE.replace("gain=1.5", "gain=2.5"))
    load_objective(f"{file}:plain")
    assert OBJECTIVES["plain"].hyper["gain"] == 2.5


def failures(name):
    return [outcome.check for outcome in check(name) if outcome.problem]


def test_the_checks_find_what_is_wrong(file):
    for name in ("plain", "scaled", "centred"):
        load_objective(f"{file}:{name}")
    assert failures("plain") == []
    assert failures("scaled") == ["c = ∂J/∂logp, by autodiff in float64"]
    assert {
        "J, c and w are finite on hostile tokens",
        "masked tokens have no influence",
        "rows have no influence on each other",
        "responses of a row have no influence on each other",
    } < set(failures("centred"))


def test_the_command_prints_a_table_and_its_status(file, capsys):
    assert main([f"{file}:plain", "drpo"]) == 0
    printed = capsys.readouterr().out
    assert "hyperparameters: gain = 1.5" in printed and printed.count("all checks hold") == 2
    assert main([f"{file}:scaled"]) == 1
    assert "FAILS\n    at log π = " in capsys.readouterr().out
    assert main(["dpro"]) == 2
    assert "Did you mean 'drpo'" in capsys.readouterr().err
    assert main([]) == 2


def test_tracing_starts_no_devices(file):
    program = (
        "from drpo_jax.objectives.by_path import load_objective\n"
        f"load_objective({f'{file}:plain'!r})\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
