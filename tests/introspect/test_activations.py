"""Activations are recognised by what they do."""

from __future__ import annotations

import math
import random
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_init.introspect import activations
from lightning_init.introspect.activations import ActivationTraits, activation_of


class SquaredReLU(nn.Module):
    """Somebody else's class."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) ** 2


class Wrapped(nn.Module):
    """Hugging Face's way: the function is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Standardize(nn.Module):
    """Depends on the neighbours, accepts any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean()


class Noisy(nn.Module):
    """Draws in eval mode too, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        import warnings

        warnings.warn("noisy", stacklevel=1)
        return x + torch.randn_like(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.tanh()


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), SquaredReLU(), nn.Threshold(0.1, 0.0)],
    ids=repr,
)
def test_activation_traits_of_rectifiers(module: nn.Module) -> None:
    activation = activation_of(module)
    assert activation is not None
    assert activation.rectifies
    assert not activation.saturates


@pytest.mark.parametrize(
    "module",
    [
        *(nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ELU(), nn.LeakyReLU(), nn.Hardswish(), nn.Softplus()),
        *(nn.Hardtanh(), nn.RReLU(), nn.Mish(), nn.SELU(inplace=True), nn.LogSigmoid(), nn.Tanhshrink(), Wrapped()),
    ],
    ids=repr,
)
def test_activation_traits_of_smooth_functions(module: nn.Module) -> None:
    activation = activation_of(module)
    assert activation is not None
    assert not activation.rectifies


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Identity(), nn.Dropout(), nn.AlphaDropout(), nn.Flatten(0), nn.Softmax(-1), nn.LogSoftmax(0), nn.GLU()),
        *(nn.MaxPool1d(2), nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.Softmin(0)),
        *(nn.BatchNorm1d(7, affine=False), nn.LayerNorm(7, elementwise_affine=False), nn.MSELoss(), Standardize()),
        *(nn.Linear(7, 7), nn.PReLU(), nn.Sequential(nn.ReLU()), nn.Sequential(), Noisy(), nn.LocalResponseNorm(2)),
    ],
    ids=repr,
)
def test_activation_traits_of_other_modules_are_none(module: nn.Module) -> None:
    assert activation_of(module) is None


def test_activation_of_changes_nothing() -> None:
    counter = Counter().train()
    before = torch.get_rng_state()
    assert activation_of(counter) is not None
    activation_of(Noisy())
    assert torch.equal(torch.get_rng_state(), before)
    assert counter.calls == 0
    assert counter.training


def test_activation_of_ignores_default_dtype_and_device() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert activation_of(nn.ReLU()) == ActivationTraits(True)
    finally:
        torch.set_default_dtype(torch.float32)


class Augmentation(nn.Module):
    """Draws from generators that are not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() * float(np.random.rand())


def test_activation_of_keeps_random_states() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    activation_of(Augmentation())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class Owner(nn.Module):
    """Listens to its activation with a method of its own, and must never be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.act.register_forward_hook(self.keep)
        self.kept: list[Tensor] = []

    def keep(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.kept.append(output)

    def __deepcopy__(self, memo: dict[int, object]) -> Owner:
        raise AssertionError("the whole model was copied")


def test_activation_of_calls_no_hooks() -> None:
    owner, seen = Owner(), []
    owner.act.register_forward_pre_hook(lambda module, args: seen.append(args))
    assert activation_of(owner.act) == ActivationTraits(True)
    assert not owner.kept
    assert not seen
    owner.act(torch.ones(1))
    assert len(owner.kept) == len(seen) == 1  # the module itself still has them


class Memory(nn.Module):
    """A bank of many numbers, elementwise by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1 << 17))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_activation_of_copies_no_large_state(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activation_of(Memory()) is None
    monkeypatch.setattr("lightning_init.introspect.quiet_code._MOST_ELEMENTS", 1 << 18)
    assert activation_of(Memory()) is not None  # it was the size


class Printing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return x.relu()


class PrintsDeepInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return announced(x).relu()


def announced(x: Tensor) -> Tensor:
    sys.stdout.write("called")
    return x


class Listing(nn.Module):
    """Remembers what it has seen outside of itself."""

    seen: ClassVar[list[object]] = []

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return x.relu()


SEEN: list[Tensor] = []


class Perceptual(nn.Module):
    """Holds a network where no module is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.network = [NeverCopied()]

    def forward(self, x: Tensor) -> Tensor:
        return self.network[0](x)


class NeverCopied(nn.Module):
    def __deepcopy__(self, memo: dict[int, object]) -> NeverCopied:
        raise AssertionError("a network in a list was copied")


class Writer:
    def write(self, x: Tensor) -> None:
        raise AssertionError("called")


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.writer = Writer()

    def forward(self, x: Tensor) -> Tensor:
        self.writer.write(x)
        return x.relu()


@pytest.mark.parametrize("module", [Printing(), PrintsDeepInside(), Listing(), Perceptual(), Logging()], ids=repr)
def test_activation_of_calls_nothing_that_is_noticed(module: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert activation_of(module) is None
    assert capsys.readouterr().out == ""
    assert SEEN == []


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)


class MemoryEfficientSwish(nn.Module):
    """As EfficientNet's implementations have it."""

    def forward(self, x: Tensor) -> Tensor:
        return SwishFunction.apply(x)


class NewGELU(nn.Module):
    """As language models have it: arithmetic, and a method of its own that is chosen at construction."""

    def __init__(self) -> None:
        super().__init__()
        self.act = self._python

    def _python(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Inherited(NewGELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("module", [MemoryEfficientSwish(), NewGELU(), Inherited(), Wrapped(), SquaredReLU()], ids=repr)
def test_activation_of_reads_other_peoples_code(module: nn.Module) -> None:
    assert activation_of(module) is not None


def test_activation_of_is_asked_once_for_modules_that_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    activation_of(nn.LeakyReLU(0.3))
    monkeypatch.setattr(activations, "traits_of", lambda module: pytest.fail("asked again"))
    assert activation_of(nn.LeakyReLU(0.3)) == ActivationTraits(rectifies=False)


class Late(nn.Module):
    """Finds out its size at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", nn.parameter.UninitializedBuffer())

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_activation_of_a_module_without_memory_yet_is_none() -> None:
    assert activation_of(Late()) is None
