"""The guide to rollout files: its table, and its snippets with the objects of vLLM and SGLang."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from drpo_jax.learner.rollout_checks import read_rollouts
from drpo_jax.learner.rollout_file import COLUMNS

PAGE = (Path(__file__).parents[1] / "docs/rollouts.md").read_text("utf-8")


@pytest.fixture(scope="module")
def snippets():
    """The functions of the snippets."""
    names: dict = {}
    for code in re.findall(r"<!-- test: \w+ -->\n```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    return SimpleNamespace(**names)


def verify(group, text):
    return text == ["4", "6"][group]


def check(path, rows, snippets):
    snippets.write_rows(path, rows)
    rollout = read_rollouts(path)
    assert rollout["group"].tolist() == [0, 0, 1, 1]
    assert rollout["reward"].tolist() == [1, 0, 0, 1]
    assert rollout["tokens"].tolist()[0] == [11, 12, 4, 0, 0]
    assert rollout["full_logp"].tolist()[1] == [-1.5, -2.5, 0]
    assert rollout["finished"].tolist() == [True, False, True, True]
    assert rollout["version"].tolist()[3] == [8, 8, -1]


# For each response: text, token ids, logprobs, finish reason.
RESPONSES = [
    [("4", [4, 0], [-0.5, -0.25], "stop"), ("55", [5, 5], [-1.5, -2.5], "length")],
    [("7", [7, 7, 0], [-1, -1, -1], "stop"), ("6", [6, 0], [-0.5, -0.5], "stop")],
]
PROMPTS = [[11, 12], [13, 14]]


def test_the_snippet_for_vllm(tmp_path, snippets):
    """The dict of a position may also have more likely tokens, depending on the sampling parameters."""

    def completion(text, ids, logps, reason):
        sampled = [
            {99: SimpleNamespace(logprob=-0.1), i: SimpleNamespace(logprob=x)}
            for i, x in zip(ids, logps)
        ]
        return SimpleNamespace(
            text=text, token_ids=tuple(ids), logprobs=sampled, finish_reason=reason
        )

    outputs = [
        SimpleNamespace(prompt_token_ids=ids, outputs=[completion(*response) for response in group])
        for ids, group in zip(PROMPTS, RESPONSES)
    ]
    check(tmp_path / "vllm.parquet", snippets.rows_of_vllm(outputs, verify, version=8), snippets)


def test_the_snippet_for_sglang(tmp_path, snippets):
    replies = [
        [
            {
                "text": text,
                "meta_info": {
                    "output_token_logprobs": [(x, i, None) for i, x in zip(ids, logps)],
                    "finish_reason": {"type": reason},
                },
            }
            for text, ids, logps, reason in group
        ]
        for group in RESPONSES
    ]
    rows = snippets.rows_of_sglang(PROMPTS, replies, verify, version=8)
    check(tmp_path / "sglang.parquet", rows, snippets)


def test_the_table_of_columns_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.*) \|$", PAGE, re.MULTILINE)
    kinds = {"integer": "integer", "number": "number", "boolean": "boolean", "text": "text"}
    expected = [
        (
            name,
            (f"list of {kinds[c.kind]}s" if c.tokens else kinds[c.kind])
            + ", optional" * (not c.required),
            c.meaning,
        )
        for name, c in COLUMNS.items()
    ]
    assert rows == expected
