"""The report on an engine's logprobs, compared with manual calculations."""

import json

import numpy as np
import pytest

from drpo_jax.comparison import plain
from drpo_jax.config import default_config, resolve
from drpo_jax.reporting.mismatch import mismatch_report, mismatch_text

MU = np.array([[0.5, 0.005, 0.8], [0.2, 0.5, 0.5]])
PI = np.array(
    [[0.5, 0.010, 0.6], [0.2, 0.3, 0.5]]
)  # The last token of the second response is padding.
MASK = np.array([[True, True, True], [True, True, False]])


def config(**fields):
    config = default_config()
    config.update_from_flattened_dict(
        {"objective.name": "dppo_tv", "objective.delta": 0.15} | fields
    )
    return resolve(config)


def report(advantage=(1.0, -1.0), full_logp=None, loss_mask=MASK, **fields):
    rollout = {
        "tokens": np.arange(8, dtype=np.int32).reshape(2, 4),
        "prompt_lengths": np.array([1, 1]),
        "response_lengths": np.array([3, 2]),
        "response_mask": MASK,
        "loss_mask": loss_mask,
        "full_logp": np.where(MASK, np.log(MU), 0).astype(np.float32)
        if full_logp is None
        else full_logp,
        "logp": np.where(MASK, np.log(PI), 0).astype(np.float32),
    }
    return mismatch_report(
        rollout, np.array(advantage, np.float32), config(**fields), "<{}>".format
    )


def test_statistics_are_those_of_the_response_tokens():
    ratio = (PI / MU)[MASK]
    ours = report()
    assert ours["tokens"] == 5 and ours["responses"] == 2
    assert ours["ratio"]["mean"] == pytest.approx(ratio.mean(), rel=1e-5)
    assert ours["logp"]["max"] == pytest.approx(np.log(2), rel=1e-5)
    assert ours["shift"]["mean"] == pytest.approx(abs(PI - MU)[MASK].mean(), rel=1e-5)
    expected = ratio.sum() ** 2 / (5 * (ratio**2).sum())
    assert ours["effective_sample_size"] == pytest.approx(expected, rel=1e-5)
    bins = {entry["bin"]: entry for entry in ours["by_mu"] if entry["tokens"]}
    assert {name: entry["tokens"] for name, entry in bins.items()} == {
        "1e-3-0.01": 1, "0.1-0.5": 3, "0.5-0.9": 1,
    }  # fmt: skip
    assert bins["1e-3-0.01"]["ratio"] == pytest.approx(2, rel=1e-5)


def test_flips_are_the_tokens_that_the_mismatch_alone_masks():
    """DPPO drops tokens that Â pushes beyond δ: only the last token of response 2."""
    objective = report()["objective"]
    assert (objective["tokens"], objective["flipped"], objective["masked"]) == (5, 1, 1)
    assert report(advantage=(-1.0, -1.0))["objective"]["flipped"] == 2
    assert report(**{"objective.delta": 0.5})["objective"]["flipped"] == 0
    assert "no token with a loss has Â ≠ 0" in report(advantage=(0.0, 0.0))["objective"]["note"]
    assert "most likely tokens" in report(**{"objective.name": "dppo_topk_tv"})["objective"]["note"]


def test_advantages_per_token_and_tokens_without_a_loss():
    """Only the token that is masked has a loss and Â ≠ 0."""
    last = np.array([[False, False, False], [True, True, False]])
    objective = report(advantage=[[1, 1, 1], [0, -1, 0]], loss_mask=last)["objective"]
    assert (objective["tokens"], objective["flipped"], objective["masked"]) == (1, 1, 1)
    objective = report(loss_mask=last)["objective"]
    assert (objective["tokens"], objective["flipped"], objective["masked"]) == (2, 1, 1)


def test_a_correction_counts_its_tokens():
    fields = {"objective.behavior": "rescored", "objective.correction": "mis"}
    bounds = {"objective.correction_cap": 1.5, "objective.correction_floor": 0.65}
    correction = report(**fields, **bounds)["correction"]
    assert (correction["dropped"], correction["capped"]) == (2, 0)  # Ratios 2 and 0.6.
    assert report()["correction"] is None


def test_the_worst_tokens_come_with_their_text():
    worst = report()["worst"]
    assert len(worst) == 5
    assert worst[0]["text"] == "<2>" and worst[0]["before"] == "<0><1>"
    assert (worst[0]["row"], worst[0]["token"]) == (1, 2)
    text = mismatch_text(json.loads(json.dumps(report())))
    assert "1 of 5 tokens with Â ≠ 0 (20.00 %" in text and "'<0><1>' → '<2>'" in text


def test_an_impossible_logprob_of_the_engine_leaves_the_report_readable():
    """Files may hold any finite logprob."""
    ours = report(full_logp=np.where(MASK, -1e30, 0).astype(np.float32))
    text = json.dumps(plain(ours), allow_nan=False)
    assert json.loads(text)["ratio"]["max"] is None and "|Δlogp|" in mismatch_text(ours)
