"""The wheel: with the compiled sums where there is a C compiler, complete and working where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")


@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_wheel(compiler: str, tmp_path: Path) -> None:
    build(tmp_path, CC=compiler)
    package = tmp_path / "unpacked" / "lightning_init"
    kept = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    sources = {path.relative_to(ROOT / "lightning_init").as_posix() for path in (ROOT / "lightning_init").rglob("*.py")}
    compiled = {name for name in kept if name.endswith(".so")}
    assert kept == sources | compiled | {"py.typed", "_sums.pyi"}
    assert len(compiled) == (compiler == "cc")
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    expected = "Moments(n=12, sums=tensor([18., 22., 26.], dtype=torch.float64), squares=506.0)"
    assert printed.strip() == f"{compiler == 'cc'} {expected}"
