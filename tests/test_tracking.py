"""Weights & Biases: one run per workdir across all starts, with config, metrics and summary."""

import json
import os
import subprocess
import sys
import types

import pytest

from drpo_jax import metrics as M
from drpo_jax.config import default_config
from drpo_jax.errors import BadInput


class Project:
    """A fake wandb package that records its inputs."""

    def __init__(self):
        self.starts, self.records, self.axes, self.finished = [], [], [], 0
        self.summary = {}

    def init(self, **settings):
        self.starts.append(settings)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.finished += 1


@pytest.fixture
def project(monkeypatch):
    fake = Project()
    module = types.ModuleType("wandb")
    module.init = fake.init
    module.__spec__ = types.SimpleNamespace()  # What `find_spec` returns of a loaded module.
    monkeypatch.setitem(sys.modules, "wandb", module)
    return fake


def config(seed=0):
    config = default_config()
    config.log.wandb, config.seed = "drpo", seed
    return config


def write(workdir, first, last, seed=0):
    with M.MetricLogger(workdir, 4, first, console=False, config=config(seed)) as log:
        for step in range(first, last + 1):
            log.log(step, {"loss": 1.0 / (1 + step), "weight/w_min": float("inf")})
    log.end_tracking()


def test_it_receives_config_metrics_and_summary(project, tmp_path):
    write(tmp_path / "run", 0, 2)
    [start] = project.starts
    assert (start["project"], start["name"], start["resume"]) == ("drpo", "run", "allow")
    assert start["config"]["train.steps"] == 200 and start["dir"] == str(tmp_path / "run")
    assert project.records == [{"step": s, "loss": 1.0 / (1 + s)} for s in range(3)]
    assert project.axes == [("step", None), ("*", "step")]
    assert project.summary == {"step": 2, "loss": 1 / 3} and project.finished == 1


def test_a_resumed_run_keeps_its_id(project, tmp_path):
    write(tmp_path, 0, 2)
    write(tmp_path, 2, 4, seed=5)  # Another config: fields that may change on resume.
    write(tmp_path / "sft", 0, 1)
    ids = [start["id"] for start in project.starts]
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": ids[0]}
    (tmp_path / "wandb.json").unlink()
    write(tmp_path, 0, 1)
    assert project.starts[-1]["id"] == ids[0]  # A function of the run.
    assert project.starts[2]["name"] == f"{tmp_path.name}/sft"


def test_other_processes_and_runs_without_a_project_do_not_start_it(project, tmp_path, monkeypatch):
    with M.MetricLogger(tmp_path, 4, console=False, config=default_config()):
        pass
    monkeypatch.setattr("drpo_jax.metrics.log.multihost.is_main", lambda: False)
    write(tmp_path, 0, 1)
    assert project.starts == [] and not (tmp_path / "wandb.json").exists()


def test_a_missing_package_and_a_refusal_say_what_to_do(project, tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(BadInput, match="api_key not configured; run `wandb login`, set WANDB_MODE"):
        write(tmp_path, 0, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="log.wandb = 'drpo'.*pip install wandb"):
        M.check_tracking("drpo")
    M.check_tracking("")


@pytest.mark.slow
def test_the_package_itself_records_an_offline_run(tmp_path):
    """Starts processes of the real package, if it is installed."""
    pytest.importorskip("wandb")
    code = (
        "import sys, pathlib; from drpo_jax import metrics as M; from drpo_jax.config import "
        "default_config; config = default_config(); config.log.wandb = 'drpo'\n"
        "with M.MetricLogger(pathlib.Path(sys.argv[1]), 4, console=False, config=config) as log:\n"
        "    log.log(1, {'loss': 0.5})\n"
        "log.end_tracking()"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )  # fmt: skip
    [record] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert record.name == f"run-{identity}.wandb" and b"loss" in record.read_bytes()
