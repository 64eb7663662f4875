from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn

from lightning_init import gain_of
from lightning_init.schemes import quadrature
from lightning_init.schemes.gains import ACTIVATIONS, GATES

# Five digits each, from quadrature at 30 digits with the kinks given.
TABLE: dict[str, tuple[float, float]] = {
    "relu": (1.41421, 1.41421),
    "relu6": (1.41421, 1.41421),
    "leaky_relu": (1.41414, 1.41414),
    "gelu": (1.53353, 1.48111),
    "gelu_tanh": (1.53358, 1.48117),
    "silu": (1.67653, 1.62332),
    "swish": (1.67653, 1.62332),
    "mish": (1.48685, 1.44476),
    "elu": (1.24520, 1.22343),
    "selu": (1.00000, 0.96603),
    "tanh": (1.59254, 1.46741),
    "sigmoid": (1.84623, 4.72265),
    "softplus": (1.04187, 1.84623),
    "hardswish": (1.73666, 1.67008),
    "relu2": (0.81650, 0.70711),
}
GATE_TABLE = {"swiglu": 1.67653, "geglu": 1.53353, "reglu": 1.41421, "glu": 1.84623}


@pytest.mark.parametrize("name", TABLE)
def test_gain_of_published_digits(name: str) -> None:
    forward, backward = TABLE[name]
    assert gain_of(name) == pytest.approx(forward, abs=1e-5)
    assert gain_of(name, "backward") == pytest.approx(backward, abs=1e-5)


@pytest.mark.parametrize("name", GATE_TABLE)
def test_gain_of_a_gated_unit_is_that_of_its_gate(name: str) -> None:
    assert gain_of(name) == pytest.approx(GATE_TABLE[name], abs=1e-5)


@pytest.mark.parametrize(
    ("module", "forward", "backward"),
    [
        (nn.ReLU(), 2**0.5, 2**0.5),
        (nn.ReLU(inplace=True), 2**0.5, 2**0.5),
        (nn.Identity(), 1, 1),
        (nn.LeakyReLU(0.2), (2 / 1.04) ** 0.5, (2 / 1.04) ** 0.5),
        (nn.PReLU(init=0.2), (2 / 1.04) ** 0.5, (2 / 1.04) ** 0.5),
        (nn.PReLU(num_parameters=7, init=0.2), (2 / 1.04) ** 0.5, (2 / 1.04) ** 0.5),
        (nn.Dropout(0.5), 1, 1),  # in eval mode, the identity
        # E[z²; |z| < 1] + P(|z| > 1), and P(|z| < 1)
        (
            nn.Hardtanh(),
            (1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi)) ** -0.5,
            math.erf(0.5**0.5) ** -0.5,
        ),
        (nn.RReLU(0.1, 0.3), (2 / 1.04) ** 0.5, (2 / 1.04) ** 0.5),  # in eval mode, the mean slope
    ],
)
def test_gain_of_modules_in_closed_form(module: nn.Module, forward: float, backward: float) -> None:
    """To 1e-10, or to the float32 of a slope that is a parameter."""
    error = 1e-7 if isinstance(module, nn.PReLU) else 1e-10
    assert gain_of(module) == pytest.approx(forward, rel=error)
    assert gain_of(module, "backward") == pytest.approx(backward, rel=error)


def test_gain_depends_on_a_modules_arguments() -> None:
    assert gain_of(nn.GELU(approximate="tanh")) == gain_of("gelu_tanh") != gain_of("gelu")
    assert gain_of(nn.ELU(alpha=0.5)) > gain_of(nn.ELU(alpha=1.0))
    assert gain_of(nn.GLU()) == gain_of("glu")


class Wave(nn.Module):
    """A learnable activation."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor(frequency))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(self.frequency * z)


@pytest.mark.parametrize("frequency", [0.5, 1.0, 30.0, 300.0])
def test_gain_of_a_learnable_activation(frequency: float) -> None:
    """E[sin²(ωz)] = (1 - exp(-2ω²))/2, and its derivative is ω·cos(ωz)."""
    falloff = math.exp(-2 * frequency**2)
    assert gain_of(Wave(frequency)) == pytest.approx((2 / (1 - falloff)) ** 0.5, rel=1e-9)
    backward = (2 / (1 + falloff)) ** 0.5 / frequency
    assert gain_of(Wave(frequency), "backward") == pytest.approx(backward, rel=1e-9)


@pytest.mark.parametrize("input_variance", [1.0, 0.3])
@pytest.mark.parametrize("name", [*TABLE, *GATE_TABLE])
def test_gain_by_simulation(name: str, input_variance: float) -> None:
    """gain²·f(z)² averages to 1 over a sample; five standard errors of that sample's own mean."""
    generator = torch.Generator().manual_seed(0)
    a, b = math.sqrt(input_variance) * torch.randn(2, 400_000, dtype=torch.float64, generator=generator)
    output = GATES[name](a) * b if name in GATES else ACTIVATIONS[name](a)
    squares = (gain_of(name, input_variance=input_variance) * output).square()
    assert abs(squares.mean() - 1) < 5 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("input_variance", [1.0, 0.3])
@pytest.mark.parametrize("name", [*TABLE, *GATE_TABLE])
def test_gain_by_backward_simulation(name: str, input_variance: float) -> None:
    """A unit gradient at the output has second moment 1/gain² at the inputs, summed over a gate's two."""
    generator = torch.Generator().manual_seed(1)
    inputs = math.sqrt(input_variance) * torch.randn(2, 400_000, dtype=torch.float64, generator=generator)
    inputs.requires_grad_()
    output = GATES[name](inputs[0]) * inputs[1] if name in GATES else ACTIVATIONS[name](inputs[0])
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    squares = (gain_of(name, "backward", input_variance=input_variance) * gradient).square().sum(0)
    assert abs(squares.mean() - 1) < 5 * squares.std() / len(squares) ** 0.5


# name -> where f′ jumps
KINKS = {
    "relu": [0.0], "relu6": [0.0, 6.0], "hardtanh": [-1.0, 1.0], "hardswish": [-3.0, 3.0],
    "gelu": [], "silu": [], "tanh": [], "softplus": [], "elu": [0.0], "selu": [0.0],
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(KINKS)),
    scale=st.floats(0.2, 3),
    shift=st.floats(-2, 2),
    input_variance=st.floats(0.05, 20),
)
def test_gain_agrees_with_a_slow_quadrature_that_knows_the_kinks(
    name: str, scale: float, shift: float, input_variance: float
) -> None:
    def activation(z: Tensor) -> Tensor:
        return ACTIVATIONS[name](scale * z + shift)

    def integrand(z: float) -> float:
        value = activation(torch.tensor([math.sqrt(input_variance) * z], dtype=torch.float64)).item()
        return value**2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    kinks = [(kink - shift) / scale / math.sqrt(input_variance) for kink in KINKS[name]]
    inner = sorted({-12.0, *(kink for kink in kinks if -12 < kink < 12), 0.0, 12.0})
    pieces = [
        quad(integrand, low, high, epsabs=1e-13, epsrel=1e-10, limit=200)[0] for low, high in itertools.pairwise(inner)
    ]
    assume(sum(pieces) > 1e-5)  # the reference's own error is 1e-13
    assert gain_of(activation, input_variance=input_variance) == pytest.approx(sum(pieces) ** -0.5, rel=1e-7)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(ACTIVATIONS)), c=st.floats(0.05, 20), input_variance=st.floats(0.1, 10))
def test_gain_of_scaled_functions(name: str, c: float, input_variance: float) -> None:
    f = ACTIVATIONS[name]
    assert gain_of(lambda z: f(c * z), input_variance=input_variance) == pytest.approx(
        gain_of(name, input_variance=c * c * input_variance), rel=1e-8
    )
    assert gain_of(lambda z: c * f(z), input_variance=input_variance) == pytest.approx(
        gain_of(name, input_variance=input_variance) / c, rel=1e-8
    )
    chained = gain_of(name, "backward", input_variance=c * c * input_variance) / c
    assert gain_of(lambda z: f(c * z), "backward", input_variance=input_variance) == pytest.approx(chained, rel=1e-8)


@given(input_variance=st.floats(1e-6, 1e6), slope=st.floats(0, 1))
@settings(deadline=None)
def test_gain_of_homogeneous_activations_ignores_the_input_variance(input_variance: float, slope: float) -> None:
    leaky = nn.LeakyReLU(slope)
    assert gain_of(leaky, input_variance=input_variance) == pytest.approx(
        (2 / (1 + slope**2) / input_variance) ** 0.5, rel=1e-9
    )
    assert gain_of(leaky, "backward", input_variance=input_variance) == pytest.approx(
        (2 / (1 + slope**2)) ** 0.5, rel=1e-9
    )


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_gain_of_a_gradient_in_a_narrow_interval(shift: float) -> None:
    """At q → ∞ tanh is a step: E[tanh′(z - shift)²] → ∫tanh′² · φ(0)/√q = 4/3 · φ(0)/√q."""
    input_variance = 1e12
    moment = 4 / 3 / math.sqrt(2 * math.pi * input_variance)
    gain = gain_of(lambda z: torch.tanh(z - shift), "backward", input_variance=input_variance)
    assert gain == pytest.approx(moment**-0.5, rel=1e-6)


def test_gain_of_large_functions_does_not_overflow() -> None:
    """E[e^(20z)] = e^200 for e^z at q = 100: values reach 1e165, whose square is no float64."""
    assert gain_of(torch.exp, input_variance=100.0) == pytest.approx(math.exp(-100), rel=1e-9)


def test_gain_of_changes_nothing() -> None:
    module = nn.Sequential(nn.PReLU(), nn.RReLU(), nn.Dropout(0.3)).train()
    calls: list[nn.Module] = []
    module.register_forward_hook(lambda called, inputs, output: calls.append(called))
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        gain_of(module)
        gain_of(module, "backward")
    with pytest.raises(ValueError, match="random"):
        gain_of(lambda z: nn.functional.dropout(z, 0.5))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(child.training for child in module.modules())
    assert next(module.parameters()).dtype == torch.float32
    assert next(module.parameters()).grad is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not calls


def test_gain_of_ignores_the_default_device() -> None:
    def cubic(z: Tensor) -> Tensor:
        return z**3

    quadrature._panels.cache_clear()  # made anew, under the default device
    quadrature._clenshaw_curtis.cache_clear()
    with torch.device("meta"):
        assert gain_of(cubic) == pytest.approx(15**-0.5, rel=1e-10)  # E[z⁶] = 15


def test_gain_of_different_slopes_is_their_root_mean_square() -> None:
    module = nn.PReLU(num_parameters=2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-0.3, 0.9]))
    assert gain_of(module) == pytest.approx((2 / (1 + (0.09 + 0.81) / 2)) ** 0.5, rel=1e-6)


def test_gain_of_functions_in_float32() -> None:
    assert gain_of(lambda z: z.float().relu()) == pytest.approx(2**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("Gelo", r"activation is 'Gelo'; allowed: .*, tanh, .*, or a module or function; did you mean 'gelu'\?"),
        ("ReLU", r"; did you mean 'relu'\?"),
        (nn.Softmax(0), "not elementwise"),
        (lambda z: z.cumsum(0), "not elementwise"),
        (lambda z: z - z.mean(), "not elementwise"),
        (lambda z: z.sum(), r"must map elementwise: a tensor \(64,\) became shape \(\)"),
        (lambda z: (z, z), r"must map elementwise: a tensor \(64,\) became tuple"),
        (lambda z: z > 0, "must map elementwise"),
        (nn.Linear(3, 3), r"does not map a float64 tensor .* elementwise: RuntimeError: mat1 and mat2"),
        (nn.PReLU(device="meta"), "PReLU is on the meta device"),
        (lambda z: 0 * z, r"no gain: E\[f\(z\)²\] is 0.0 for z of variance 1"),
        (lambda z: z.log(), r"E\[f\(z\)²\] is nan"),
        (lambda z: (z.square() / 4).exp(), r"E\[f\(z\)²\] is inf"),
        (lambda z: 1 / z, "does not settle"),
    ],
)
def test_gain_that_does_not_exist_raises_with_the_reason(
    activation: str | nn.Module | Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gain_of(activation)


def test_gain_backward_needs_a_derivative() -> None:
    with pytest.raises(ValueError, match=r"E\[f′\(z\)²\] is 0.0 .*autograd sees no derivative"):
        gain_of(torch.sign, "backward")
    with pytest.raises(ValueError, match=r"E\[f′\(z\)²\] is 0.0"):
        gain_of(lambda z: z.detach(), "backward")


def test_gain_of_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="direction is 'sideways'; allowed: forward, backward"):
        gain_of("relu", "sideways")
    for input_variance in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="input_variance must be a finite number above 0"):
            gain_of("relu", input_variance=input_variance)
    with pytest.raises(TypeError, match=r"an instance, not the class: ReLU\(\)"):
        gain_of(nn.ReLU)
    with pytest.raises(TypeError, match="a name, a module or a function, got 3"):
        gain_of(3)
