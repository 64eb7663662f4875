"""Fine-tuning is recognised: adapters made from trained weights, trained copies of frozen layers, teachers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_init import InitReport
from lightning_init.initialization.initialize import carry_out
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request
from tests.support.models import digits
from tests.support.training import fresh, trained

IMAGES = digits()[0][:64]


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


class Adapted(nn.Module):
    """A frozen layer and a product of two matrices of rank 8 beside it."""

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        outputs, inputs = base.weight.shape
        self.down, self.up = nn.Linear(inputs, 8, bias=False), nn.Linear(8, outputs, bias=False)
        with torch.no_grad():
            if kind == "from singular values":
                left, values, right = torch.linalg.svd(base.weight, full_matrices=False)
                self.up.weight.copy_(left[:, :8] * values[:8].sqrt())
                self.down.weight.copy_(values[:8].sqrt()[:, None] * right[:8])
                base.weight -= self.up.weight @ self.down.weight
            else:
                self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x) + self.up(self.down(x))
        return output


class Saved(nn.Module):
    """A layer that is trained, and what it was before."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.copied = copy.deepcopy(original).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.copied(x)
        return output


def fit_start(model: nn.Module) -> InitReport:
    """As the callback initialises."""
    return carry_out(model, Request.of("he_normal"), 1, trained="refuse")


@pytest.mark.parametrize("kind", ["from singular values", "from zero"])
@pytest.mark.parametrize("is_head_saved", [False, True])
def test_fine_tuning_starts_from_the_trained_function(kind: str, is_head_saved: bool) -> None:
    net = trained(fresh(body), 200)
    net.requires_grad_(False)
    net[0], net[2] = Adapted(net[0], kind), Adapted(net[2], kind)
    net[4] = Saved(net[4]) if is_head_saved else net[4]
    expected = net(IMAGES).detach()
    report = fit_start(net)
    torch.testing.assert_close(net(IMAGES), expected)
    if is_head_saved:
        assert report["4.copied.weight"].left is Reason.TRAINED
        assert report["4.copied.weight"].reason == "trained: it equals 4.original.weight, which is frozen"
    assert (report["0.down.weight"].left is None) == (kind == "from zero")


def test_new_head_on_a_frozen_body_is_drawn() -> None:
    net = trained(fresh(body), 200)
    net.requires_grad_(False)
    net[4] = nn.Linear(32, 10)
    report = fit_start(net)
    assert report["4.weight"].left is None
    assert report["2.weight"].left is Reason.FROZEN


class Teacher(nn.Module):
    """A student, and a frozen copy of it that follows later."""

    def __init__(self) -> None:
        super().__init__()
        self.student = body()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.student(x) - self.teacher(x)
        return output


def test_teacher_that_keeps_the_old_values_is_named() -> None:
    model = fresh(Teacher)
    report = fit_start(model)
    assert report["student.0.weight"].left is None
    assert "teacher.0.weight is frozen and keeps the old values of student.0.weight" in report.notes
