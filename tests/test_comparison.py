"""The settings of a comparison of objectives, without a gradient."""

import math

import numpy as np
import pytest

from drpo_jax import comparison
from drpo_jax.comparison import (
    BINS,
    Judgment,
    comparable,
    file_advantages,
    hyper_of,
    left_out,
    table,
    to_json,
)
from drpo_jax.config import default_config, resolve
from drpo_jax.inspection import judge
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.reporting.comparison import SHADES, comparison_page


def config(**fields):
    config = default_config()
    config.objective.update(fields)
    return resolve(config)


def test_all_objectives_that_files_have_the_arrays_for_are_compared():
    names = comparable(None, config(name="grpo"))
    assert names[0] == "grpo"
    assert set(OBJECTIVES) - set(names) == {"dppo_topk_tv", "dppo_topk_kl", "pdm"}
    token = np.full((2, 3), -1, np.float32)
    rollout = {
        "response_mask": token < 0, "loss_mask": token < 0, "logp": token - 0.1,
        "behavior_logp": token, "old_logp": token, "advantage": np.array([1, -1], np.float32),
    }  # fmt: skip
    for name in names:
        judged = judge(rollout, name, **hyper_of(name, config()))
        assert np.isfinite(judged["coefficient"]).all(), name


def test_tokens_without_a_loss_are_in_no_metric():
    """They have c = w = 0, which would count as masked."""
    rng = np.random.default_rng(0)
    names = ("logp", "behavior_logp", "advantage")
    arrays = {name: rng.normal(-2, 0.5, (2, 4)).astype(np.float32) for name in names}
    mask = np.ones((2, 4), bool)
    part = {name: array[:, :2] for name, array in arrays.items()}
    part |= {"response_mask": mask[:, :2], "loss_mask": mask[:, :2]}
    whole = arrays | {"response_mask": mask, "loss_mask": mask & (np.arange(4) < 2)}
    ours, alone = (comparison._metrics(judge(r, "drpo")) for r in (whole, part))
    assert ours == pytest.approx(alone, rel=1e-6, nan_ok=True) and ours["weight/masked"] == 0


def test_hyperparameters_apply_where_the_boundary_is_of_the_same_kind():
    ours = config(name="drpo", delta=0.01)
    assert hyper_of("drpo", ours)["delta"] == hyper_of("dppo_tv", ours)["delta"] == 0.01
    assert hyper_of("dppo_kl", ours) == OBJECTIVES["dppo_kl"].hyper  # nats
    assert hyper_of("grpo", ours) == OBJECTIVES["grpo"].hyper
    assert hyper_of("cppo", ours)["delta_b"] <= hyper_of("cppo", ours)["delta"] == 0.01


def test_fields_that_a_comparison_leaves_out_are_said():
    assert left_out(config()) == ""
    ours = config(baseline="otb", entropy_bonus=0.1)
    assert left_out(ours) == "objective.baseline = 'otb', objective.entropy_bonus = 0.1"


def test_one_response_to_a_problem_has_no_advantage_in_its_group():
    file = {"group": np.arange(3), "reward": np.array([0, 1, 1], np.float32)}
    with pytest.raises(ValueError, match="use 'batch_norm'"):
        file_advantages(file, config())
    assert file_advantages(file, config(advantage="batch_norm")).shape == (3,)
    own = np.ones((3, 2), np.float32)
    assert file_advantages(file | {"advantage": own}, config()) is own


def judgment(name, norm, cosine):
    metrics = {shade: 0.25 for shade in SHADES}
    metrics |= {"weight/mean": 0.9, "weight/coefficient_mean": math.nan}
    metrics |= {f"by_mu/{b}/{part}": 1 / 7 for b in BINS for part in ("tokens", "gradient")}
    hyper = {"delta": 0.15, "delta_low": None, "directional": True, "off": False}
    return Judgment(name, hyper, norm, metrics, {"drpo": cosine, "a<b": cosine})


def test_the_page_and_the_table_state_the_judgments():
    judgments = [judgment("drpo", 2.0, 0.5), judgment("a<b", 0.0, math.nan)]
    page = comparison_page(judgments, {"model": "runs/<x>"})
    assert "a&lt;b" in page and "runs/&lt;x&gt;" in page and "<x>" not in page
    assert "0.5000" in page and "delta 0.15, directional" in page and "<script" not in page
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in page
    text = table(judgments)
    assert "25.00 %" in text and "cos drpo" in text and "Σ|c| by µ" in text
    first, second = to_json(judgments)
    assert first["metrics"]["weight/coefficient_mean"] is None
    assert second["cosines"]["drpo"] is None


def test_named_objectives_keep_their_order():
    assert comparable(["spo", "drpo"], config()) == ["spo", "drpo"]


def test_gspo_needs_one_advantage_per_response():
    everything, rest = (comparable(None, config(), per_token) for per_token in (False, True))
    assert set(everything) - set(rest) == {"gspo"}
    with pytest.raises(ValueError, match="'gspo' needs one advantage for all tokens of a response"):
        comparable(["drpo", "gspo"], config(), per_token=True)
