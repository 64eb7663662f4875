"""Signs that a model has been trained, so that its weights are not overwritten by mistake.

Every number a test is held against is that of a fresh draw; a single sign suffices to refuse. So a fresh model
must give none, whatever its author draws, and a trained one at least one, which need not be in every layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_init.findings import Finding
from lightning_init.initialization.authors_draws import drawn_for_all_layers, is_partly_constant
from lightning_init.initialization.evidence import (
    READ,
    SIGMAS,
    authors_evidence,
    evidence_of,
    leading_rows,
    slices_held,
)
from lightning_init.initialization.lattice import is_as_written, is_uniform_as_written
from lightning_init.initialization.survey import Candidate
from lightning_init.introspect.names import clean_name
from lightning_init.introspect.normalization import batches_tracked
from lightning_init.introspect.role import Role
from lightning_init.introspect.torch_roles import other_bias_draws
from lightning_init.schemes.distributions import Constant, TruncatedNormal, Uniform, truncated_std

NEXT_TO_ZERO = 1e-5
"""Some libraries draw fresh biases with a std of 1e-6; one optimizer step moves them further."""

MAX_INSPECTED = 1 << 21
"""Elements of a parameter that are inspected, at most: a copy of them is 8 MiB."""

STD_SLACK = 0.01
"""Relative difference of a std that says nothing even where chance is smaller: authors round their bounds."""

TRUNCATED_KURTOSIS, TRUNCATED_KURTOSIS_ERROR = 2.366, 2.2
"""Kurtosis of a normal distribution cut at ±2 std, and √n times its standard error; a uniform one has 1.8."""

BOTH_SIGMAS = 4
"""Standard errors that are still chance where two numbers would have to be off at once."""

MIN_ELEMENTS = 200
"""The largest of fewer values says little about the interval they are from."""

MAX_BLURRED_STD = 0.5
"""Relative growth of a uniform draw's std beyond which it is another draw, not one whose edges moved."""

FIRST_STEPS = 1.02
"""Factor by which a few training steps move the largest value beyond its bound, at most."""

FLAT_KURTOSIS = 1.9
"""A uniform draw has 1.8, a normal one cut at ±1 std 1.94: what is flatter is a uniform draw, trained or not."""

MIN_SEARCHED = 1000
"""Fewer values leave so many possible bounds that looking for theirs would take seconds."""

MOST_DRAWS = 2
"""How often a fresh weight is written to: by its module's reset, and by its author's own draw."""

LARGEST_GAP = 8
"""The largest of n values from ±w is above (1 - 8/n)·w but for a probability of e⁻⁸ = 3e-4."""


def signs_of_training(candidates: Iterable[Candidate], model: nn.Module) -> list[Finding]:
    """What a fresh model would not have, as findings ``trained_weights``; none for a fresh one.

    Only parameters about to be drawn count: what is kept cannot be lost. The signs are

    - norms, PReLUs and biases that start constant and no longer are;
    - batch norms that have seen batches;
    - uniform biases that are neither what the module drew nor constant, and uniform weights of which some have
      left their interval (a step of 1e-3 is enough);
    - float32 weights that are as flat as a uniform draw, but not exactly what one writes: any step shows;
    - weights with a shape between a uniform and a normal draw whose largest values lie where neither ends;
    - weights that hold a gradient and were written to more often than draws explain: this process has trained them;
    - weight matrices whose input columns, and lookup tables whose rows, differ in size by more than chance.

    A module with a parameter that is still constant has not been trained, since a step moves all of them: whatever
    else it holds is its author's draw. What an author drew for all biases of a module cannot be told from training.
    A normal draw without biases or norms around it, trained elsewhere and loaded here, hides a few steps; nothing in
    the values can show them.
    """
    by_module: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        site = candidate.site
        can_be_lost = candidate.why_left is None and not candidate.is_empty
        if can_be_lost and not site.is_computed and not site.parameter.is_meta:
            by_module[id(site.module)].append(candidate)
    paths = {id(module): clean_name(model, path) for path, module in model.named_modules()}
    inspected = [candidate for held in by_module.values() for candidate in held]
    by_author = drawn_for_all_layers(
        inspected, {one.site.forward_fqn: torch.cat([*_slices_of(one), torch.empty(0)]) for one in inspected}
    )
    touched = {key: held for key, held in by_module.items() if not any(map(_is_still_constant, held))}
    batch_counts = [
        Finding("trained_weights", paths[key], text)
        for key, held in touched.items()
        for text in _batch_count(held[0].site.module, paths[key])
    ]
    return batch_counts + [
        Finding("trained_weights", paths[key], text)
        for key, held in touched.items()
        for candidate in held
        if candidate.site.forward_fqn not in by_author
        for text in _parameter_signs(candidate, held)
    ]


def _is_still_constant(candidate: Candidate) -> bool:
    """Whether each slice of this parameter has one value, and more than one element."""
    slices = _slices_of(candidate)
    return any(values.numel() > 1 for values in slices) and all(map(_is_constant, slices))


def _batch_count(module: nn.Module, path: str) -> Iterator[str]:
    """A batch norm that has counted batches."""
    count = batches_tracked(module)
    if count:
        yield f"{path}{'.' if path else ''}num_batches_tracked is {count}"


def _parameter_signs(candidate: Candidate, held: Sequence[Candidate]) -> Iterator[str]:
    """At most one sign for one parameter of a module that holds ``held``."""
    role, slices, site = candidate.role, _slices_of(candidate), candidate.site
    if role is None or not slices:
        return
    values = torch.cat(slices)
    span = f"{site.stored_fqn} ({float(values.min()):.6g} … {float(values.max()):.6g})"
    if role.starts_at_zero or (role.kind in ("norm", "other") and isinstance(role.default, Constant)):
        if any(not _is_constant(one) and float(one.abs().max()) > NEXT_TO_ZERO for one in slices):
            yield f"{span} is not constant, as a fresh {type(site.module).__name__}'s is"
    elif role.kind == "weight" and _was_trained_here(candidate):
        yield f"{site.stored_fqn} holds a gradient and was written to {site.parameter._version} times"
    elif _is_no_longer_uniform(candidate, role, slices, held):
        assert isinstance(role.default, Uniform)
        yield f"{span} is no longer what its module drew, uniform within ±{role.default.high:.6g}"
    elif role.kind == "weight" and not _is_structured(candidate) and any(map(_has_blurred_edges, slices)):
        yield f"{span} has edges that no draw leaves: once sharp, and blurred since"
    elif role.kind in ("weight", "embedding") and _inputs_differ(candidate, role):
        what = "rows" if role.kind == "embedding" else "input columns"
        yield f"{site.stored_fqn}: its {what} differ in size by more than chance"


def _is_no_longer_uniform(candidate: Candidate, role: Role, slices: list[Tensor], held: Sequence[Candidate]) -> bool:
    """Whether a bias or a weight that its module draws uniformly has moved on; real numbers only."""
    if not isinstance(role.default, Uniform) or candidate.site.parameter.is_complex():
        return False
    if role.kind == "bias":
        usual = [role.default, *other_bias_draws(candidate.site.module)]
        beyond = max(float(one.abs().max()) for one in slices) - role.default.high
        if any(
            _is_spared(other, beyond) or _is_drawn_like(slices, role.default, other)
            for other in held
            if other is not candidate
        ):
            return False
        is_single = candidate.site.parameter.dtype is torch.float32
        return all(any(_bias_has_moved(one, draw, is_single) for one in slices) for draw in usual)
    values = torch.cat(slices)
    return role.kind == "weight" and (
        _has_left(values, role.default, candidate.site.parameter.shape)
        or any(_has_moved_within(one[:READ], role.default, candidate.site.parameter) for one in slices)
    )


def _has_moved_within(values: Tensor, drawn_from: Uniform, parameter: Tensor) -> bool:
    """Whether float32 values are as flat as a uniform draw, but not what one writes, whatever its bound."""
    n = values.numel()
    if parameter.dtype is not torch.float32 or n < MIN_ELEMENTS or _kurtosis(values) > FLAT_KURTOSIS:
        return False
    if _is_half_precise(values) or is_as_written(values, drawn_from.high):
        return False
    if n < MIN_SEARCHED:
        return _has_spread_of(values, drawn_from) and float(values.abs().max()) < drawn_from.high
    return is_uniform_as_written(values, LARGEST_GAP / n) is False


def _was_trained_here(candidate: Candidate) -> bool:
    """Whether an optimizer of this process has stepped: the module's draw and its author's are two writes.

    A backward pass alone leaves a gradient, and no more writes.
    """
    parameter = candidate.site.parameter
    draws = MOST_DRAWS + _is_structured(candidate)  # an orthogonal draw is scaled afterwards
    was_written = parameter.grad is not None and parameter._version > draws
    return was_written and not is_as_reset(candidate) and not _is_as_first_seen(candidate)


def _is_structured(candidate: Candidate) -> bool:
    """Whether elements depend on each other, so that they are no independent draws."""
    evidence = candidate.evidence
    if evidence is None or evidence.has_structure or evidence.columns_are_orthogonal:
        return evidence is not None
    rows = leading_rows(candidate.shard.local, READ) if candidate.shard is not None else torch.empty(0)
    if rows.ndim < 2 or len(rows) < 2:
        return False
    lengths = _magnitudes(rows).flatten(1).square().sum(1)
    return bool(lengths.std() < 1e-3 * lengths.mean())  # normalised by their author


def _has_blurred_edges(values: Tensor) -> bool:
    """Whether values are flatter than a normal draw, and yet reach farther than any draw with edges so flat.

    Normal draws cut at ±c have every kurtosis from the uniform draw's 1.8 to 3, and each ends at one multiple of its
    std. Training moves all values, which rounds the edges and takes some beyond.
    """
    n = values.numel()
    if n < MIN_SEARCHED:
        return False
    kurtosis = _kurtosis(values)
    if kurtosis + SIGMAS * math.sqrt(24 / n) > 3:
        return False
    highest = kurtosis + BOTH_SIGMAS * TRUNCATED_KURTOSIS_ERROR / math.sqrt(n)
    low, high = 0.05, 6.0  # cuts between which the kurtosis rises from a uniform draw's to a normal one's
    for _ in range(40):
        cut = (low + high) / 2
        low, high = (cut, high) if TruncatedNormal(cut=cut).kurtosis < highest else (low, cut)
    chance = BOTH_SIGMAS * math.sqrt((TRUNCATED_KURTOSIS - 1) / (4 * n))
    farthest = high / truncated_std(high) * (1 + STD_SLACK + chance)
    return float(values.abs().max() / values.square().mean().sqrt()) > farthest


def _is_as_first_seen(candidate: Candidate) -> bool:
    """Whether a parameter still holds what it held before an earlier initialisation, which left it alone."""
    site, shard = candidate.site, candidate.shard
    if shard is None or candidate.role is None:
        return False
    before = authors_evidence(site.module, site.attribute, shard.full_shape)
    if before is None:
        return False
    now = evidence_of(shard, len(candidate.role.slices), is_table=candidate.is_table, version=site.parameter._version)
    return now is not None and replace(now, is_written=before.is_written) == before


def is_as_reset(candidate: Candidate) -> bool:
    """Whether a weight still is what its module draws: uniform, up to its bound, and nowhere beyond.

    A training step of every element moves some of them beyond.
    """
    role = candidate.role
    if role is None or role.kind != "weight" or not isinstance(role.default, Uniform) or candidate.shard is None:
        return False
    slices = _slices_of(candidate)
    values = torch.cat(slices) if slices else torch.empty(0)
    if candidate.site.parameter.dtype is torch.float32 and values.numel() and not _is_half_precise(values):
        written = is_as_written(values, role.default.high)
        if written is not None:
            return written and float(values.abs().max()) <= role.default.high * _rounding(values)
    if values.numel() < MIN_ELEMENTS:
        return False
    largest = float(values.abs().max())
    bound = role.default.high * _rounding(values)
    return (1 - LARGEST_GAP / values.numel()) * role.default.high < largest <= bound and _has_spread_of(
        values, role.default
    )


def _is_spared(weight: Candidate, moved: float) -> bool:
    """Whether a weight is as its module drew it, though training that moves a bias that far would have shown in it.

    Steps of a tenth of ``moved`` take n·moved/10/(2·bound) of n uniform elements beyond the bound.
    """
    if not is_as_reset(weight) or weight.role is None or not isinstance(weight.role.default, Uniform):
        return False
    count = sum(one.numel() for one in _slices_of(weight))
    return count * moved / (20 * weight.role.default.high) > LARGEST_GAP


def _is_drawn_like(slices: list[Tensor], own: Uniform, other: Candidate) -> bool:
    """Whether a bias looks drawn by its author together with a weight.

    Either the weight is uniform with sharp edges, which training blurs, and the bias fills them, though they are not
    those of ``own``, what its module draws; or both are normal and equally wide.
    """
    if other.role is None or other.role.kind != "weight" or other.shard is None:
        return False
    weights = _slices_of(other)
    if not weights or not isinstance(other.role.default, Uniform):
        return False
    values, weight = torch.cat(slices), torch.cat(weights)
    if weight.numel() < MIN_ELEMENTS or _has_spread_of(weight, other.role.default):
        return False  # the module's own draw; training leaves a bias as wide as the weight there
    largest = float(weight.abs().max())
    edges = Uniform(-largest, largest)
    if _is_of_kurtosis(weight, edges.kurtosis) and _has_spread_of(weight, edges):
        lowest = max(0.5, 1 - LARGEST_GAP / values.numel()) * largest
        beyond = own.high * FIRST_STEPS if own.high < largest else 0.0
        return max(lowest, beyond) < float(values.abs().max()) <= largest * _rounding(values)
    ratio = float(values.square().mean().sqrt() / weight.square().mean().sqrt())
    is_as_wide = abs(ratio - 1) < SIGMAS / math.sqrt(2 * values.numel()) + STD_SLACK
    is_centred = float(values.mean().abs()) < SIGMAS * float(values.std()) / math.sqrt(values.numel())
    are_normal = values.numel() >= MIN_ELEMENTS and all(_is_of_kurtosis(one, 3.0) for one in (values, weight))
    return are_normal and is_as_wide and is_centred


def _slices_of(candidate: Candidate) -> list[Tensor]:
    """What this process holds of each slice, flat and in float32; the other ranks have theirs."""
    assert candidate.shard is not None
    shard, count = candidate.shard, len(candidate.role.slices) if candidate.role else 1
    flat = _magnitudes(leading_rows(shard.local, MAX_INSPECTED)).reshape(-1)
    return [values for values in slices_held(shard, flat, count) if values.numel()]


def _magnitudes(values: Tensor) -> Tensor:
    """Complex numbers by their size: it is constant where they are, and has their mean square."""
    return values.abs().float() if values.is_complex() else values.float()


def _is_constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _bias_has_moved(values: Tensor, drawn_from: Uniform, is_single: bool) -> bool:
    """Whether a bias is neither constant, a good part of it at least, nor next to zero, nor what its module draws.

    Args:
        values: of one slice.
        drawn_from: what the module draws.
        is_single: the bias itself is of float32, so that every draw leaves its marks.
    """
    if (
        values.numel() < 2
        or _is_constant(values)
        or is_partly_constant(values)
        or float(values.abs().max()) < NEXT_TO_ZERO
    ):
        return False
    beyond = float(values.abs().max()) > drawn_from.high * _rounding(values)
    if beyond or not _has_spread_of(values, drawn_from):
        return True
    return is_single and not _is_half_precise(values) and not _is_as_written_by_someone(values, drawn_from)


def _is_as_written_by_someone(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether values are what a uniform draw writes, from the module's bound or from a number of two digits, as
    authors give it.
    """
    if is_as_written(values, drawn_from.high) is not False:
        return True
    largest = float(values.abs().max())
    unit = 10.0 ** (math.floor(math.log10(largest)) - 1)
    first, last = math.ceil(largest / unit), math.floor(largest * (1 + LARGEST_GAP / values.numel()) / unit)
    return any(is_as_written(values, float(f"{digits * unit:.2g}")) for digits in range(first, last + 1))


def _has_left(values: Tensor, drawn_from: Uniform, shape: torch.Size) -> bool:
    """Whether values were drawn from this uniform distribution and some have left its interval since.

    Training blurs the edges: beyond the bound there are values, but fewer than if the whole interval had been
    wider, which is what an author's own draw looks like. A few values cannot tell one from the other; then an
    author's draw is taken for one if it is from the formulas of ``torch.nn.init``.
    """
    rounding, n = _rounding(values), values.numel()
    bound, largest = drawn_from.high * rounding, float(values.abs().max())
    if largest <= bound or n < MIN_ELEMENTS:
        return False
    growth = float(values.square().mean().sqrt()) / drawn_from.target_std - 1
    chance = SIGMAS * drawn_from.sampling_error(n) + STD_SLACK
    beyond = int((values.abs() > bound).sum())
    if_wider = max(0.0, n * (1 - bound * rounding**2 / largest))  # that many of n, from an interval up to the largest
    if beyond < if_wider - SIGMAS * math.sqrt(if_wider):
        limit = TRUNCATED_KURTOSIS - SIGMAS * TRUNCATED_KURTOSIS_ERROR / math.sqrt(n)
        return _kurtosis(values) < limit and -chance < growth < MAX_BLURRED_STD
    can_tell_half = if_wider / 2 > SIGMAS * math.sqrt(if_wider)  # half as many would have shown above
    if largest > FIRST_STEPS * bound or can_tell_half:
        return False
    fresh = (width * (1 - LARGEST_GAP / n) < largest <= width * rounding for width in _usual_bounds(shape))
    return abs(growth) < chance and not any(fresh)


def _usual_bounds(shape: torch.Size) -> Iterator[float]:
    """Half widths that ``torch.nn.init`` gives a weight of this shape: Xavier's and Kaiming's, with usual gains."""
    taps = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * taps, shape[0] * taps
    for gain in (1.0, math.sqrt(2), 5 / 3):
        for fan in (fan_in, fan_out, (fan_in + fan_out) / 2):
            yield gain * math.sqrt(3 / fan)


def _kurtosis(values: Tensor) -> float:
    squares = values.square()
    return float(squares.square().mean() / squares.mean().square())


def _is_of_kurtosis(values: Tensor, kurtosis: float) -> bool:
    """Whether the measured kurtosis is this one within chance, √(24/n) for a normal draw and less for a flatter one."""
    return abs(_kurtosis(values) - kurtosis) < SIGMAS * math.sqrt(24 / values.numel()) * kurtosis / 3


def _has_spread_of(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether the measured std is the distribution's, within the standard error and 1 %."""
    growth = float(values.square().mean().sqrt()) / drawn_from.target_std - 1
    return abs(growth) < SIGMAS * drawn_from.sampling_error(values.numel()) + STD_SLACK


def _is_half_precise(values: Tensor) -> bool:
    """Whether values were rounded to 16 bits, whatever holds them now."""
    return _rounding(values) > 1 + torch.finfo(torch.float32).eps


def _rounding(values: Tensor) -> float:
    """How far a fresh draw may exceed its bound, as a factor: by rounding to the coarsest type that holds it."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    held_by = next((dtype for dtype in types if torch.equal(values.to(dtype).float(), values)), torch.float32)
    return 1 + torch.finfo(held_by).eps / 2


def _inputs_differ(candidate: Candidate, role: Role) -> bool:
    """Whether some inputs of a weight matrix (rows of a lookup table) are larger than others beyond chance.

    In a draw whose elements are alike, the mean squares of C columns of n elements vary by (kurtosis - 1)·s⁴/n,
    measured with a relative standard error of √(2/(C - 1)). Training enlarges the inputs that matter. Outputs are not
    compared: authors do give the gates that are packed in one matrix different sizes.
    """
    assert candidate.shard is not None
    local = _magnitudes(leading_rows(candidate.shard.local, MAX_INSPECTED))
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
