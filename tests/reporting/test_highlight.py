"""Colored tokens: the shade of a weight, the HTML, and the choice of responses."""

import re

import numpy as np

from drpo_jax.reporting.highlight import (
    SHADES,
    notable_rows,
    responses_html,
    shade,
    shade_key,
    token_spans,
)


def rollout(**arrays):
    """Two prompts with two responses each; the second of each is right."""
    logp = np.log(np.full((4, 3), 0.5, np.float32))
    return {
        "tokens": np.array([[7, 2, 3, 9]] * 4),
        "prompt_lengths": np.ones(4, int),
        "response_lengths": np.full(4, 3),
        "piece_ids": np.array([2, 3, 9]),
        "piece_texts": np.array(["1", "<", ""]),
        "response_mask": np.ones((4, 3), bool),
        "loss_mask": np.ones((4, 3), bool),
        "behavior_logp": logp,
        "logp": logp + 0.1,
        "weight": np.array([[1, 0.9, 1], [1, -2, 1], [1, 1.2, 1], [1, 1.3, 1]], np.float32),
        "coefficient": np.ones((4, 3), np.float32),
        "entropy": np.full((4, 3), 0.25, np.float32),
        "advantage": np.array([-0.5, 0.5, -0.5, 0.5], np.float32),
        "reward": np.array([0, 1, 0, 1], np.float32),
        "prompt": np.array(["1<2", "1<2", "3+4=", "3+4="]),
        "answer": np.array(["7"] * 4),
    } | arrays


def test_every_weight_has_its_shade():
    begins = list(SHADES.values())
    assert begins == sorted(begins) and begins[0] == -np.inf
    for (color, begin), end in zip(SHADES.items(), [*begins[1:], np.inf]):
        for w in (max(begin, -5.0), min(end, 50.0) - 1e-6):
            assert shade(w).startswith(f"background:{color};")
    assert [shade(w)[-4:] for w in (-2, -1e-9, 1, 3)] == ["#fff", "#fff", "2129", "#fff"]
    assert shade_key().count("<span") == len(SHADES)
    assert "corrected <span" in shade_key() and f'"{shade(-9)};' in shade_key().split("−1")[0]


def test_a_token_shows_its_numbers():
    spans = token_spans(rollout(), 1)
    assert re.findall(r">([^<]*)</span>", spans) == ["1", "&lt;", "∎"]
    title = re.findall(r'title="([^"]*)"', spans)[1].split("&#10;")
    assert title == ["µ 0.5", "π 0.5526", "r 1.105", "w -2", "c 1", "Â 0.5", "entropy 0.25 nats"]
    assert shade(-2) in spans.split("</span>")[1]
    per_token = np.array([[0.0, 0, 0], [1, -2, 3], [0, 0, 0], [0, 0, 0]], np.float32)
    page = responses_html(rollout(advantage=per_token), [1])
    assert re.findall(r"Â ([^&=]*)&", page) == ["1", "-2", "3"] and "Â = 0.667" in page


def test_a_long_response_is_cut_around_its_farthest_weight():
    weight = np.ones((4, 3), np.float32)
    weight[0, 2] = 3
    spans = token_spans(rollout(weight=weight), 0, limit=1)
    assert spans.count("<span") == 1 and "∎" in spans and "<u>2 tokens </u>" in spans
    assert "<u> 2 tokens</u>" in token_spans(rollout(weight=2 - weight[:, ::-1]), 0, limit=1)
    empty = rollout(response_mask=np.zeros((4, 3), bool), response_lengths=np.zeros(4, int))
    assert token_spans(empty, 0) == ""


def test_notable_responses_are_of_different_prompts_and_begin_with_the_farthest():
    assert notable_rows(rollout()) == [1, 3, 2, 0]
    assert notable_rows(rollout(), count=1) == [1, 2]
    assert notable_rows(rollout(prompt=np.array(["1<2"] * 4))) == [1, 2]
    assert notable_rows(rollout(advantage=np.array([0.0, 0, 1, 1]))) == [3, 2]
    assert notable_rows(rollout(advantage=np.zeros(4))) == [1, 3, 2, 0]
    assert notable_rows(rollout(advantage=np.eye(4, 3))) == [1, 2, 0]
    unfiltered = np.repeat([[True], [False], [True], [True]], 3, axis=1)
    assert notable_rows(rollout(loss_mask=unfiltered)) == [3, 2, 0]


def test_responses_are_escaped():
    page = responses_html(rollout(), [1, 2])
    assert "1&lt;2<span" in page and "1<2" not in page
    assert re.findall(r"<b>(\w+)</b>", page) == ["right", "wrong"]
