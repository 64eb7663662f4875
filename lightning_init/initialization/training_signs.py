"""Signs that a model has been trained, so that its weights are not overwritten by mistake.

Every number a test is held against is that of a fresh draw; a single sign suffices to refuse. So a fresh model
must give none, whatever its author draws, and a trained one at least one, which need not be in every layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_init.distributed.shards import local_shard_of
from lightning_init.initialization.plan import Assignment
from lightning_init.introspect.names import clean_name
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Constant, Uniform

NEXT_TO_ZERO = 1e-5
"""Some libraries draw fresh biases with a std of 1e-6; one optimizer step moves them further."""

MAX_INSPECTED = 1 << 21
"""Elements of a parameter that are looked at, at most: copies of them are 8 MiB each."""

SIGMAS = 5
"""How many standard errors are still chance."""

TRUNCATED_KURTOSIS = 2.366
"""Of a normal distribution cut at ±2 std, with a standard error of 2.2/√n; a uniform one has 1.8."""

MIN_ELEMENTS = 200
"""The largest of fewer values says little about the interval they are from."""


def signs_of_training(assignments: list[Assignment], model: nn.Module) -> list[str]:
    """What a fresh model would not have, in words; empty for a fresh one.

    Only parameters about to be drawn count: what is kept cannot be lost. Looked for are

    - norms, PReLUs and biases that start constant and no longer are;
    - batch norms that have seen batches;
    - uniform biases that are neither what the module drew nor constant, and uniform weights of which some have
      left their interval (a step of 1e-3 is enough);
    - weight matrices whose input columns, and lookup tables whose rows, differ in size by more than chance.

    A module with a parameter that is still constant has not been trained, since a step moves all of them: whatever
    else it holds is its author's draw. What an author drew for all biases of a module cannot be told from training.
    A normal draw without biases or norms around it hides a few steps; nothing in the values can show them.
    """
    modules: dict[int, list[Assignment]] = defaultdict(list)
    for assignment in assignments:
        if (
            assignment.is_drawn
            and assignment.site.storage in ("itself", "recomputed")
            and not assignment.site.parameter.is_meta
        ):
            modules[id(assignment.site.module)].append(assignment)
    paths = {id(module): clean_name(model, path) for path, module in model.named_modules()}
    touched = {key: steps for key, steps in modules.items() if not any(map(_is_still_constant, steps))}
    statistics = [sign for key, steps in touched.items() for sign in _statistics(steps[0].site.module, paths[key])]
    return statistics + [text for assignment in chain(*touched.values()) for text in _parameter_signs(assignment)]


def _is_still_constant(assignment: Assignment) -> bool:
    """Whether each slice of this parameter has one value, and more than one element."""
    parts = _parts(assignment)
    return any(part.numel() > 1 for part in parts) and all(map(_is_constant, parts))


def _statistics(module: nn.Module, path: str) -> Iterator[str]:
    """A batch norm that has counted batches."""
    count = module._buffers.get("num_batches_tracked")
    if count is not None and not count.is_meta and int(count) > 0:
        yield f"{path}{'.' if path else ''}num_batches_tracked is {int(count)}"


def _parameter_signs(assignment: Assignment) -> Iterator[str]:
    """At most one sign for one parameter."""
    role, parts = assignment.role, _parts(assignment)
    if role is None or not parts:
        return
    values = torch.cat(parts)
    span = f"{assignment.name} ({float(values.min()):.6g} … {float(values.max()):.6g})"
    if role.starts_at_zero or (role.kind in ("norm", "other") and isinstance(role.default, Constant)):
        if any(not _is_constant(part) and float(part.abs().max()) > NEXT_TO_ZERO for part in parts):
            yield f"{span} is not constant, as a fresh {type(assignment.site.module).__name__}'s is"
    elif _is_no_longer_uniform(assignment, role, parts):
        assert isinstance(role.default, Uniform)
        yield f"{span} is no longer what its module drew, uniform within ±{role.default.high:.6g}"
    elif role.kind in ("weight", "embedding") and _inputs_differ(assignment, role):
        what = "rows" if role.kind == "embedding" else "input columns"
        yield f"{assignment.name}: its {what} differ in size by more than chance"


def _is_no_longer_uniform(assignment: Assignment, role: Role, parts: list[Tensor]) -> bool:
    """Whether a bias or a weight that its module draws uniformly has moved on; real numbers only."""
    if not isinstance(role.default, Uniform) or assignment.site.parameter.is_complex():
        return False
    if role.kind == "bias":
        usual = [role.default, *_by_true_fan_in(assignment.site.module)]
        return all(any(_bias_has_moved(part, draw) for part in parts) for draw in usual)
    return role.kind == "weight" and _has_left(torch.cat(parts), role.default, assignment)


def _parts(assignment: Assignment) -> list[Tensor]:
    """What this process holds of each slice, flat and in float32; the other ranks look at theirs."""
    shard = local_shard_of(assignment.site.parameter)
    size = shard.full_shape.numel() // len(assignment.slices)
    flat = _magnitudes(_leading_rows(shard.local)).reshape(-1)
    overlaps = [shard.overlap(i * size, (i + 1) * size) for i in range(len(assignment.slices))]
    parts = [flat[overlap[0]] for overlap in overlaps if overlap is not None]
    return [part for part in parts if part.numel()]


def _leading_rows(values: Tensor) -> Tensor:
    """As many rows as make up ``MAX_INSPECTED`` elements: they show what the rest would, and cost no memory."""
    if values.numel() <= MAX_INSPECTED:
        return values
    return values[: max(1, MAX_INSPECTED // (values.numel() // values.shape[0]))]


def _magnitudes(values: Tensor) -> Tensor:
    """Complex numbers by their size: it is constant where they are, and has their mean square."""
    return values.abs().float() if values.is_complex() else values.float()


def _is_constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _bias_has_moved(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether a bias is neither constant, nor next to zero, nor what its module draws."""
    if values.numel() < 2 or _is_constant(values) or float(values.abs().max()) < NEXT_TO_ZERO:
        return False
    beyond = float(values.abs().max()) > drawn_from.high * _rounding(values)
    return beyond or not _has_spread_of(values, drawn_from)


def _by_true_fan_in(module: nn.Module) -> Iterator[Uniform]:
    """What authors draw a transposed convolution's bias from who divide by its inputs; torch divides by outputs."""
    if isinstance(module, _ConvTransposeNd):
        bound = (module.in_channels // module.groups * math.prod(module.kernel_size)) ** -0.5
        yield Uniform(-bound, bound)


def _has_left(values: Tensor, drawn_from: Uniform, assignment: Assignment) -> bool:
    """Whether values were drawn from this uniform distribution and some have left its interval since.

    Training blurs the edges: beyond the bound there are values, but fewer than if the whole interval had been
    wider, which is what an author's own draw looks like. A few values cannot tell one from the other; then an
    author's draw is taken for one if it is from the formulas of ``torch.nn.init``.
    """
    rounding, count = _rounding(values), values.numel()
    bound, largest = drawn_from.high * rounding, float(values.abs().max())
    if largest <= bound or count < MIN_ELEMENTS:
        return False
    spread = float(values.square().mean().sqrt()) / drawn_from.target_std - 1
    chance = SIGMAS * drawn_from.sampling_error(count) + 0.01
    beyond = int((values.abs() > bound).sum())
    expected = max(0.0, count * (1 - bound * rounding**2 / largest))
    if beyond < expected - SIGMAS * math.sqrt(expected):
        is_flat = _kurtosis(values) < TRUNCATED_KURTOSIS - SIGMAS * 2.2 / math.sqrt(count)
        return is_flat and -chance < spread < 0.5
    if largest > 1.02 * bound or expected > 4 * SIGMAS**2:  # enough to tell half of it
        return False
    fresh = (width * (1 - 8 / count) < largest <= width * rounding for width in _usual_bounds(assignment))
    return abs(spread) < chance and not any(fresh)


def _usual_bounds(assignment: Assignment) -> Iterator[float]:
    """Half widths that ``torch.nn.init`` gives a weight of this shape: Xavier's and Kaiming's, with usual gains."""
    shape = assignment.site.parameter.shape
    taps = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * taps, shape[0] * taps
    for gain in (1.0, math.sqrt(2), 5 / 3):
        for fan in (fan_in, fan_out, (fan_in + fan_out) / 2):
            yield gain * math.sqrt(3 / fan)


def _kurtosis(values: Tensor) -> float:
    squares = values.square()
    return float(squares.square().mean() / squares.mean().square())


def _has_spread_of(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether the measured std is the distribution's, within the standard error and 1 %."""
    spread = float(values.square().mean().sqrt()) / drawn_from.target_std
    return abs(spread - 1) < SIGMAS * drawn_from.sampling_error(values.numel()) + 0.01


def _rounding(values: Tensor) -> float:
    """How far a fresh draw may exceed its bound, as a factor: by rounding to the coarsest type that holds it."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    held_by = next((dtype for dtype in types if torch.equal(values.to(dtype).float(), values)), torch.float32)
    return 1 + torch.finfo(held_by).eps / 2


def _inputs_differ(assignment: Assignment, role: Role) -> bool:
    """Whether some inputs of a weight matrix (rows of a lookup table) are larger than others beyond chance.

    In a draw whose elements are alike, the mean squares of C columns of n elements vary by (kurtosis - 1)·s⁴/n,
    measured with a relative standard error of √(2/(C - 1)). Training enlarges the inputs that matter. Outputs are not
    compared: authors do give the gates that are packed in one matrix different sizes.
    """
    local = _magnitudes(_leading_rows(local_shard_of(assignment.site.parameter).local))
    if local.ndim < 2 or not local.numel():
        return False
    by_input = local.movedim(0 if role.kind == "embedding" or role.transposed else 1, 0).flatten(1)
    if role.kind == "embedding":
        by_input = by_input[by_input.abs().amax(1) > 0]  # without padding
    columns, size = by_input.shape
    if columns < 16 or size < 16 or bool((by_input == 0).any()):  # a mask, or a structure of the author's
        return False
    squares = by_input.square()
    expected = float(squares.mean().square()) * (_kurtosis(local.reshape(-1)) - 1) / size
    excess = float(squares.mean(1).var()) / expected - 1 if expected else 0.0
    return excess > 1 and excess > 2 * SIGMAS * math.sqrt(2 / (columns - 1))
