"""Who imports whom: read off the sources, imports inside functions included."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import itself and those before it.
FOLDERS = {
    "svdq_compile.kernels": ROOT / "kernels",
    "svdq_compile.lowering": ROOT / "lowering",
    "svdq_compile.passes": ROOT / "passes",
    "svdq_compile": ROOT / "svdq_compile",
}


def sources() -> dict[str, Path]:
    """Every module of the program, by name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


SOURCES = sources()


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports but those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from statements(node)


def imports(module: str) -> set[str]:
    """The program's modules that this one names."""
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = []
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names += [name if name in SOURCES else base for name in inside]
    return {name for name in names if name in SOURCES}


GRAPH = {module: imports(module) for module in SOURCES}


def folder(module: str) -> int:
    return next(i for i, package in enumerate(FOLDERS) if f"{module}.".startswith(f"{package}."))


def test_the_sources_are_read() -> None:
    assert len(SOURCES) > 80
    assert "svdq_compile.lowering.ops" in GRAPH["svdq_compile.lowering.inductor"]
    assert "svdq_compile.lowering.generate" in GRAPH["svdq_compile.lowering.fused"], "inside a function"
    assert "svdq_compile.lowering.torch_private" in GRAPH["svdq_compile.parameter"]
    assert "svdq_compile" in GRAPH["svdq_compile.cli"]


def test_no_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(reversed(circle.args[1])))


@pytest.mark.parametrize("package", FOLDERS)
def test_one_direction(package: str) -> None:
    """kernels knows tensors, lowering kernels, passes graphs and the operators, svdq_compile all of these."""
    own = [module for module in GRAPH if module.startswith(package)]
    upwards = {(module, other) for module in own for other in GRAPH[module] if folder(other) > folder(module)}
    assert not upwards


def imported_with(module: str) -> set[str]:
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = {other for one in waiting for other in GRAPH[one]} - found
    return found


def test_only_the_backend_needs_inductor() -> None:
    assert "svdq_compile.lowering.inductor" in imported_with("svdq_compile.backend")
    assert "svdq_compile.lowering.inductor" not in imported_with("svdq_compile") | imported_with("svdq_compile.cli")
