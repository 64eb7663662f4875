from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_init import Constant, Uniform
from lightning_init.introspect.roles import role_of
from lightning_init.introspect.torch_roles import TORCH_ROLES, other_bias_draws

MODULES: list[nn.Module] = [
    nn.Linear(200, 300),
    nn.Bilinear(20, 30, 40),
    nn.Conv1d(40, 60, 5),
    nn.Conv2d(40, 60, 3, groups=4),
    nn.Conv3d(20, 40, (2, 3, 4), stride=2),
    nn.ConvTranspose1d(40, 60, 5),
    nn.ConvTranspose2d(40, 80, 3, groups=4, stride=2),
    nn.ConvTranspose3d(20, 40, (2, 3, 4)),
    nn.MultiheadAttention(120, 4, add_bias_kv=True),
    nn.MultiheadAttention(120, 4, kdim=60, vdim=90),
    nn.RNN(50, 80, num_layers=2),
    nn.LSTM(50, 80, num_layers=2, bidirectional=True, proj_size=60),
    nn.GRU(50, 80, bidirectional=True),
    nn.RNNCell(50, 80),
    nn.LSTMCell(50, 80),
    nn.GRUCell(50, 80),
    nn.Embedding(300, 40),
    nn.EmbeddingBag(300, 40, mode="mean"),
    nn.BatchNorm1d(50),
    nn.BatchNorm2d(50),
    nn.BatchNorm3d(50),
    nn.SyncBatchNorm(50),
    nn.InstanceNorm1d(50, affine=True),
    nn.InstanceNorm2d(50, affine=True),
    nn.InstanceNorm3d(50, affine=True),
    nn.LayerNorm((5, 10)),
    nn.GroupNorm(5, 50),
    nn.RMSNorm((5, 10)),
    nn.PReLU(5, init=0.1),
]


def test_torch_roles_are_all_tested() -> None:
    tested = {cls for module in MODULES for inner in module.modules() for cls in type(inner).__mro__}
    assert {known for known in TORCH_ROLES if not isinstance(known, str)} <= tested


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_default_of_torch_roles_is_what_torch_draws(module: nn.Module) -> None:
    """Std within five of its standard errors, √((kurtosis - 1)/4n); a uniform's largest value at its bound."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            role = role_of(inner, name)
            assert role is not None, name
            values, default = parameter.detach().double(), role.default
            if isinstance(default, Constant):
                assert (parameter == default.value).all(), name
                assert role.starts_at_zero == (default.value == 0), name
                continue
            error = math.sqrt((default.kurtosis - 1) / 4 / values.numel())
            rms = values.square().mean().sqrt().item()
            assert rms == pytest.approx(default.target_std, rel=5 * error), name
            if isinstance(default, Uniform):
                # The largest of n misses the bound by 1/n on average, by 12/n once in 160 000.
                largest = values.abs().max().item() / default.high
                assert 1 - 12 / values.numel() < largest <= 1 + 1e-6, name
            assert not role.starts_at_zero


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_chunks_and_groups_divide_the_parameter(module: nn.Module) -> None:
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            role = role_of(inner, name)
            assert role is not None
            assert parameter.shape[0] % (len(role.slices) * role.groups) == 0, name


@pytest.mark.parametrize("module", [nn.LSTM(3, 4, 2, bidirectional=True), nn.LSTMCell(3, 4)])
def test_forget_gate_is_open_in_one_of_two_biases(module: nn.Module) -> None:
    """The vectors are added, so a 1 in each would make 2 (Jozefowicz et al. 2015 ask for 1)."""
    for name, _ in module.named_parameters():
        role = role_of(module, name)
        assert role is not None
        if "bias" in name:
            assert role.slices == ("i", "f", "g", "o")
            assert role.bias_values == ((0, 1, 0, 0) if "ih" in name else None)


def test_biases_are_zero_otherwise() -> None:
    for module in MODULES:
        for name, _ in module.named_parameters(recurse=False):
            if not isinstance(module, (nn.LSTM, nn.LSTMCell)):
                role = role_of(module, name)
                assert role is not None
                assert role.bias_values is None


def test_kinds_of_roles() -> None:
    def kinds(module: nn.Module) -> dict[str, str | None]:
        roles = {name: role_of(module, name) for name, _ in module.named_parameters(recurse=False)}
        return {name: role.kind if role else None for name, role in roles.items()}

    assert kinds(nn.Conv2d(2, 3, 1)) == {"weight": "weight", "bias": "bias"}
    assert kinds(nn.LayerNorm(3)) == {"weight": "norm", "bias": "norm"}
    assert kinds(nn.Embedding(3, 4)) == {"weight": "embedding"}
    assert kinds(nn.PReLU()) == {"weight": "other"}
    assert kinds(nn.MultiheadAttention(4, 1, add_bias_kv=True)) == {
        "in_proj_weight": "weight",
        "in_proj_bias": "bias",
        "bias_k": "other",
        "bias_v": "other",
    }


def test_attention_output_bias_is_zero_by_default() -> None:
    attention = role_of(nn.MultiheadAttention(8, 1).out_proj, "bias")
    linear = role_of(nn.Linear(8, 8), "bias")
    assert attention is not None
    assert attention.starts_at_zero
    assert linear is not None
    assert not linear.starts_at_zero


def test_padding_rows_and_storage_order() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        role = role_of(kind(9, 4, padding_idx=-1), "weight")
        assert role is not None
        assert role.padding_index == 8
    transposed = role_of(nn.ConvTranspose1d(4, 6, 3), "weight")
    assert transposed is not None
    assert transposed.transposed


def test_bilinear_default_grows_with_its_second_input() -> None:
    """U(±1/√in1) has variance 1/(3·in1): in1·in2 products of variance 1 add up to in2/3."""
    role = role_of(nn.Bilinear(20, 30, 40), "weight")
    assert role is not None
    assert role.fans is not None
    assert role.fans.fan_in * role.default.target_std**2 == pytest.approx(30 / 3)


def test_other_bias_draws_of_transposed_convolutions_divide_by_the_inputs() -> None:
    assert other_bias_draws(nn.ConvTranspose2d(8, 6, (3, 2), groups=2)) == [Uniform(-(24**-0.5), 24**-0.5)]
    assert other_bias_draws(nn.Conv2d(8, 6, (3, 2), groups=2)) == []
    assert other_bias_draws(nn.Linear(8, 6)) == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_layer_without_inputs_has_a_default() -> None:
    for name in ("weight", "bias"):
        role = role_of(nn.Linear(0, 3), name)
        assert role is not None
        assert role.default == Constant(0.0)
