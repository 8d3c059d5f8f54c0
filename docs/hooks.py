"""What mkdocs does besides rendering the pages: generated tables, and links into the source tree.

Pages link to source files by relative paths (`../drpo_jax/loop/loop.py`), which work on a code host and
in an editor. The site has no code host to link to, so every linked file becomes a page of the site, with
line numbers; images and notebooks are copied. Two comments are replaced by generated text:

    <!-- generated: NAME -->     the output of `TABLES[NAME]`
    <!-- reference: MODULE -->   the docstrings of a module, and of every module of a package
"""

import json
import logging
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
TABLE = re.compile(r"<!-- generated: (\w+) -->")
REFERENCE = re.compile(r"<!-- reference: ([\w.]+) -->")
COPIED = {".png", ".svg", ".ipynb"}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def metrics_table() -> str:
    """The catalogue of metrics, a table per section."""
    from drpo_jax.metrics.catalogue import markdown_table

    return re.sub(r"^## ", "### ", markdown_table(), flags=re.MULTILINE)


def fields_table() -> str:
    """Every config field, a table per section."""
    from drpo_jax.config import field_table

    lines, section = [], None
    for field in field_table():
        if field.section != section:
            section = field.section
            lines += ["", f"### {section or 'seed'}", ""]
            lines += [
                "| field | default | allowed | meaning | on resume |",
                "|---|---|---|---|---|",
            ]
        shown = f"{field.default:g}" if isinstance(field.default, float) else repr(field.default)
        default = "" if field.default is None else f"`{shown}`"
        may_change = "may change" if field.may_change else ""
        cells = (f"`{field.path}`", default, field.allowed, field.meaning, may_change)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def dials_table() -> str:
    """The results of `benchmarks.dials`, a row per run."""
    from benchmarks.dials import markdown

    return results_table("dials", markdown)


def peers_table() -> str:
    """The results of `benchmarks.peers`: ratios with their goals, memory, seconds to the first step."""
    from benchmarks.peers.figures import markdown

    return results_table("peers", markdown)


def results_table(name: str, markdown: Callable[[Any], str]) -> str:
    """The results of a benchmark as `markdown` renders them."""
    path = ROOT / f"benchmarks/results/{name}.json"
    if not path.exists():
        return "There are no results yet."
    return markdown(json.loads(path.read_text(encoding="utf-8"))["figures"])


def micro_tokens_table() -> str:
    """The results of `benchmarks.micro_tokens`, and counted cases."""
    from benchmarks.micro_tokens import markdown

    return results_table("micro_tokens", markdown)


def laboratory_exact() -> str:
    """The tables of level 1 of the laboratory."""
    from experiments.exact.report import markdown

    return markdown()


def laboratory_small() -> str:
    """The tables of level 2 of the laboratory."""
    from experiments.small.report import markdown

    return markdown()


def laboratory_language_model() -> str:
    """The table of level 3 of the laboratory."""
    from experiments.language_model import RESULTS, table

    return table(json.loads(RESULTS.read_text(encoding="utf-8")))


TABLES = {
    "metrics": metrics_table,
    "fields": fields_table,
    "dials": dials_table,
    "micro_tokens": micro_tokens_table,
    "peers": peers_table,
    "laboratory_exact": laboratory_exact,
    "laboratory_small": laboratory_small,
    "laboratory_language_model": laboratory_language_model,
}


def on_files(files, config):
    """Adds the source files that pages link to."""
    linked = {}
    for file in files.documentation_pages():
        for match in LINK.finditer(Path(file.abs_src_path).read_text(encoding="utf-8")):
            if path := outside(file, match["target"]):
                linked[path] = file.src_uri
    for path, page in sorted(linked.items()):
        if not (ROOT / path).is_file():
            log.warning("%s links to %s, which is not a file of the repository", page, path)
        elif Path(path).suffix in COPIED:
            source = {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, site_path(path), **source))
        else:
            files.append(File.generated(config, site_path(path), content=source_page(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills in the generated tables and points links at the added files."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    def redirect(match):
        path = outside(page.file, match["target"])
        if path is None:
            return match[0]
        target = posixpath.relpath(site_path(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match['before']}{target}{match['anchor'] or ''})"

    markdown = TABLE.sub(lambda match: TABLES[match[1]](), markdown)
    markdown = REFERENCE.sub(lambda match: reference(match[1]), markdown)
    return LINK.sub(redirect, markdown)


def reference(module: str) -> str:
    """The directives that render a module. Of a package itself only the docstring is shown: its names
    are those of its modules."""
    folder = ROOT / module.replace(".", "/")
    if not folder.is_dir():
        return f"::: {module}"
    blocks = [f"::: {module}\n    options:\n      members: false"]
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    blocks += [f"::: {module}.{name}" for name in names]
    return "\n\n".join(blocks)


def outside(file, target: str) -> str | None:
    """The path below the repository's root that a link leads to; None inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))
    return None if path.startswith("docs/") else path


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    return f"source/{path}" if Path(path).suffix in COPIED else f"source/{path}.md"


def source_page(path: str) -> str:
    """A page that shows a text file with line numbers."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * 8
    language = LANGUAGES.get(Path(path).suffix, "text")
    header = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {path}\n\n"
    return f'{header}{fence}{language} linenums="1"\n{text}\n{fence}\n'
