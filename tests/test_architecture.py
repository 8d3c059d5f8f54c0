"""The structure of the package: imports run one way, and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drpo_jax"
ENTRY_POINTS = {"__main__", "train", "sft", "evaluate", "report", "preflight", "export"}
GROUND_FLOOR = {"errors", "fields", "storage", "objectives"}
LONGEST = 60  # lines of a function, unless a comment that begins with LONG says why
LONG = "# Long: "
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, inside functions as well."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "drpo_jax":
            modules = [f"drpo_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        rooms |= {m.split(".")[1] for m in modules if m.startswith("drpo_jax.")}
    return rooms - {room(path), "__version__"}


def imports() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(imported_rooms(path))
    return graph


def test_imports_have_no_cycle():
    graph = imports()
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these rooms import each other: {graph}"


def test_nothing_imports_an_entry_point():
    importers = {name: needs & ENTRY_POINTS for name, needs in imports().items()}
    assert not {name: needs for name, needs in importers.items() if needs}


def test_the_ground_floor_imports_nothing_of_the_project():
    graph = imports()
    assert not {name: graph[name] for name in GROUND_FLOOR if graph[name]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_are_short_or_say_why_not(path):
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        around = lines[node.lineno - 2 : node.end_lineno]
        length = node.end_lineno - node.lineno + 1
        reason = any(line.strip().startswith(LONG) for line in around)
        assert length <= LONGEST or reason, f"{node.name} has {length} lines"
