"""Plain PyTorch gets the same numbers as a Trainer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_init import ActivationVarianceMonitor, observe
from tests.support.faults import MOMENTS_OF, broken
from tests.support.models import digits, mlp
from tests.support.oracle import BatchModule, MemoryLogger, assert_tags_close, cross_entropy, expected_tags
from tests.support.trainers import make_trainer

PIXELS, CLASSES = (t[:32] for t in digits())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(16, 2)


def test_observe_gives_the_monitors_numbers() -> None:
    model, memory = network(), MemoryLogger()
    monitor = ActivationVarianceMonitor(1, stats=["default", "kurtosis", "weight_norm"])
    module = BatchModule(copy.deepcopy(model), [(PIXELS, CLASSES)])
    make_trainer(max_epochs=1, logger=memory, callbacks=[monitor]).fit(module)
    with observe(model, stats=["default", "kurtosis", "weight_norm"]) as watching:
        cross_entropy(model, (PIXELS, CLASSES)).backward()
    named = {
        tag.replace("/", "/network.").replace("network.total", "total"): v for tag, v in watching.compute().tags.items()
    }
    assert named == monitor.latest


def test_observe_records_the_passes_of_its_block() -> None:
    model = network()
    slow = copy.deepcopy(model).double()
    cross_entropy(model, (PIXELS * 9, CLASSES))
    with observe(model) as watching:
        for half in (slice(0, 20), slice(20, 32)):
            (cross_entropy(model, (PIXELS[half], CLASSES[half])) / 2).backward()
    model(PIXELS * 9)
    batches = [(PIXELS[half].double(), CLASSES[half]) for half in (slice(0, 20), slice(20, 32))]
    expected = expected_tags(slow, [batches], accumulation=2, prefix="", rectifiers=["1", "3"])
    assert_tags_close(watching.compute().tags, expected)
    assert watching.compute() is watching.compute()
    assert not any(module._forward_hooks for module in model.modules())
    with watching:
        model(PIXELS * 2)
    again = watching.compute()
    assert again.values["gradient_variance"] == {}
    assert again.values["activation_variance"]["0"] != expected["activation_variance/0"]


def test_observe_of_a_compiled_model() -> None:
    model = torch.compile(network(), backend="eager")
    model(PIXELS)
    with observe(model, layers=["?"]) as watching:
        model(PIXELS).sum().backward()
    assert list(watching.compute().values["gradient_variance"]) == ["0", "1", "2", "3", "4"]


def test_observe_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"'6' matches no layer"):
        observe(network(), layers=["6"])
    with pytest.raises(ValueError, match=r"observe sees no optimizer step, which \['update_ratio'\] would need"):
        observe(network(), stats=["default", "update_ratio"])


def test_observe_errors_are_raised_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the block his own; in measuring, told by compute."""
    model = network()
    with pytest.raises(ZeroDivisionError), observe(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())

    monkeypatch.setattr(MOMENTS_OF.target, broken)
    with observe(model) as watching:
        model(PIXELS)
    with pytest.raises(RuntimeError, match="observation has failed: rank 0: hook on layer '0': RuntimeError: bad luck"):
        watching.compute()


@pytest.mark.parametrize("build", [nn.ReLU, partial(nn.Linear, 2, 2)])
def test_observe_of_a_model_without_layers(build: Any) -> None:
    """The model itself is none; its parameters are in the total."""
    model = build()
    with observe(model) as watching:
        model(torch.ones(3, 2, requires_grad=True)).sum().backward()
    assert set(watching.compute().tags) == ({"gradient_norm/total"} if list(model.parameters()) else set())
