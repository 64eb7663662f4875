from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_init.schemes.quadrature import second_moment


@pytest.mark.parametrize("power", range(8))
def test_quadrature_of_polynomials_is_exact(power: int) -> None:
    """E[z^(2k)] = (2k - 1)!! = 1·3·5·…"""
    moment = math.prod(range(1, 2 * power, 2))
    assert second_moment(lambda z: z**power) == pytest.approx(moment, rel=1e-11)


@settings(deadline=None)
@given(where=st.floats(-6, 6))
def test_quadrature_of_a_jump_anywhere(where: float) -> None:
    """P(z > where) = erfc(where/√2)/2."""
    expected = math.erfc(where / math.sqrt(2)) / 2
    assert second_moment(lambda z: (z > where).double()) == pytest.approx(expected, rel=1e-9, abs=1e-11)


@settings(deadline=None)
@given(where=st.floats(-3, 3), width=st.floats(1e-3, 1))
def test_quadrature_of_a_kink_anywhere(where: float, width: float) -> None:
    """A ramp of slope 1/width from 0 to 1: the smooth parts have closed forms in φ and Φ."""

    def density(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def beyond(z: float) -> float:
        return math.erfc(z / math.sqrt(2)) / 2

    end = where + width
    mass = beyond(where) - beyond(end)
    first = density(where) - density(end)
    second = mass + where * density(where) - end * density(end)
    ramp = (second - 2 * where * first + where * where * mass) / width**2
    measured = second_moment(lambda z: ((z - where) / width).clamp(0, 1))
    # The closed form subtracts numbers near 1 and divides by width²: 1e-15/1e-6.
    assert measured == pytest.approx(ramp + beyond(end), abs=1e-8)


def test_quadrature_of_tails_that_do_not_fall_off_is_infinite() -> None:
    assert second_moment(lambda z: torch.exp(z.square() / 4)) == math.inf
    assert second_moment(lambda z: torch.exp(z.square())) == math.inf
    # E[exp(0.4 z²)] = (1 - 0.8)^(-1/2): heavy, and finite
    assert second_moment(lambda z: torch.exp(0.2 * z.square())) == pytest.approx(5**0.5, rel=1e-10)


def test_quadrature_of_an_undefined_function_is_nan() -> None:
    assert math.isnan(second_moment(torch.sqrt))


@pytest.mark.parametrize("function", [torch.reciprocal, lambda z: torch.sin(1e7 * z)])
def test_quadrature_that_does_not_converge_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="singularity or oscillates too fast"):
        second_moment(function)
