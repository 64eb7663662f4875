"""What an author drew for all layers of a model by one formula, where modules start at constants or uniform biases.

One such parameter cannot be told from a trained one. All of them together can: training moves every layer differently,
and from where it began.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_init.initialization.evidence import SIGMAS
from lightning_init.initialization.scales import differs_from_default
from lightning_init.initialization.survey import Candidate
from lightning_init.schemes.distributions import Constant, Uniform

MIN_LAYERS, MIN_ELEMENTS = 3, 64
"""Of fewer layers, or of fewer elements in all, nothing is said."""

FAR_FROM_RESET = 3
"""Standard deviations between the mean of an author's draw and the constant that training would have begun at."""

SHARE_OF_ONE_VALUE = 0.25
"""Of a bias's elements: where so many are still one number other than 0, no step has moved them."""


def drawn_for_all_layers(candidates: Iterable[Candidate], values: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that were drawn by one formula for every layer.

    - Scales of norms with one mean and one std in all layers, far from 1, and their shifts if those are alike too.
    - Biases of N(0, 1/out) or N(0, 1/fan_in) beside weights that are not as their modules drew them.

    Args:
        candidates: all parameters of a model.
        values: by name, what this process holds of each, flat and in float32.
    """
    constants: dict[float, list[Candidate]] = defaultdict(list)
    biases: list[Candidate] = []
    redrawn = {
        id(one.site.module)
        for one in candidates
        if one.role is not None and one.role.kind == "weight" and differs_from_default(one.role, one.evidence)
    }
    for one in candidates:
        if one.role is None or not values[one.site.forward_fqn].numel():
            continue
        if one.role.kind == "norm" and isinstance(one.role.default, Constant):
            constants[one.role.default.value].append(one)
        elif one.role.kind == "bias" and isinstance(one.role.default, Uniform) and id(one.site.module) in redrawn:
            biases.append(one)
    found: set[str] = set()
    scales, shifts = constants[1.0], constants[0.0]
    if _are_alike(_held(scales, values), far_from=1.0):
        found |= _names(scales) | (_names(shifts) if _are_alike(_held(shifts, values)) else set())
    if _follow_formula(biases, _held(biases, values)):
        found |= _names(biases)
    return frozenset(found)


def is_partly_constant(values: Tensor) -> bool:
    """Whether many elements of a bias are one number other than 0: half of a gate that starts open."""
    if values.numel() < 1 / SHARE_OF_ONE_VALUE:
        return False
    numbers, counts = torch.unique(values, return_counts=True)
    most = int(counts.argmax())
    return bool(numbers[most] != 0) and int(counts[most]) >= max(2, SHARE_OF_ONE_VALUE * values.numel())


def _names(candidates: Iterable[Candidate]) -> set[str]:
    return {one.site.forward_fqn for one in candidates}


def _held(candidates: Iterable[Candidate], values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[one.site.forward_fqn].double() for one in candidates]


def _are_alike(layers: Sequence[Tensor], *, far_from: float | None = None) -> bool:
    """Whether all layers hold one draw, which is normal or uniform."""
    if len(layers) < MIN_LAYERS or sum(map(len, layers)) < MIN_ELEMENTS:
        return False
    everything = torch.cat(list(layers))
    mean, std = float(everything.mean()), float(everything.std())
    if std == 0 or (far_from is not None and abs(mean - far_from) < FAR_FROM_RESET * std):
        return False
    means = sum(len(one) * (float(one.mean()) - mean) ** 2 for one in layers) / std**2
    stds = sum(2 * len(one) * (float((one - mean).square().mean().sqrt()) / std - 1) ** 2 for one in layers)
    return _is_plain_draw((everything - mean) / std) and max(means, stds) < _most_of(len(layers))


def _most_of(squares: int) -> float:
    """What a sum of so many squares of standard normal numbers does not exceed, by chance."""
    return squares + SIGMAS * math.sqrt(2 * squares)


def _follow_formula(biases: Sequence[Candidate], layers: Sequence[Tensor]) -> bool:
    """Whether every bias is N(0, 1/out), or every one N(0, 1/fan_in)."""
    outs = [float(len(one)) for one in layers]
    fan_ins = [1 / one.role.default.high**2 for one in biases if one.role and isinstance(one.role.default, Uniform)]
    if sum(outs) < MIN_ELEMENTS:
        return False
    for fans in (outs, fan_ins):
        if len(set(fans)) > 1:
            scaled = [one * math.sqrt(fan) for one, fan in zip(layers, fans, strict=True)]
            if all(_is_from(one, 0.0, 1.0) for one in [*scaled, torch.cat(scaled)]):
                return True
    return False


def _is_from(values: Tensor, mean: float, std: float) -> bool:
    """Whether the mean and the std of some values are these, within chance."""
    error = SIGMAS / math.sqrt(len(values))
    rms = float((values - mean).square().mean().sqrt())
    return abs(float(values.mean()) - mean) < error * std and abs(rms / std - 1) < error / math.sqrt(2)


def _is_plain_draw(standardised: Tensor) -> bool:
    """Whether values have the kurtosis of a normal or of a uniform draw, within chance."""
    kurtosis = float(standardised.pow(4).mean())
    return any(abs(kurtosis - usual) < SIGMAS * math.sqrt(24 / len(standardised)) * usual / 3 for usual in (3.0, 1.8))
