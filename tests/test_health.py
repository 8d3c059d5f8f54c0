"""Each sign of trouble is reported once, with numbers and a field to change; healthy runs have none."""

import json
import math
import re
from pathlib import Path

import pytest

from drpo_jax import metrics as M
from drpo_jax.config import default_config, flatten
from drpo_jax.metrics import health

# `drpo train --config=configs/tiny.py`, seed 0, numbers rounded to three digits.
HEALTHY = Path(__file__).parent / "fixtures" / "healthy.jsonl"
CONFIG = flatten(default_config())


def healthy():
    return [json.loads(line) for line in HEALTHY.read_text().splitlines()]


def sick(name):
    """A history in which one sign appears after step 20."""
    records = healthy()[:60]
    for record in records[20:]:
        if name == "entropy":
            record |= {"entropy": 0.001, "reward/mean": 0.6}
        elif name == "signal":
            record["reward/informative_groups"] = 0.03
        elif name == "length":
            record["response/truncated"] = 0.4
        elif name == "ratio":
            record["policy/ratio"] = 1.3
        elif name == "sample size":
            record["policy/effective_sample_size"] = 0.3
        elif name == "mismatch":
            record["mismatch/logp"] = 0.2
    return records


def test_a_healthy_run_has_no_findings():
    assert M.diagnose(healthy(), CONFIG) == []


@pytest.mark.parametrize("name", health.SICKNESSES)
def test_each_sickness_is_found_once(name):
    [finding] = M.diagnose(sick(name), CONFIG)
    assert finding.name == name and 20 < finding.step <= 60
    fields = re.findall(r"\b([a-z]+\.[a-z_]+)\b", finding.text)
    assert re.search(r"\d", finding.text)
    assert [field for field in fields if field in CONFIG], "it names a field to change"
    assert all(field in CONFIG for field in fields)


def test_parts_of_the_mismatch_that_are_meant_are_no_finding():
    """Also between two comparisons: with noise, only the real part says that something is wrong."""
    records = healthy()
    for number, record in enumerate(records):
        record.pop("mismatch/logp", None)
        if number % 5 == 0:
            record |= {"mismatch/logp": 0.01 * number, "mismatch/logp_real": 0.001}
    assert M.diagnose(records, CONFIG) == []


@pytest.mark.parametrize("name", health.SICKNESSES)
def test_one_bad_record_is_no_finding(name):
    records, bad = healthy()[:60], sick(name)[40]
    records[40] = bad | {"step": 40}
    assert M.diagnose(records, CONFIG) == []


def test_a_resumed_run_does_not_repeat_itself():
    records = sick("length")
    whole = M.diagnose(records, CONFIG)
    [finding] = whole
    state = M.Health(CONFIG)
    before = [f for record in records[:40] for f in state.add(record)]
    resumed = M.Health(CONFIG)
    for record in records[:40]:
        resumed.add(record)
    after = [f for record in records[40:] for f in resumed.add(record)]
    assert before + after == whole and finding.step < 40


@pytest.mark.parametrize(
    "reward, advice",
    [(0.0, "never solved"), (0.8, "always solved"), (0.97, "use harder ones (data.problems)")],
)
def test_the_advice_on_equal_rewards_depends_on_the_reward(reward, advice):
    records = [r | {"reward/mean": reward} for r in sick("signal")]
    assert advice in M.diagnose(records, CONFIG)[0].text


def test_groups_that_dynamic_sampling_dropped_had_no_signal():
    records = healthy()[:40]
    for record in records[20:]:
        record |= {"reward/informative_groups": 1.0, "sampling/drawn": 64, "sampling/dropped": 62}
    assert [finding.name for finding in M.diagnose(records, CONFIG)] == ["signal"]


def test_a_solved_task_may_lose_its_entropy():
    records = [record | {"reward/mean": 0.99} for record in sick("entropy")]
    assert M.diagnose(records, CONFIG) == []


def test_records_without_metrics_are_read():
    records = [{"step": i, "entropy": math.nan} for i in range(20)]
    assert M.diagnose(records, CONFIG) == []


def test_the_log_warns_once_also_after_a_resume(tmp_path, caplog):
    records = sick("ratio")

    def logged(first, last):
        caplog.clear()
        with M.MetricLogger(tmp_path, 60, first_step=first, console=False) as log:
            for record in records[first:last]:
                log.log(record["step"], {k: v for k, v in record.items() if k != "step"})
        return [text for text in caplog.messages if "π/µ" in text]

    [text] = logged(0, 30)
    assert text.startswith("step 22: the mean ratio π/µ is 1.3") and "train.epochs" in text
    assert logged(30, 40) == []
