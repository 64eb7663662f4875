"""The gain a nonlinearity needs from the weights behind it, for any name, module or function.

A gain belongs to the nonlinearity that feeds a layer, not to the one its output meets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_init.checks import check_choice, check_positive, did_you_mean
from lightning_init.sandbox import is_elementwise, random_states_kept, sandbox
from lightning_init.schemes.quadrature import second_moment

Elementwise = Callable[[Tensor], Tensor]
Activation = str | nn.Module | Elementwise
Direction = Literal["forward", "backward"]

ACTIVATIONS: Mapping[str, Elementwise] = {
    "linear": lambda z: z,
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "relu2": lambda z: F.relu(z).square(),
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
    "hard_swish": F.hardswish,
    "hardtanh": F.hardtanh,
    "hard_tanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hard_sigmoid": F.hardsigmoid,
}
"""Elementwise activations by name, with torch's own default arguments."""

GATES: Mapping[str, Elementwise] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
}
"""Gated linear units by name, each with the f of f(a)·b."""


def gain_of(activation: Activation, direction: Direction = "forward", *, input_variance: float = 1.0) -> float:
    """Factor by which weights behind ``activation`` must be larger to bring its output back to variance 1.

    With z ~ N(0, v) for v = ``input_variance``: forward 1/√E[f(z)²], backward 1/√E[f′(z)²]. A ReLU halves the mean
    square of what enters it, so its gain is √2. For a gated unit f(a)·b with independent a, b ~ N(0, v): forward
    1/√(E[f(a)²]·E[b²]), the gain of the projection behind it; backward 1/√(E[f′(a)²]·E[b²] + E[f(a)²]), the gain of
    the two projections before it, whose input gradients add.

    Args:
        activation: a name of ``ACTIVATIONS`` or ``GATES``, a module (evaluated on a float64 CPU copy in
            eval mode), or a function that maps a float64 tensor elementwise.
        direction: "forward" keeps the signal, "backward" its gradient.
        input_variance: v, the variance of what enters the activation.

    Returns:
        The gain, above 0. A linear layer keeps the variance with weights of std gain/√fan.

    Raises:
        ValueError: an unknown name or direction; not elementwise; a moment that is 0, infinite or NaN.
        TypeError: ``activation`` is a class or cannot be called.

    >>> abs(gain_of("relu") - 2**0.5) < 1e-9
    True
    >>> abs(gain_of(lambda z: z.relu() ** 2, "backward") - 0.5**0.5) < 1e-9
    True

    References:
        He et al. 2015, "Delving deep into rectifiers", equations 10 and 14, for any f in place of ReLU.
    """
    check_choice("direction", direction, get_args(Direction))
    check_positive("input_variance", input_variance)
    if isinstance(activation, str):
        return _gain_of_name(activation, direction, input_variance)
    if isinstance(activation, nn.GLU):
        return _gain_of_name("glu", direction, input_variance)
    return _gain(activation, False, direction, input_variance)


@functools.lru_cache
def _gain_of_name(name: str, direction: Direction, input_variance: float) -> float:
    """Cached: a plan needs the gain of the same few names once per parameter."""
    known = {**ACTIVATIONS, **GATES}
    if name not in known:
        raise ValueError(
            f"activation is {name!r}; allowed: {', '.join(known)}, or a module or function"
            f"{did_you_mean(name.lower(), known)}"
        )
    return _gain(known[name], name in GATES, direction, input_variance)


def _gain(activation: nn.Module | Elementwise, gated: bool, direction: Direction, input_variance: float) -> float:
    """1/√E[f(z)²] forward or 1/√E[f′(z)²] backward; with the formulas of :func:`gain_of` where f is ``gated``."""
    scale = math.sqrt(input_variance)
    with torch.inference_mode(False), torch.enable_grad(), _as_function(activation) as function:
        _check_elementwise(function)
        if direction == "forward":
            moment = second_moment(lambda z: _values(function, scale * z))
        else:
            moment = second_moment(lambda z: _derivatives(function, scale * z))
        if gated:
            moment *= input_variance  # E[b²]
            if direction == "backward":
                moment += second_moment(lambda z: _values(function, scale * z))
    if not 0 < moment < math.inf:
        forward = direction == "forward"
        what = "E[f(z)²]" if forward else "E[f′(z)²]"
        hint = "" if forward or moment else " (f is constant, or autograd sees no derivative)"
        raise ValueError(
            f"no gain: {what} is {moment} for z of variance {input_variance:g}; it must be finite and above 0{hint}"
        )
    return 1 / math.sqrt(moment)


@contextmanager
def _as_function(activation: nn.Module | Elementwise) -> Iterator[Elementwise]:
    """``forward`` of a module's copy in float64, without hooks or dropout; a function as it is."""
    if isinstance(activation, type):
        raise TypeError(f"activation must be an instance, not the class: {activation.__name__}()")
    if not isinstance(activation, nn.Module):
        if not callable(activation):
            raise TypeError(f"activation must be a name, a module or a function, got {activation!r}")
        with random_states_kept():
            yield activation
        return
    if any(parameter.is_meta for parameter in activation.parameters()):
        raise ValueError(f"{type(activation).__name__} is on the meta device: its parameters have no values yet")
    if isinstance(activation, nn.PReLU):
        # Both moments of a mixture of slopes are those of one slope, their root mean square.
        slope = activation.weight.detach().double().square().mean().sqrt().item()
        yield functools.partial(F.leaky_relu, negative_slope=slope)
        return
    with sandbox(activation, dtype=torch.float64) as copied:
        yield copied.forward


def _values(function: Elementwise, z: Tensor) -> Tensor:
    """f(z) as float64; ValueError where ``function`` fails, or returns anything but one number for each of ``z``."""
    try:
        # A copy, because activations may work in place.
        output = function(z.clone())
    except Exception as error:
        raise ValueError(
            f"the activation does not map a float64 tensor of shape {tuple(z.shape)} elementwise: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != z.shape or not output.is_floating_point():
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the activation must map elementwise: a tensor {tuple(z.shape)} became {got}")
    return output.double()


def _derivatives(function: Elementwise, z: Tensor) -> Tensor:
    """f′(z) by autograd; 0 where autograd sees no dependence."""
    z.requires_grad_()
    output = _values(function, z)
    if not output.requires_grad:
        return torch.zeros_like(z)
    (derivative,) = torch.autograd.grad(output.sum(), z, materialize_grads=True)
    return derivative


def _check_elementwise(function: Elementwise) -> None:
    """Raise ValueError unless each element's result is the same with fewer neighbours, in the reverse order."""
    z = torch.linspace(-3.0, 2.5, 64, dtype=torch.float64, device="cpu")
    backwards = torch.arange(23, -1, -1, device="cpu")
    # 1e-5, because functions may work in float32 inside.
    if not is_elementwise(functools.partial(_values, function), z, groups=[backwards], rtol=1e-5):
        raise ValueError(
            "the activation is not elementwise (or is random): an element's output depends on its neighbours"
        )
