"""The structure of the package: imports run one way, functions stay short, public ones are annotated."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drpo_jax"
ENTRY_POINTS = {
    "__main__", "train", "sft", "evaluate", "report", "preflight", "export", "convert", "listing",
    "score", "compare",
}  # fmt: skip
GROUND_FLOOR = {"errors", "fields", "plugins", "storage"}
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
    assert graph["objectives"] == {"plugins"}


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


EQUATIONS = "objectives/table.py"  # Hyperparameters are typed by their defaults, as in the papers.


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_annotated(path):
    equations = str(path.relative_to(PACKAGE)) == EQUATIONS
    for function in public_functions(ast.parse(path.read_text())):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += filter(None, [arguments.vararg, arguments.kwarg])
        if equations and named and named[0].arg == "t":
            continue
        missing = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        if function.returns is None and function.name != "__init__":
            missing.append("return")
        assert not missing, f"{function.name}: {', '.join(missing)}"


def public_functions(tree):
    """Yields the public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        members = [node]
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members = node.body
        for member in members:
            if isinstance(member, ast.FunctionDef):
                if not member.name.startswith("_") or member.name in ("__init__", "__call__"):
                    yield member
