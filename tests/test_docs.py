"""The documentation agrees with the code: its snippets run, and what it names and links to exists."""

import importlib.util
import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.cli import load_config
from drpo_jax.commands import COMMANDS
from drpo_jax.config import default_config, flatten
from drpo_jax.metrics import describe
from drpo_jax.objectives import AGGREGATIONS, OBJECTIVES, table
from drpo_jax.rewards import REWARDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "launch/README.md", ROOT / "notebooks/README.md"]
    + list((ROOT / "docs").rglob("*.md"))
)
PLUGIN = "objective.width"  # The hyperparameter of the objective that docs/plugins.md shows.
FIELDS = flatten(default_config()) | {PLUGIN: None}
SECTIONS = {field.partition(".")[0] for field in FIELDS if "." in field}
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Commands of other programs, whose flags are not ours.
FOREIGN = re.compile(r"\b(gcloud|kubectl|git|docker|pip|venv|xpk cluster|jupyter) ")

each = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def snippets(page):
    """(note, code) of every Python block; the note is the comment in front of it, or ""."""
    return [(m["note"] or "", m["code"]) for m in FENCE.finditer(page.read_text("utf-8"))]


def commands(page):
    """The shell commands of the indented blocks, continued lines joined."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return [line for line in text.split("\n") if line.startswith("    ") and line.strip()]


def anchors(page):
    """The anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.slow
@each
def test_python_snippets_run(page):
    """The snippets of a page that need no files, in order; equations see the names of the table."""
    namespace = {"Token": table.Token, "Terms": table.Terms}
    with mock.patch.dict(REWARDS):
        for note, code in snippets(page):
            if not note.startswith("no test"):
                exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/objectives.md"], ids=str)
def test_the_example_objective_has_the_derivative_it_states(page, monkeypatch):
    namespace = {"Token": table.Token, "Terms": table.Terms}
    [code] = [code for note, code in snippets(page) if note == "test: objective"]
    exec(code, namespace)
    monkeypatch.setitem(table.OBJECTIVES, "drpo_cubic", table.Objective(namespace["drpo_cubic"]))
    logp, mu = jnp.log(jnp.array([0.5, 0.9, 0.1])), jnp.log(jnp.array([0.4, 0.5, 0.3]))
    advantage = jnp.array([1.0, 1.0, -1.0])

    def total(logp):
        return table.token_objective("drpo_cubic", logp, mu, advantage)[0].sum()

    _, c = table.token_objective("drpo_cubic", logp, mu, advantage)
    np.testing.assert_allclose(c, jax.grad(total)(logp), rtol=1e-5)


def test_the_readme_states_the_weights_that_its_snippet_gives():
    text = (ROOT / "README.md").read_text("utf-8")
    stated = re.search(r"# w: (.*)", text)[1].split(", ")
    logp, mu = jnp.log(jnp.array([0.5, 0.9, 0.1])), jnp.log(jnp.array([0.4, 0.5, 0.3]))
    w = table.gradient_weight("drpo", logp, mu, jnp.array([1.0, 1.0, -1.0]), delta=0.15)
    assert stated == [f"{value:.2f}" for value in w]


def test_the_architecture_page_shows_the_equation_of_the_table():
    """What the page quotes are lines of the function, docstring left out."""
    shown = (ROOT / "docs/architecture.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(def drpo.*?)```", shown, re.DOTALL)
    source = (ROOT / "drpo_jax/objectives/table.py").read_text("utf-8")
    body = source[source.index("def drpo(") :].split("\ndef ")[0]
    assert all(line in body for line in code.strip().split("\n"))


@each
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: there is no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: there is no such heading"


@each
def test_config_fields_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9*]+)(?![a-z_0-9*(])", text)
    named += re.findall(r"--config\.([a-z_0-9.]+)", text)
    files = (".py", ".json", ".jsonl")
    for field in named:
        if field.endswith("*"):
            assert field.split(".")[0] in SECTIONS
        elif not field.endswith(files):
            assert field in FIELDS, f"{field} is not a field"


@each
def test_configs_and_their_variants_load(page):
    for spec in set(re.findall(r"configs/\w+\.py(?::[\w,]+)?", page.read_text("utf-8"))):
        if spec != "configs/mine.py":  # the reader's copy of configs/own.py
            load_config(str(ROOT / spec))


@each
def test_commands_and_modules_exist(page):
    text = page.read_text("utf-8")
    for command in re.findall(r"(?:^ {4,}|`|exec )drpo ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS, f"drpo {command}: there is no such command"
    for module in re.findall(
        r"(?:python -m |reference: )((?:drpo_jax|benchmarks|experiments)[\w.]*)", text
    ):
        assert importlib.util.find_spec(module), f"{module}: there is no such module"


@each
def test_flags_exist(page):
    """Every --flag of our own commands stands in a source file that could define it."""
    sources = [
        path.read_text("utf-8")
        for folder in ("drpo_jax", "launch", "benchmarks", "experiments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh")
    ]
    for command in commands(page):
        if FOREIGN.search(command):
            continue
        ours = command.partition(" hf download ")[0] + command.partition(" exec ")[2]
        for flag in re.findall(r"(?<!\S)--([a-z][a-z_-]*)(?=[=\s]|$)", ours):
            known = any(f'"{flag}"' in source or f"--{flag}" in source for source in sources)
            assert known, f"--{flag} in {command.strip()}: there is no such flag"


def test_the_table_of_objectives_is_complete():
    text = (ROOT / "docs/objectives.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text.split("## The table")[1].split("\n### ")[0], re.M)
    assert sorted(rows) == sorted(OBJECTIVES)


def test_the_table_of_objectives_has_their_defaults():
    text = (ROOT / "docs/objectives.md").read_text("utf-8").split("## The table")[1]
    for name, objective in OBJECTIVES.items():
        [row] = re.findall(rf"^\| `{name}` \|.*$", text.split("\n### ")[0], re.M)
        shown = dict(re.findall(r"`(\w+)` ([\w.-]+)", row.rpartition(" | ")[2]))
        values = {k: "off" if v is None else v for k, v in objective.hyper.items()}
        assert shown.keys() == values.keys()
        for key, value in values.items():
            plain = isinstance(value, str | bool)
            assert shown[key] == str(value) if plain else float(shown[key]) == value


def test_the_published_aggregations_are_those_of_the_rows():
    text = (ROOT / "docs/objectives.md").read_text("utf-8")
    table = text.split("### Sources and published settings")[1].split("\n### ")[0]
    for name, objective in OBJECTIVES.items():
        [line] = re.findall(rf"^\|[^|]*`{name.partition('_no_')[0]}`.*$", table, re.M) or [""]
        stated = re.findall(rf"`({'|'.join(AGGREGATIONS)})`", line)
        assert stated == [objective.aggregation] or (not stated and not objective.aggregation), name


@each
def test_metrics_exist(page):
    families = (
        "reward|response|weight|policy|mismatch|eval|by_mu|time|compile|updates|router|sampler|sync|"
        "sampling"
    )
    for name in re.findall(rf"`((?:{families})/[a-z_/]+)`", page.read_text("utf-8")):
        assert describe(name).definition, f"{name}: there is no such metric"


@pytest.mark.slow
def test_the_figure_of_the_weights_is_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.draw(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 10_000


def test_the_reference_covers_every_module():
    """All but the entry points and the command line's own tables."""
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = set(re.findall(r"<!-- reference: drpo_jax\.(\w+) -->", pages))
    paths = (ROOT / "drpo_jax").iterdir()
    modules = {p.stem for p in paths if p.suffix == ".py" or (p / "__init__.py").exists()}
    entry_points = {command.module.removeprefix("drpo_jax.") for command in COMMANDS.values()}
    assert modules - entry_points - {"__init__", "__main__", "commands"} == shown


def test_the_messages_of_the_troubleshooting_page_exist():
    """Headings in code quote messages, with … in place of what varies."""
    files = (ROOT / "drpo_jax").rglob("*.py")
    source = "".join(path.read_text("utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*(\+ )?(rf|f|r)?"', "", source)  # literals that continue each other
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert messages
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, f"{message}: no code says {part.strip()!r}"


def test_the_page_on_plugins_shows_the_examples():
    """Every function on the page is in the example files that its commands name."""
    sources = "".join(
        (ROOT / f"examples/my_{x}.py").read_text("utf-8") for x in ("rewards", "objectives")
    )
    for _, code in snippets(ROOT / "docs/plugins.md"):
        body = re.sub(r"^(import|from) .*\n", "", code, flags=re.MULTILINE).strip()
        assert body in sources
