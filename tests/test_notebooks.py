"""The notebooks run from top to bottom; the committed files are small and name no machine's paths."""

import os
import re
from functools import partial
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from drpo_jax import config, loop, rewards
from drpo_jax.cli import load_config
from drpo_jax.parallel import make_mesh

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "no notebooks beside tests/"

SAMPLES = {"fp8_mismatch"}  # These spend their time on sampling and scoring.
LARGEST = 1_000_000  # bytes, with outputs
ABSOLUTE = re.compile(r"(?<![\w./\\<])(?:~/|/[\w.-]+/)[\w.-]")  # a path from / or ~

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, compile_quickly):
    """The directory of a tiny run, for the notebooks that open one.

    It runs on one of the eight devices, which compiles faster. An untrained model also gets the reward,
    so the saved rollouts have advantages of both signs.
    """
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        reward = lambda prompt, text, answer: float(len(text) % 2 or text == f"#{answer}")  # noqa: E731
        patch.setitem(rewards.REWARDS, "arithmetic", reward)
        loop.train(config.resolve(load_config(str(HERE / "smallest.py"))), directory)
    return directory


@each
def test_a_notebook_runs(path, request, tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device, as readers have
        # This compiles faster but runs more slowly.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if path.stem in SAMPLES else "1",
        "IPYTHONDIR": str(tmp_path),
    }
    if "DRPO_WORKDIR" in path.read_text(encoding="utf-8"):
        environment["DRPO_WORKDIR"] = str(request.getfixturevalue("workdir"))
    # Without kernel directories, "python3" is the interpreter that runs the tests.
    settings = Config(KernelSpecManager={"kernel_dirs": []})
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        kernel_name="python3",
        timeout=300,  # seconds, each cell
        resources={"metadata": {"path": str(path.parent)}},
        config=settings,
    )
    client.execute(env=environment)


@each
def test_a_notebook_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size <= LARGEST


@each
def test_a_notebook_holds_no_path_of_a_machine(path):
    paths = [
        text[max(0, match.start() - 20) : match.end() + 40]
        for text in strings(nbformat.read(path, as_version=4))
        for match in ABSOLUTE.finditer(text)
    ]
    assert not paths


def strings(node):
    """Yields every text in a notebook except its images."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if not key.startswith("image/"):
                yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
