"""The public names: the promised ones, imported when they are asked for, and enough to extend the package."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_init
from lightning_init import Distribution, DrawNormal, Fans, FanScheme, Matrix, Normal, StructuredScheme, initialize

PUBLIC_NAMES = frozenset(
    {
        *("InitCallback", "ActivationVarianceMonitor", "InitCLI"),
        *("initialize", "plan", "Assignment", "Rule", "InitReport", "Entry"),
        *("observe", "LayerStats", "Histogram", "StatName", "trace", "Trace", "Calibration"),
        *("fans_of", "Fans", "gain_of", "register", "Role"),
        *(
            "SCHEMES",
            "SchemeName",
            "Scheme",
            "Initializer",
            "Distribution",
            "FanScheme",
            "StructuredScheme",
            "Matrix",
            "DrawNormal",
        ),
        *("Constant", "Normal", "Uniform", "TruncatedNormal", "VarianceScaling", "TorchDefault", "Siren", "SmallInit"),
        *("Orthogonal", "DeltaOrthogonal", "Identity", "Sparse", "ZerO"),
    }
)
HEAVY = ("lightning", "pytorch_lightning", "tensorboard", "jsonargparse", "torchmetrics", "matplotlib", "transformers")


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.split())


def test_public_names_are_the_promised_ones() -> None:
    public = {name for name in dir(lightning_init) if not name.startswith("_") and name in lightning_init.__all__}
    assert public == set(lightning_init.__all__) == PUBLIC_NAMES
    assert all(getattr(lightning_init, name) is not None for name in PUBLIC_NAMES)


def test_public_names_have_one_home_for_people_and_for_type_checkers() -> None:
    tree = ast.parse(Path(lightning_init.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = {
        alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == {name: f"lightning_init.{home}" for name, home in lightning_init._HOME_OF.items()}


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_init' has no attribute 'InitCalback'"):
        lightning_init.InitCalback  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert lightning_init.__version__ == importlib.metadata.version("lightning-init")


@pytest.mark.processes
def test_import_alone_loads_no_torch() -> None:
    assert "torch" not in modules_after("import lightning_init")


@pytest.mark.processes
def test_import_of_the_plain_face_loads_torch_without_lightning() -> None:
    names = ("initialize", "plan", "observe", "fans_of", "gain_of", "register", "SCHEMES", "Rule", "LayerStats")
    loaded = modules_after(f"from lightning_init import {', '.join(names)}")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.processes
def test_plain_face_works_without_lightning() -> None:
    loaded = modules_after(
        "import torch\n"
        "from lightning_init import initialize, observe, plan\n"
        "model = torch.nn.Linear(4, 2)\n"
        "plan(model), initialize(model)\n"
        "with observe(torch.nn.Sequential(model)) as watching:\n"
        "    model(torch.ones(3, 4)).sum().backward()\n"
        "watching.compute()\n"
    )
    assert not loaded & {"lightning", "pytorch_lightning"}


def test_exported_classes_can_be_extended_by_exported_names_alone() -> None:
    class Sheared(StructuredScheme):
        def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
            return torch.ones(matrix.rows, matrix.columns, *matrix.taps, dtype=torch.float64) * gain

        def target_rms(self, matrix: Matrix, gain: float) -> float:
            return gain

    class Halved(FanScheme):
        def distribution_of(self, fans: Fans, gain: float) -> Distribution:
            return Normal((0.5 / fans.fan_in) ** 0.5)

    for scheme in (Sheared(), Halved()):
        layer = nn.Linear(64, 32)
        initialize(layer, scheme).check()
        assert layer.weight.std().item() == pytest.approx(0 if isinstance(scheme, Sheared) else 0.088, rel=0.1)
