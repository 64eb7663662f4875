"""The package's own rules: imports point down only, Lightning and Matplotlib come in where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_init"

# From the bottom up. A file may import its own package and what lies strictly below.
FLOORS = [
    {"native", "checks", "findings", "sandbox"},
    {"distributed"},
    {"schemes"},
    {"introspect"},
    {"initialization", "monitor"},
    {"show"},
    {"callbacks"},
    {"cli"},
    {"__init__"},
]
NO_LIGHTNING = frozenset().union(*FLOORS[:6])


def imports_of(file: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) a file imports, also inside functions and under TYPE_CHECKING; name may be empty."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}: relative imports hide where they point"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports_of(file: Path) -> set[Path]:
    """The files of this package that a file imports."""
    found = set()
    for module, name in imports_of(file):
        if module.partition(".")[0] != "lightning_init":
            continue
        path = ROOT.joinpath(*module.split("."))
        targets = (path / f"{name}.py", path / f"{name}.pyi", path.with_suffix(".py"), path / "__init__.py")
        found.add(next(target for target in targets if target.is_file()))
    return found


def top(file: Path) -> str:
    """``initialization`` for lightning_init/initialization/fans.py, ``cli`` for lightning_init/cli.py."""
    return file.relative_to(PACKAGE).parts[0].partition(".")[0]


def floor(file: Path) -> int:
    """How high a file stands in :data:`FLOORS`."""
    places = [number for number, names in enumerate(FLOORS) if top(file) in names]
    assert places, f"{file.relative_to(ROOT)} has no floor yet: give it one in FLOORS"
    return places[0]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    wrong = [
        str(other.relative_to(ROOT))
        for other in own_imports_of(file)
        if top(other) != top(file) and floor(other) >= floor(file)
    ]
    assert not wrong, f"{file.relative_to(ROOT)} must not import {wrong}"


def test_no_file_imports_itself_through_others() -> None:
    graph = {file: own_imports_of(file) for file in FILES}
    assert set(TopologicalSorter(graph).static_order()) >= set(FILES)  # a cycle raises CycleError


@pytest.mark.parametrize(
    "file", [file for file in FILES if top(file) in NO_LIGHTNING], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_mathematics_knows_no_lightning(file: Path) -> None:
    hosts = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    assert not hosts & {module.partition(".")[0] for module, _ in imports_of(file)}


def test_matplotlib_is_imported_only_where_a_picture_is_drawn() -> None:
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), f"{file.relative_to(ROOT)}: move it into the function"
