"""Signs that a model has been trained, so that its weights are not overwritten by mistake."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_init.initialization.distributions import Uniform
from lightning_init.initialization.plan import Assignment
from lightning_init.names import clean_name

SLACK = 1.0 + 2**-8
"""A fresh uniform draw may exceed its bound by rounding to bfloat16, not by more."""

NEXT_TO_ZERO = 1e-5
"""Some libraries draw fresh biases with a std of 1e-6; one optimizer step moves them further."""


def signs_of_training(assignments: list[Assignment], model: nn.Module) -> list[str]:
    """What a fresh model would not have, in words; empty for a fresh one.

    Only parameters about to be drawn count: what is kept cannot be lost. Looked for are batch norm statistics
    that have seen batches, norm weights and biases that are not constant, biases that are not zero where the
    module starts them there, and uniform weights or biases of which some have left the interval they were drawn
    from.
    """
    drawn = [step for step in assignments if step.is_drawn and step.place.via == "itself"]
    owners = {id(step.place.module) for step in drawn}
    signs = [sign for sign in _statistics(model) if sign[0] in owners]
    return [text for _, text in signs] + [text for step in drawn for text in _parameter_signs(step)]


def _statistics(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Batch norms that have counted batches."""
    for path, module in model.named_modules():
        count = module._buffers.get("num_batches_tracked")
        if count is not None and not count.is_meta and int(count) > 0:
            yield id(module), f"{clean_name(model, path)}.num_batches_tracked is {int(count)}"


def _parameter_signs(step: Assignment) -> Iterator[str]:
    """At most one sign for one parameter."""
    values = _held(step.place.parameter)
    role = step.role
    if role is None or values.numel() == 0:
        return
    low, high = float(values.min()), float(values.max())
    if role.kind == "norm":
        if low != high:
            yield f"{step.name} is not constant ({low:.4g} … {high:.4g}), as a fresh norm's is"
    elif role.starts_at_zero:
        if low != high:
            yield f"{step.name} is not constant ({low:.4g} … {high:.4g}), but starts at zero"
    elif isinstance(role.default, Uniform) and values.numel() >= 2:
        moved = _bias_has_moved(values, role.default) if role.kind == "bias" else _has_left(values, role.default)
        if moved:
            yield (
                f"{step.name} ({low:.6g} … {high:.6g}) is no longer what its module drew, "
                f"uniform within ±{role.default.high:.6g}"
            )


def _has_left(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether values were drawn from this uniform distribution and some have left its interval since.

    A user's own draw is no sign: a uniform one of another width has another spread, a normal one another
    kurtosis (3; a uniform one's is 1.8).
    """
    squares = values.square()
    kurtosis = float(squares.square().mean() / squares.mean().square())
    return kurtosis < 2.1 and _has_spread_of(values, drawn_from) and _reaches_beyond(values, drawn_from)


def _bias_has_moved(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether a bias is neither constant, nor next to zero, nor what its module draws."""
    if float(values.min()) == float(values.max()) or float(values.abs().max()) < NEXT_TO_ZERO:
        return False
    return _reaches_beyond(values, drawn_from) or not _has_spread_of(values, drawn_from)


def _has_spread_of(values: Tensor, drawn_from: Uniform) -> bool:
    """Whether the measured std is the distribution's, within five standard errors and 1 %."""
    spread = float(values.square().mean().sqrt()) / drawn_from.target_std
    return abs(spread - 1) < 5 * drawn_from.sampling_error(values.numel()) + 0.01


def _reaches_beyond(values: Tensor, drawn_from: Uniform) -> bool:
    return float(values.abs().max()) > drawn_from.high * SLACK


def _held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, in float32; the other ranks look at theirs."""
    held = parameter.detach()
    local = held.to_local() if isinstance(held, DTensor) else held
    return local.abs().float() if local.is_complex() else local.float()
