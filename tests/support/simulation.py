"""Does a weight keep variance 1? Draw it, feed N(0, 1) through the real module, and measure.

A :class:`Case` says how the output of one slice of one parameter is read off its module so that it is linear
in that slice and in the input. Forward, ``Var(weight) = 1/fan_in`` must give the output the second moment 1;
backward, ``Var(weight) = 1/fan_out`` must give it to the input's gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALL = 1e-5  # inputs of this size see a smooth function as linear, to 1e-5


class Moments(NamedTuple):
    """What was measured and how far it may be off."""

    forward: float
    backward: float
    tolerance: float


@dataclass
class Case:
    """One slice of one weight, and how to see it at work.

    ``overlap`` is the number of outputs that share an input through the same weights (∏k of a
    convolution): so many neighbours may be correlated, so much smaller is the sample. ``share`` is the share
    of the slice's units that the output shows, and so of the gradient that comes back.
    """

    name: str
    module: nn.Module
    parameter: str
    read: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, ...]
    slice: int = 0
    overlap: int = 1
    share: float = 1.0
    interior: Callable[[Tensor], Tensor] = lambda tensor: tensor


def measure(case: Case, num_slices: int, variance: float, seed: int = 0) -> Moments:
    """Second moments of output and input gradient for weights N(0, variance).

    Tolerance: given everything else, the measured moment is a quadratic form in the Gaussian weights, inputs
    and output gradients, each adding a relative variance of 2/(number of them), or 2·overlap/number at worst
    where neighbours share terms. Five standard deviations of the sum are allowed, and 1e-4 for what ``SMALL``
    leaves of curvature.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weight = case.module.get_parameter(case.parameter)
    rows = weight.shape[0] // num_slices
    drawn = math.sqrt(variance) * normal((rows, *weight.shape[1:]))
    inputs = normal(case.shape).requires_grad_()
    module = with_slice(case.module, case.parameter, case.slice, drawn)
    output = case.read(module, inputs)
    (gradient,) = torch.autograd.grad(output, inputs, normal(tuple(output.shape)))
    seen, came_back = case.interior(output.detach()), case.interior(gradient)
    sample = 2 / drawn.numel() + 2 * case.overlap * (1 / seen.numel() + 1 / came_back.numel())
    backward = came_back.square().mean().item() / case.share
    return Moments(seen.square().mean().item(), backward, 5 * math.sqrt(sample) + 1e-4)


def with_slice(module: nn.Module, parameter: str, index: int, values: Tensor) -> nn.Module:
    """A float64 copy of the module with one chunk of rows replaced."""
    module = copy.deepcopy(module).double()
    rows = len(values)
    with torch.no_grad():
        module.get_parameter(parameter)[index * rows : (index + 1) * rows] = values
    return module.requires_grad_(False)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def interior(margin: int, period: int) -> Callable[[Tensor], Tensor]:
    """Cuts ``margin`` positions off every spatial side of [batch, channels, …] and keeps whole periods."""

    def cut(tensor: Tensor) -> Tensor:
        for dim in range(2, tensor.ndim):
            length = (tensor.shape[dim] - 2 * margin) // period * period
            tensor = tensor.narrow(dim, margin, length)
        return tensor

    return cut


def convolution(name: str, module: nn.Module, shape: tuple[int, ...]) -> Case:
    """A (transposed) convolution without bias, read in its interior."""
    kernel, stride = module.kernel_size, module.stride
    reach = max(k * d for k, d in zip(kernel, module.dilation, strict=True))
    margin = math.ceil(reach / max(stride)) * max(stride)
    return Case(
        name,
        zeroed(module),
        "weight",
        lambda module, inputs: module(inputs),
        shape,
        overlap=math.prod(kernel),
        interior=interior(margin, max(stride)),
    )


def attention(name: str, parameter: str, role: str, kdim: int, vdim: int, width: int = 128) -> Case:
    """One of q, k, v in one head, whose attention is read at the linear end of the softmax.

    The other two projections are identities on unit vectors (so kdim and vdim are at least ``width``), and
    attention over the tokens e_j returns (1 + SMALL·(projected value - its mean over tokens)) / tokens.
    Taking the mean away costs 1/tokens of the variance, which √(tokens / (tokens - 1)) gives back.
    """
    module = nn.MultiheadAttention(width, 1, bias=False, kdim=kdim, vdim=vdim, batch_first=True).double()
    features = {"q": width, "k": kdim, "v": vdim}
    one_hot = {key: torch.eye(width, size, dtype=torch.float64)[None] for key, size in features.items()}
    zeroed(module).out_proj.weight.data.copy_(one_hot["q"][0])
    for index, key in enumerate(features):
        if key != role:
            packed = module.in_proj_weight
            weight = getattr(module, f"{key}_proj_weight") if packed is None else packed.chunk(3)[index]
            weight.data.copy_(one_hot[key][0])

    def read(module: nn.Module, inputs: Tensor) -> Tensor:
        if role == "v":  # a single key: the value itself
            return module(torch.zeros(len(inputs), 1, width).double(), inputs.new_zeros(len(inputs), 1, kdim), inputs)[
                0
            ]
        units = math.sqrt(width) * one_hot["k" if role == "q" else "q"]  # cancels the logits' 1/√width
        pair = (SMALL * inputs, units) if role == "q" else (SMALL * units, inputs)
        mixed = module(*(part.expand(len(inputs), -1, -1) for part in (*pair, one_hot["v"])))[0]
        return (mixed * width - 1) / SMALL * math.sqrt(width / (width - 1))

    shape = (256, 1, vdim) if role == "v" else (4, width, features[role])
    index = "qkv".index(role) if parameter == "in_proj_weight" else 0
    return Case(name, module, parameter, read, shape, slice=index)


def recurrent(name: str, module: nn.Module, parameter: str, gate: int = 0, batch: int = 512) -> Case:
    """One gate of one weight of an RNN, LSTM or GRU (or a cell), read off its real output.

    Everything else is constant, so a small change of the gate's pre-activation moves the output by the same
    unknown factor in every unit: a weight of equal entries, whose pre-activation is known, measures it. Layer
    0 hands the input on where a later weight is looked at.
    """
    module = zeroed(module).double()
    later = "_l1" in parameter or "weight_hr" in parameter
    with torch.no_grad():
        for other, value in module.named_parameters():
            if "bias" in other and not (later and "_l0" in other):
                value.fill_(0.3)  # where no gate's slope is 0
            elif later and other.startswith("weight_ih_l0"):
                _hand_on(module, value, second_half="reverse" in other)
            elif other.startswith("weight_hr"):
                value.fill_diagonal_(1.0)
    columns = module.get_parameter(parameter).shape[1]
    rows = module.proj_size if "weight_hr" in parameter else module.hidden_size

    def response(module: nn.Module, inputs: Tensor) -> Tensor:
        without = with_slice(module, parameter, gate, torch.zeros(rows, columns, dtype=torch.float64))
        moved, still = (_step(m, SMALL * inputs, parameter) for m in (module, without))
        return (moved - still) / SMALL

    level = with_slice(module, parameter, gate, torch.full((rows, columns), 1 / columns, dtype=torch.float64))
    factor = response(level, torch.ones(1, columns, dtype=torch.float64)).mean().item()
    projection = getattr(module, "proj_size", 0)
    share = projection / module.hidden_size if projection and "weight_hr" not in parameter else 1.0
    case = Case(name, module, parameter, lambda m, x: response(m, x) / factor, (batch, columns))
    return replace(case, slice=gate, share=share)


def _hand_on(module: nn.Module, weight_ih: Tensor, second_half: bool) -> None:
    """Let layer 0 output a multiple of its input, through its candidate gate; each direction takes a half."""
    start = (2 if module.mode in ("LSTM", "GRU") else 0) * module.hidden_size
    width = module.input_size // (1 + module.bidirectional)
    half = width if second_half else 0
    weight_ih[start : start + width, half : half + width].fill_diagonal_(1.0)


def _step(module: nn.Module, inputs: Tensor, parameter: str) -> Tensor:
    """The forward (or reverse) output after one time step, with inputs [batch, features] or hidden states."""
    batch, hidden, as_state = len(inputs), module.hidden_size, "weight_hh" in parameter
    cell = isinstance(module, nn.RNNCellBase)
    directions = 1 if cell else 1 + module.bidirectional
    layers = directions * (1 if cell else module.num_layers)
    x = inputs.new_zeros(batch, module.input_size) if as_state else inputs
    projected = getattr(module, "proj_size", 0) or hidden
    state = inputs if as_state else inputs.new_zeros(batch, projected)
    memory = inputs.new_full((layers, batch, hidden), 0.5)
    if "_l1" in parameter or "weight_hr" in parameter:
        memory[:directions] = 0.0  # what layer 0 hands on must vanish with its input
    if isinstance(module, nn.LSTMCell):
        return module(x, (state, memory[0]))[0]
    if cell:
        return module(x, state)
    states = state.expand(layers, -1, -1)
    output, _ = module(x[None], (states, memory) if module.mode == "LSTM" else states)
    return output[0, :, projected:] if "reverse" in parameter else output[0, :, :projected]
