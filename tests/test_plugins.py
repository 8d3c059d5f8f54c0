"""Plug-ins: how they are found, and how configs, command lines and runs use them."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from ml_collections import FrozenConfigDict

from drpo_jax import cli, plugins
from drpo_jax import config as C
from drpo_jax.config.workdir import claim_workdir
from drpo_jax.counterpart import counterpart
from drpo_jax.errors import BadInput
from drpo_jax.listing import LISTS, main
from drpo_jax.objectives import HYPERPARAMETERS, OBJECTIVES
from drpo_jax.parallel import multihost
from drpo_jax.reporting.runs import objective_text
from drpo_jax.rewards import REWARDS
from drpo_jax.run import Run
from tests.smallest import get_config

ROOT = Path(__file__).parents[1]
OBJECTIVE = '''
import jax.numpy as jnp

def gained(logp, behavior_logp, advantage, gain=1.5):
    """J = g·r·Â."""
    r = jnp.exp(logp - behavior_logp)
    return gain * r * advantage, gain * r * advantage, gain * jnp.ones_like(r)
'''
REWARD = '''
def short(prompt, response, answer):
    """The response is short."""
    return float(len(response) < 4)

def broken(prompt, response, answer):
    return None

def tokens(prompt, response, answer, tokens):
    return 1.0
'''


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A reward and an objective in a working directory; the tables are restored after the test."""
    monkeypatch.setattr("drpo_jax.objectives.by_path._loaded", {})
    monkeypatch.setattr("drpo_jax.objectives.by_path._own", set())
    monkeypatch.setattr("drpo_jax.rewards.by_path._loaded", {})
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(REWARD)
    Path("objectives.py").write_text(OBJECTIVE)
    before = [(table, dict(table)) for table in (OBJECTIVES, HYPERPARAMETERS, REWARDS)]
    yield tmp_path
    for table, rows in before:
        table.clear()
        table.update(rows)


def own(**changes):
    config = get_config()
    config.objective.delta = None
    config.reward.path, config.objective.path = "mine.py:short", "objectives.py:gained"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


# ------------------------------------------------------------------------------ finding and loading


def test_a_file_and_a_module_are_loaded_once(tmp_path, monkeypatch):
    (tmp_path / "once.py").write_text("import time\nborn = time.time_ns()\nclass Row: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in (f"{tmp_path}/once.py:born", "once:born"):
        plugin = plugins.find(path)
        assert plugin.load() == pickle.loads(pickle.dumps(plugin)).load()
        assert plugin.name == "born" and re.fullmatch("[0-9a-f]{16}", plugin.hash)
    row = plugins.find(f"{tmp_path}/once.py:Row").load()
    assert pickle.loads(pickle.dumps(row())).__class__ is row


def test_another_process_executes_the_source_that_was_found(tmp_path):
    path = tmp_path / "value.py"
    path.write_text("value = 1\n")
    pickled = pickle.dumps(plugins.find(f"{path}:value"))
    path.write_text("value = 2\n")
    program = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).load())"
    done = subprocess.run([sys.executable, "-c", program], input=pickled, capture_output=True)
    assert done.stdout.split() == [b"1"]


@pytest.mark.parametrize(
    "path, message",
    [
        ("mine", "'mine' must be FILE.py:NAME or MODULE:NAME, such as my_rewards.py:judge"),
        ("mine.py:", "must be FILE.py:NAME"),
        ("mime.py:short", "mime.py: no such file or directory"),
        ("mine.py:sort", "does not define 'sort'; did you mean 'short'?"),
        ("mine:short", "there is no Python module 'mine'; did you mean mine.py:short?"),
        ("no_module:short", "there is no Python module 'no_module'; install it"),
        ("fails.py:f", "fails.py, line 2: ZeroDivisionError: division by zero"),
        ("syntax.py:f", "syntax.py, line 1: SyntaxError"),
        ("package.module:f", "package.module:f: ZeroDivisionError: division by zero"),
        ("leaves.py:f", "leaves.py, line 1: SystemExit: 0"),
    ],
)
def test_what_cannot_be_loaded_is_said(files, monkeypatch, path, message):
    monkeypatch.syspath_prepend(files / "lib")
    Path("lib/package").mkdir(parents=True)
    Path("lib/package/__init__.py").write_text("1 / 0\n")
    Path("fails.py").write_text("x = 0\n1 / x\n")
    Path("syntax.py").write_text("def f(:\n")
    Path("leaves.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        plugins.find(path).load()


# ------------------------------------------------------------------------------ config and workdir


def test_a_config_with_plugins_resolves(files):
    config = C.resolve(own())
    assert (config.reward.name, config.objective.name) == ("short", "gained")
    assert config.objective.gain == 1.5 and len(config.objective.source) == 16
    assert C.resolve(config) == config
    assert C.objective_summary(config).startswith("gained, gain = 1.5")
    assert C.resolve(own(objective__gain=3.0)).objective.gain == 3.0
    assert C.resolve(get_config()).reward.source == ""


@pytest.mark.parametrize(
    "changes, explicit, message",
    [
        (dict(reward__path="mine.py:sort"), (), "reward.path = 'mine.py:sort': .* 'sort'; did you"),
        (dict(objective__gain=-1.0), (), "objective.gain = -1.0: must be positive"),
        (
            dict(objective__gian=1.0),
            (),
            "objective.gian is not a field: did you mean objective.gain",
        ),
        (dict(objective__name="grpo"), ("objective.name",), "'grpo', objective.path = .* only one"),
        (dict(reward__path=3), (), "reward.path = 3: must be text"),
    ],
)
def test_wrong_settings_name_the_field(files, changes, explicit, message):
    values = C.flatten(own()) | {k.replace("__", "."): v for k, v in changes.items()}
    nested = {}
    for field, value in values.items():
        section, _, leaf = field.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    with pytest.raises(BadInput, match=message):
        C.resolve(nested, explicit)


def test_a_changed_source_must_be_accepted(files):
    claim_workdir(files / "run", C.resolve(own()))
    old = C.run_config(files / "run").reward.source
    Path("mine.py").write_text(REWARD + "\n# changed\n")
    changed = C.resolve(own())
    new = changed.reward.source
    message = f"reward.source: '{old}' -> '{new}'.*--config.train.accept_source={new} to continue"
    with pytest.raises(BadInput, match=re.compile(message, re.DOTALL)):
        claim_workdir(files / "run", changed)
    with pytest.raises(BadInput, match="accept_source"):
        claim_workdir(files / "run", C.resolve(own(train__accept_source=old)))
    accepted = C.resolve(own(train__accept_source=f"{old},{new}"))
    assert C.changed_fields(files / "run", accepted)["reward.source"] == [old, new]
    claim_workdir(files / "run", accepted)
    claim_workdir(files / "run", changed)


def test_another_plugin_is_not_a_changed_source(files):
    claim_workdir(files / "run", C.resolve(own()))
    with pytest.raises(BadInput, match="reward.path: 'mine.py:short' -> ''") as error:
        claim_workdir(files / "run", C.resolve(own(reward__path="")))
    assert "accept_source" not in str(error.value)


def test_a_list_of_a_file_without_a_name_says_what_is_missing(files):
    with pytest.raises(BadInput, match="'mine.py' must be FILE.py:NAME"):
        main(["rewards", "mine.py"])


def test_a_run_is_read_without_its_plugins(files):
    """Exports and reports do not execute the plug-ins of a config.json."""
    claim_workdir(files / "run", C.resolve(own()))
    for table in (OBJECTIVES, REWARDS):
        table.pop("gained", None), table.pop("short", None)
    Path("objectives.py").unlink(), Path("mine.py").unlink()
    config = C.run_config(files / "run")
    assert config.objective.gain == 1.5
    text = objective_text(C.flatten(json.loads((files / "run/config.json").read_text())))
    assert text == f"gained, gain = 1.5 (objectives.py:gained, {config.objective.source})"


# ------------------------------------------------------------------------------ command line and run


def parsed(monkeypatch, *args):
    """Returns the config of a command line."""
    command = ["train", *args, "--workdir=run"]
    monkeypatch.setattr(sys, "argv", command)  # ml_collections reads overrides there.
    values = flags.FlagValues()
    config, _, _ = cli.define_flags(values)
    cli.parse_flags(command, values)
    return config.value


def test_hyperparameters_of_a_plugin_are_flags(files, monkeypatch):
    config, gain = f"--config={ROOT / 'tests/smallest.py'}", "--config.objective.gain=2.0"
    with pytest.raises(BadInput, match="objective.gain=2.0: there is no such field"):
        parsed(monkeypatch, config, gain)
    path = "--config.objective.path=objectives.py:gained"
    assert parsed(monkeypatch, config, path, gain).objective.gain == 2.0
    with pytest.raises(BadInput, match="objective.path = 'objectives.py:gaines': .* mean 'gained'"):
        parsed(monkeypatch, config, "--config.objective.path=objectives.py:gaines")


def test_a_config_file_may_name_a_plugin(files, monkeypatch):
    Path("conf.py").write_text(
        "from tests.smallest import get_config as smallest\n"
        "def get_config():\n"
        "    config = smallest()\n"
        "    config.objective.path = 'objectives.py:gained'\n"
        "    return config\n"
    )
    config = parsed(monkeypatch, "--config=conf.py", "--config.objective.gain=2.0")
    assert config.objective.gain == 2.0


def test_lists_show_a_plugin(files, capsys):
    main(["objectives", "objectives.py:gained"])
    assert capsys.readouterr().out == "gained  gain=1.5\n    J = g·r·Â.\n"
    main(["rewards", "mine.py:short"])
    assert capsys.readouterr().out == "short\n    The response is short.\n"
    assert set(LISTS) == {"fields", "metrics", "objectives", "rewards", "variants"}


def test_a_reward_is_tried_before_a_run_starts(files, tmp_path):
    Run.create(C.resolve(own()), tmp_path / "run")
    with pytest.raises(
        BadInput, match="reward.path = 'mine.py:broken': a call for the first problem"
    ):
        Run.create(C.resolve(own(reward__path="mine.py:broken")), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train__shuffle_rewards=True), "shuffle_rewards = True"),
        (
            dict(objective__path="", objective__name="gspo",
                 objective__aggregation="seq-mean-token-mean"),
            "objective.name = 'gspo'",
        ),
    ],
)  # fmt: skip
def test_rewards_of_tokens_exclude_what_needs_those_of_responses(files, tmp_path, changes, message):
    config = C.resolve(own(reward__path="mine.py:tokens", **changes))
    with pytest.raises(BadInput, match=f"{message} .* 'mine.py:tokens' rewards tokens"):
        Run.create(config, tmp_path / "run")


def test_hosts_must_have_the_same_source(files, tmp_path, monkeypatch):
    def gather(name, **arrays):
        parts = [arrays] if name == "config" else [arrays, {"source": "0" * 16, "host": "other"}]
        return [{k: SimpleNamespace(item=lambda v=v: v) for k, v in part.items()} for part in parts]

    config = FrozenConfigDict(C.resolve(own()))
    monkeypatch.setattr(multihost, "gather", gather)
    with pytest.raises(
        BadInput, match="the source differs between hosts: .* 0000000000000000 on other"
    ):
        Run.create(config, tmp_path / "run")


def test_the_counterpart_of_a_run_with_an_objective_of_ones_own(files):
    """Its recorded config is readable without the plug-in, too, whose fields then do not exist."""
    config = C.resolve(own(reward__path=""))
    assert config.objective.gain == 1.5
    other, _ = counterpart(config, files, "drpo")
    assert (other.objective.name, other.objective.path, other.objective.source) == ("drpo", "", "")
    assert other.objective.delta == 0.15
    text = C.to_json(other).replace('"gain": null', '"unloaded": null')
    assert C.from_json(text).objective.name == "drpo"
    with pytest.raises(BadInput, match="objective.unloaded is not a field"):
        C.from_json(text.replace('"unloaded": null', '"unloaded": 1.0'))
