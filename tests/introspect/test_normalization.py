from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_init import Constant
from lightning_init.introspect.normalization import batches_tracked, is_norm_by_name, norm_role
from lightning_init.introspect.roles import role_of
from tests.support.modules import GemmaRMSNorm, LlamaRMSNorm


class MambaRMSNormGated(LlamaRMSNorm):
    """Cannot be called with one argument."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * self.normalised(x * nn.functional.silu(gate))


class GemmaRMSNormGated(GemmaRMSNorm):
    """Zero-centred, and seen to be so only with two arguments."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x * nn.functional.silu(gate))


class ZeroCentredLayerNorm(nn.LayerNorm):
    """Zero-centred under a torch class."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Channels first: fails on [batch, units]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ZeroCentredLayerNorm2d(ZeroCentredLayerNorm):
    """Zero-centred, and seen to be so only with channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CountingNorm(nn.Module):
    """Keeps statistics, as batch norm does."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))
        self.bias = nn.Parameter(torch.zeros(units))
        self.register_buffer("mean", torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += x.mean(0)
        return self.weight * (x - self.mean) + self.bias


class OuterNorm(nn.Module):
    """Keeps its statistics in another module."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))
        self.inner = nn.BatchNorm1d(units, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.inner(x)


class UncallableNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a kernel this machine does not have")


class NormalizedLinear(nn.Module):
    """Not a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


NORMS = [
    (lambda: LlamaRMSNorm(6), 1.0),
    (lambda: GemmaRMSNorm(6, start=0.0), 0.0),
    (lambda: MambaRMSNormGated(6), 1.0),
    (lambda: ZeroCentredLayerNorm(6), 0.0),
    (lambda: GemmaRMSNormGated(6), 0.0),
    (lambda: LayerNorm2d(6), 1.0),
    (lambda: ZeroCentredLayerNorm2d(6), 0.0),
    (lambda: CountingNorm(6), 1.0),
    (lambda: OuterNorm(6), 1.0),
    (lambda: UncallableNorm(6), 1.0),
    (lambda: nn.LayerNorm(6), 1.0),
    (lambda: nn.BatchNorm1d(6), 1.0),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "expected"), NORMS)
def test_norm_scale_starts_at_one_or_at_zero_where_one_is_added(
    make: type[nn.Module], expected: float, device: str
) -> None:
    with torch.device(device):
        module = make()
    role = role_of(module, "weight")
    assert role is not None
    assert role.kind == "norm"
    assert role.default == Constant(expected)


def test_norm_role_ignores_the_present_weight() -> None:
    """Memory from ``to_empty`` is often all zeros, and a scale of 0 would cut the signal off."""
    assert norm_role(LlamaRMSNorm(6, start=0.0), "weight").default == Constant(1.0)
    assert norm_role(GemmaRMSNorm(6, start=0.7), "weight").default == Constant(0.0)


def test_norm_bias_starts_at_zero() -> None:
    role = role_of(CountingNorm(6), "bias")
    assert role is not None
    assert role.default == Constant(0.0)
    assert role.starts_at_zero


def test_norm_role_changes_nothing() -> None:
    for module in (CountingNorm(6), OuterNorm(6), LlamaRMSNorm(6)):
        module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
        before, attributes = copy.deepcopy(module.state_dict()), dict(module.__dict__)
        random_state = torch.get_rng_state()
        role_of(module, "weight")
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert module.__dict__ == attributes
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("class_name", "is_norm"),
    [
        ("T5LayerNorm", True),
        ("RMSNorm", True),
        ("FalconMambaMixerRMSNormGated", True),
        ("LayerNorm2d", True),
        ("ScaleNorm", True),
        ("Normalize", False),
        ("NormalHead", False),
        ("LayerScale", False),
    ],
)
def test_norm_names(class_name: str, is_norm: bool) -> None:
    module = type(class_name, (NormalizedLinear,), {})()
    assert is_norm_by_name(module, "weight") is is_norm


def test_batches_tracked_counts_those_of_batch_norms() -> None:
    module = nn.BatchNorm1d(3)
    assert batches_tracked(module) == 0
    module(torch.randn(4, 3))
    module.eval()(torch.randn(4, 3))
    assert batches_tracked(module) == 1
    assert batches_tracked(nn.BatchNorm1d(3, track_running_stats=False)) == 0
    assert batches_tracked(nn.BatchNorm1d(3, device="meta")) == 0
    assert batches_tracked(nn.LayerNorm(3)) == 0


def test_norm_role_of_one_dimensional_weight_and_bias_only() -> None:
    assert role_of(NormalizedLinear(), "weight") is None
    module = LlamaRMSNorm(6)
    module.register_parameter("logit_scale", nn.Parameter(torch.ones(6)))
    assert role_of(module, "logit_scale") is None
    module.weight = nn.Parameter(torch.ones(2, 3))
    assert role_of(module, "weight") is None
    assert role_of(module, "bias") is None
