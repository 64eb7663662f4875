"""Every fan by simulation: weights of variance 1/fan keep a variance of 1, forward or backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.init import _calculate_fan_in_and_fan_out

from lightning_init import Fans, fans_of
from lightning_init.introspect.roles import role_of
from lightning_init.schemes.fans import bilinear_fans, conv_fans, conv_transpose_fans, embedding_bag_fans
from tests.support.modules import TransformersConv1D
from tests.support.simulation import Case, attention, convolution, measure, recurrent, zeroed


def matrix(name: str, module: nn.Module, shape: tuple[int, ...]) -> Case:
    return Case(name, zeroed(module), "weight", lambda module, inputs: module(inputs), shape)


def bilinear(name: str, module: nn.Bilinear) -> Case:
    other = torch.randn(400, module.in2_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Case(name, zeroed(module), "weight", lambda m, x: m(x, other), (400, module.in1_features))


def conv(kind: type[nn.Module], *arguments: int, **options: object) -> nn.Module:
    return kind(*arguments, bias=False, **options)


CASES = [
    matrix("Linear", nn.Linear(300, 150), (500, 300)),
    matrix("transformers Conv1D", TransformersConv1D(150, 300), (500, 300)),
    bilinear("Bilinear", nn.Bilinear(30, 50, 40)),
    convolution("Conv1d", conv(nn.Conv1d, 32, 64, 5), (16, 32, 80)),
    convolution("Conv1d stride", conv(nn.Conv1d, 32, 64, 5, stride=3), (32, 32, 150)),
    convolution("Conv1d kernel below stride", conv(nn.Conv1d, 64, 64, 2, stride=4), (64, 64, 120)),
    convolution("Conv2d", conv(nn.Conv2d, 32, 64, 3), (4, 32, 24, 24)),
    convolution("Conv2d 3x5", conv(nn.Conv2d, 32, 48, (3, 5)), (4, 32, 30, 30)),
    convolution("Conv2d stride", conv(nn.Conv2d, 32, 64, 3, stride=2), (8, 32, 36, 36)),
    convolution("Conv2d stride 1x2", conv(nn.Conv2d, 32, 64, 3, stride=(1, 2)), (8, 32, 36, 36)),
    convolution("Conv2d dilation", conv(nn.Conv2d, 32, 64, 3, dilation=2), (4, 32, 36, 36)),
    convolution("Conv2d groups", conv(nn.Conv2d, 32, 64, 3, groups=4), (4, 32, 30, 30)),
    convolution("Conv2d depthwise", conv(nn.Conv2d, 256, 256, 3, groups=256), (4, 256, 20, 20)),
    convolution("Conv2d depthwise x2", conv(nn.Conv2d, 128, 256, 3, groups=128, stride=2), (8, 128, 28, 28)),
    convolution("Conv3d", conv(nn.Conv3d, 16, 24, 3), (8, 16, 16, 16, 16)),
    convolution("Conv3d stride groups", conv(nn.Conv3d, 16, 32, 2, stride=2, groups=2), (16, 16, 16, 16, 16)),
    convolution("ConvTranspose1d", conv(nn.ConvTranspose1d, 64, 32, 4, stride=2), (16, 64, 60)),
    convolution("ConvTranspose1d dilation", conv(nn.ConvTranspose1d, 64, 32, 3, dilation=2), (16, 64, 60)),
    convolution("ConvTranspose2d", conv(nn.ConvTranspose2d, 32, 48, 3), (4, 32, 24, 24)),
    convolution("ConvTranspose2d k3 s2", conv(nn.ConvTranspose2d, 64, 32, 3, stride=2), (8, 64, 28, 28)),
    convolution("ConvTranspose2d k4 s2", conv(nn.ConvTranspose2d, 64, 32, 4, stride=2), (8, 64, 28, 28)),
    convolution("ConvTranspose2d groups", conv(nn.ConvTranspose2d, 32, 64, 4, stride=2, groups=4), (8, 32, 28, 28)),
    convolution("ConvTranspose3d", conv(nn.ConvTranspose3d, 24, 16, 2, stride=2), (4, 24, 12, 12, 12)),
    *(attention(f"attention packed {r}", "in_proj_weight", r, 128, 128) for r in "qkv"),
    *(attention(f"attention {r}", f"{r}_proj_weight", r, 160, 144) for r in "qkv"),
    *(recurrent(f"LSTM ih {g}", nn.LSTM(90, 120), "weight_ih_l0", g) for g in range(4)),
    *(recurrent(f"LSTM hh {g}", nn.LSTM(90, 120), "weight_hh_l0", g) for g in range(4)),
    *(recurrent(f"GRU ih {g}", nn.GRU(90, 120), "weight_ih_l0", g) for g in range(3)),
    *(recurrent(f"GRU hh {g}", nn.GRU(90, 120), "weight_hh_l0", g) for g in range(3)),
    recurrent("RNN ih", nn.RNN(90, 120), "weight_ih_l0"),
    recurrent("RNN relu hh", nn.RNN(90, 120, nonlinearity="relu"), "weight_hh_l0"),
    recurrent("LSTM reverse", nn.LSTM(90, 120, bidirectional=True), "weight_ih_l0_reverse", 1),
    recurrent("LSTM projected hh", nn.LSTM(90, 120, proj_size=80), "weight_hh_l0", 2),
    recurrent("LSTM projection", nn.LSTM(120, 120, proj_size=80), "weight_hr_l0"),
    recurrent("LSTM stacked", nn.LSTM(120, 120, num_layers=2), "weight_ih_l1", 3),
    recurrent("LSTM stacked both ways", nn.LSTM(240, 120, num_layers=2, bidirectional=True), "weight_ih_l1", 0),
    recurrent(
        "LSTM stacked projected both ways",
        nn.LSTM(160, 120, num_layers=2, bidirectional=True, proj_size=80),
        "weight_ih_l1",
        1,
    ),
    recurrent("GRU stacked both ways", nn.GRU(240, 120, num_layers=2, bidirectional=True), "weight_ih_l1", 1),
    recurrent("LSTMCell ih", nn.LSTMCell(90, 120), "weight_ih", 2),
    recurrent("LSTMCell hh", nn.LSTMCell(90, 120), "weight_hh", 1),
    recurrent("GRUCell hh", nn.GRUCell(90, 120), "weight_hh", 0),
    recurrent("RNNCell ih", nn.RNNCell(90, 120), "weight_ih"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fans_keep_a_variance_of_one(case: Case) -> None:
    role = role_of(case.module, case.parameter)
    assert role is not None
    fans = fans_of(case.module, case.parameter)
    forward = measure(case, len(role.slices), 1 / fans.fan_in)
    backward = measure(case, len(role.slices), 1 / fans.fan_out)
    assert forward.tolerance < 0.2
    assert forward.forward == pytest.approx(1, abs=forward.tolerance)
    assert backward.backward == pytest.approx(1, abs=backward.tolerance)


# torch's own fans are wrong by these factors: where, the measured variance with 1/torch's fan.
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("Linear", 1, 1),
        ("Conv2d", 1, 1),
        ("Conv2d depthwise", 1, 1 / 256),
        ("Conv2d groups", 1, 1 / 4),
        ("Conv2d stride", 1, 1 / 4),
        ("ConvTranspose1d", 64 / 32 / 2, 32 / 64),
        ("ConvTranspose2d k4 s2", 64 / 32 / 4, 32 / 64),
        ("attention packed v", 1, 1 / 3),
        ("LSTM ih 2", 1, 1 / 4),
        ("GRU ih 2", 1, 1 / 3),
        ("transformers Conv1D", 300 / 150, 150 / 300),
        ("Bilinear", 1, 1),
    ],
)
def test_fans_by_torch_give_another_variance(name: str, forward: float, backward: float) -> None:
    (case,) = [case for case in CASES if case.name == name]
    role = role_of(case.module, case.parameter)
    assert role is not None
    fan_in, fan_out = _calculate_fan_in_and_fan_out(case.module.get_parameter(case.parameter))
    measured = measure(case, len(role.slices), 1 / fan_in)
    assert measured.forward == pytest.approx(forward, rel=measured.tolerance)
    measured = measure(case, len(role.slices), 1 / fan_out)
    assert measured.backward == pytest.approx(backward, rel=measured.tolerance)


@pytest.mark.parametrize(("packed", "expected"), [(False, 1.0), (True, 0.5)])
def test_attention_logits_have_unit_variance_only_with_fans_per_slice(packed: bool, expected: float) -> None:
    """q·k/√d sums d products: std E·std(W)², so 1 for std 1/√E and ½ for Xavier over the packed matrix."""
    width, tokens = 256, 64
    attention = nn.MultiheadAttention(width, 4, bias=False, batch_first=True).double()
    generator = torch.Generator().manual_seed(0)
    fan_in, fan_out = fans_of(attention, "in_proj_weight")
    std = math.sqrt(2 / (fan_in + (3 * fan_out if packed else fan_out)))
    with torch.no_grad():
        attention.in_proj_weight.normal_(0, std, generator=generator)
        x = torch.randn(8, tokens, width, dtype=torch.float64, generator=generator)
        attended = attention(x, x, x, average_attn_weights=False)[1]  # [batch, heads, queries, keys]
    logits = attended.log()
    logits -= logits.mean(-1, keepdim=True)  # softmax hides a constant, and costs 1/tokens of the variance
    # About 8·64·256 independent inputs and 2·256² weights: 5 √(2/131072 + 2·2/65536) = 4 %.
    assert logits.std().item() == pytest.approx(expected * math.sqrt(1 - 1 / tokens), rel=0.04)


def test_transposed_convolution_phases_differ_unless_the_stride_divides_the_kernel() -> None:
    """Kernel 3, stride 2: 2 or 1 taps a dimension against 1.5 on average: 16/9, 8/9, 8/9, 4/9."""
    generator = torch.Generator().manual_seed(0)
    for kernel, expected in ((3, (16 / 9, 8 / 9, 8 / 9, 4 / 9)), (4, (1, 1, 1, 1))):
        module = nn.ConvTranspose2d(64, 64, kernel, stride=2, bias=False)
        fan_in = fans_of(module, "weight").fan_in
        with torch.no_grad():
            module.weight.normal_(0, fan_in**-0.5, generator=generator)
            output = module(torch.randn(8, 64, 40, 40, generator=generator))[:, :, 4:76, 4:76]
        phases = [output[:, :, i::2, j::2].square().mean().item() for i in (0, 1) for j in (0, 1)]
        # The phase with one tap has 64·64 weights: 5 √(2/4096) = 11 %; the others more.
        assert phases == pytest.approx(expected, rel=0.11)


@pytest.mark.parametrize("bag_size", [1, 4, 16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_fans(mode: str, bag_size: int) -> None:
    bag = nn.EmbeddingBag(2000, 64, mode=mode)
    generator = torch.Generator().manual_seed(0)
    fan_in = fans_of(bag, "weight", bag_size=bag_size).fan_in
    with torch.no_grad():
        bag.weight.normal_(0, fan_in**-0.5, generator=generator)
        output = bag(torch.randint(2000, (4000, bag_size), generator=generator))
    # 2000·64 weights, each used several times: 5 √(2/128000) = 2 %, twice that for the reuse.
    assert output.square().mean().item() == pytest.approx(1, rel=0.04)


def test_fans_of_indices_and_of_a_maximum_are_absent() -> None:
    for module in (nn.Embedding(10, 4), nn.EmbeddingBag(10, 4, mode="max")):
        fan_in, fan_out = fans_of(module, "weight")
        assert fan_in == 1
        assert math.isnan(fan_out)
    assert math.isnan(embedding_bag_fans("max", 2).fan_in)


def test_fans_arithmetic() -> None:
    assert conv_fans(32, 64, (3, 5), (2, 1), groups=4) == Fans(8 * 15, 16 * 15 / 2)
    assert conv_transpose_fans(32, 64, (3, 5), (2, 1), groups=4) == Fans(8 * 15 / 2, 16 * 15)
    assert bilinear_fans(3, 5, 7) == Fans(15, 35)
