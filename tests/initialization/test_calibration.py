"""Weights scaled on one batch, in one more call: every layer's output has its target variance there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_init import Calibration, Rule, gain_of, initialize
from lightning_init.initialization.calibration import variance_for_depth

WIDTH = 128


def rows() -> Tensor:
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    return (pixels - pixels.mean()) / pixels.std()


def plain(depth: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(64, WIDTH), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(WIDTH, WIDTH), activation()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def variances(model: nn.Module, batch: Any) -> dict[str, float]:
    """Of what comes out of every Linear and convolution."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(
                lambda m, args, out, name=name: found.update({name: float(out.detach().double().var(correction=0))})
            )
    with torch.no_grad():
        model(batch)
    return found


@pytest.mark.parametrize("scheme", ["he_normal", "auto", "xavier_uniform"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])
def test_every_layer_of_a_deep_plain_net_has_its_target(activation: Callable[[], nn.Module], scheme: str) -> None:
    model, batch = plain(50, activation), rows()[:256]
    report = initialize(model, scheme, seed=0, batch=batch, calibrate=True)
    report.check()
    found = variances(model, batch)
    head = found.popitem()
    target = variance_for_depth(activation.__name__.lower(), 50)
    for name, variance in found.items():
        assert variance == pytest.approx(target, rel=3e-3), name  # factors are rounded to 2^(1/1024)
    assert head[1] < 10
    assert any(note.startswith("calibrated on one batch") for note in report.notes)


def test_targets_by_depth_are_the_largest_that_keep_a_difference() -> None:
    for name in ("gelu", "silu", "tanh", "mish"):
        variances_ = [variance_for_depth(name, depth) for depth in (2, 20, 50, 200)]
        assert variances_ == sorted(variances_, reverse=True)
        q = variances_[2]
        chi = q * (gain_of(name, input_variance=q) / gain_of(name, "backward", input_variance=q)) ** 2
        assert 50 * math.log(chi) == pytest.approx(0.3, rel=0.02)
    assert variance_for_depth("relu", 1000) == 1.0


class Counting(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        COUNTED.append(len(x))
        return super().forward(x)


COUNTED: list[int] = []


def test_calibration_costs_two_calls() -> None:
    COUNTED.clear()
    initialize(Counting(*plain(30, nn.GELU)), "auto", seed=0, batch=rows()[:64], calibrate=True)
    assert COUNTED == [64, 64]


class Residual(nn.Module):
    """Norm, reader, writer, added up; a norm behind one layer; a bias that is no zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.norm, self.reader, self.writer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other_reader, self.other_writer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.normalized, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.writer(self.reader(self.norm(x)).relu())
        x = x + self.other_writer(self.other_reader(self.norm(x)).relu())
        return self.head(self.norm(self.normalized(x)))


def test_summands_share_the_variance_and_normalized_layers_stay() -> None:
    model, batch = Residual(), rows()[:256]
    untouched = Residual()
    initialize(untouched, "he_normal", seed=3, batch=batch)
    initialize(model, "he_normal", seed=3, batch=batch, calibrate=True)
    found = variances(model, batch)
    for name in ("stem", "writer", "other_writer"):
        assert found[name] == pytest.approx(1 / 3, rel=3e-3)
    for name in ("reader", "other_reader"):
        assert found[name] == pytest.approx(1.0, rel=3e-3)
    for name in ("normalized", "head"):
        assert torch.equal(model.get_parameter(f"{name}.weight"), untouched.get_parameter(f"{name}.weight"))


def test_calibration_to_a_variance_leaves_rules_and_biases_alone() -> None:
    model, batch = plain(5, nn.ReLU), rows()[:256]
    options: dict[str, Any] = {"rules": [Rule("2.weight", "lecun_normal")], "bias": 0.5, "seed": 0, "batch": batch}
    plainly = plain(5, nn.ReLU)
    initialize(plainly, "he_normal", **options)
    report = initialize(model, "he_normal", calibrate=Calibration(4.0), **options)
    found = variances(model, batch)
    assert [found[name] for name in ("0", "4", "6")] == pytest.approx([4.0] * 3, rel=3e-3)  # biases are constant
    assert torch.equal(model[2].weight, plainly[2].weight)
    assert all(torch.equal(model[i].bias, torch.full_like(model[i].bias, 0.5)) for i in (0, 2, 4, 6))
    factor = report["4.weight"].target_std / plainly[4].weight.std().item()
    assert factor == pytest.approx(float((model[4].weight[0, 0] / plainly[4].weight[0, 0]).detach()), rel=0.02)


def test_calibration_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, bias=False), nn.SiLU(), nn.Flatten())
    model.append(nn.Linear(8 * 16, 10))
    batch = rows()[:64].view(-1, 1, 8, 8)
    initialize(model, "he_normal", seed=0, batch=batch, calibrate=True)
    found = variances(model, batch)
    assert [found["0"], found["2"]] == pytest.approx([variance_for_depth("silu", 3)] * 2, rel=3e-3)


def test_calibration_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="give a batch"):
        initialize(plain(3, nn.ReLU), calibrate=True)
    with pytest.raises(ValueError, match="variance"):
        Calibration(-1.0)


def test_calibration_of_a_call_that_fails_says_why_and_leaves_the_scheme() -> None:
    model, twin = plain(3, nn.ReLU), plain(3, nn.ReLU)
    report = initialize(model, "he_normal", seed=0, batch=torch.ones(2, 3), calibrate=True)
    initialize(twin, "he_normal", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert any(note.startswith("calibrated nothing: RuntimeError") for note in report.notes)
