"""The wheel: with the compiled sums where there is a C compiler, complete and working where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
COMPILERS = ["cc", "false"]
MEASURE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]  # this wheel, nothing else
import torch
from lightning_init import native
from lightning_init.monitor import moments
print(native.sums is not None, moments.moments_of(torch.arange(12.0).reshape(4, 3), 1))
"""


def build(folder: Path, **environment: str) -> None:
    """A wheel of a copy of the sources, unpacked; nothing is written beside them."""
    copy = folder / "sources"
    shutil.copytree(
        ROOT / "lightning_init", copy / "lightning_init", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name  # for every Python from 3.10 on
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")


def build_and_measure(folder: Path, compiler: str) -> str:
    """What a Python prints that finds nothing but the unpacked wheel."""
    build(folder, CC=compiler)
    return subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=folder / "unpacked",
        env={**os.environ, "PYTHONPATH": str(folder / "unpacked")},
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """For both compilers the unpacked wheel and what it printed; at the same time, for most of it is waiting."""
    folders = {compiler: tmp_path_factory.mktemp(compiler) for compiler in COMPILERS}
    with ThreadPoolExecutor() as pool:
        printed = pool.map(build_and_measure, folders.values(), folders)
        return {name: (folders[name] / "unpacked", text) for name, text in zip(folders, printed, strict=True)}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_wheel_with_and_without_a_c_compiler(compiler: str, wheels: dict[str, tuple[Path, str]]) -> None:
    unpacked, printed = wheels[compiler]
    package, source = unpacked / "lightning_init", ROOT / "lightning_init"
    kept = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(source).as_posix() for kind in ("*.py", "*.pyi", "native/*.md") for path in source.rglob(kind)
    }
    compiled = {name for name in kept if name.endswith(".so")}
    assert kept == sources | compiled | {"py.typed"}
    assert "native/_sums.pyi" in kept
    assert len(compiled) == (compiler == "cc")
    expected = "Moments(n=12, sums=tensor([18., 22., 26.], dtype=torch.float64), squares=506.0)"
    assert printed.strip() == f"{compiler == 'cc'} {expected}"
