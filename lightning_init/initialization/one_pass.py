"""Scale freshly drawn weights so that every layer's output has its target variance on one real batch, in one pass.

Layer by layer, a hook measures what comes out of a weight, hands it on scaled to its target, and remembers the factor;
when the pass is over, the weights are multiplied by their factors. So every layer was measured with all layers before
it already right, and the cost is one call of the model, where Layer-sequential unit-variance initialisation (LSUV:
Mishkin & Matas 2016, "All you need is a good init") takes one or more calls for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_init.distributed.shards import local_numbers
from lightning_init.initialization.calibration import Calibration, variance_for_depth
from lightning_init.initialization.plan import Assignment
from lightning_init.introspect.trace import Trace

_STEPS_PER_OCTAVE = 1024
"""Factors are powers of 2^(1/1024), so that ranks whose sums differ by rounding write the same bits."""


def targets(plan: Iterable[Assignment], trace: Trace, calibration: Calibration) -> dict[str, float]:
    """The weights that are calibrated, by name, with the variance that what comes out of them is to have.

    Not those that a rule or their author decided on, nor output layers, nor what a normalisation scales anyway, nor
    what is added to a lookup table.
    """
    found, heads = {}, set(trace.heads)
    for one in plan:
        is_plain = isinstance(one.site.module, (nn.Linear, _ConvNd)) and one.name == one.site.forward_fqn
        is_chosen = one.is_drawn and one.role is not None and one.role.kind == "weight"
        is_schemes = one.decided_by == "scheme" or one.decided_by.endswith("summands")
        if not (is_plain and is_chosen and is_schemes) or one.name in heads or trace.is_normalized(one.name):
            continue
        variance = calibration.variance
        if variance is None:
            functions = trace.functions_behind(one.name)
            variance = min((variance_for_depth(name, trace.depth_of(one.name)) for name in functions), default=1.0)
        found[one.name] = variance / trace.summands_with(one.name)
    return found


def measured_factors(
    plan: Iterable[Assignment], wanted: Mapping[str, float], run: Callable[[], object]
) -> dict[str, float]:
    """By name, what weights have to be multiplied by, from one call; those that were not called are left out.

    Args:
        plan: whose modules are measured.
        wanted: see :func:`targets`.
        run: calls the model.
    """
    logs: dict[str, float] = {}
    hooks = []
    for one in plan:
        if one.name in wanted:
            scales = _Scales(one.name, wanted[one.name], logs)
            hooks.append(one.site.module.register_forward_pre_hook(scales.before))
            hooks.append(one.site.module.register_forward_hook(scales))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return logs


class _Scales:
    """Hands a layer's output on, scaled to its target variance, and notes log2 of the factor.

    It has slots, so that putting back what the model leads to does not reach what was noted.
    """

    __slots__ = ("bias", "logs", "name", "variance")

    def __init__(self, name: str, variance: float, logs: dict[str, float]) -> None:
        self.name, self.variance, self.logs = name, variance, logs
        self.bias: Tensor | None = None

    def before(self, module: Any, args: Any) -> None:
        """Called before the layer: afterwards FSDP2 may have taken its bias apart again."""
        self.bias = None if module.bias is None else module.bias.detach().clone()

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        if self.name not in self.logs:  # a layer that is called again keeps its factor
            self.logs[self.name] = _log_of_factor(self._without_bias(output.detach(), module), self.variance)
        factor = 2.0 ** self.logs[self.name]
        if self.bias is None:
            return output * factor
        return self._without_bias(output, module) * factor + self._shaped_bias(module)

    def _without_bias(self, output: Tensor, module: Any) -> Tensor:
        return output if self.bias is None else output - self._shaped_bias(module)

    def _shaped_bias(self, module: Any) -> Tensor:
        """The bias in the dimensions of the output: the last of a Linear's, the one before the places of an image."""
        assert self.bias is not None
        return self.bias.reshape(-1, *([1] * (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)))


def _log_of_factor(signal: Tensor, variance: float) -> float:
    """log2 of what brings a signal to a variance, rounded; 0 where there is nothing to scale."""
    local = local_numbers(signal)
    if local is None or local.numel() < 2:
        return 0.0
    held = float(local.double().var(correction=0))
    if not math.isfinite(held) or held <= 0:
        return 0.0
    return round(_STEPS_PER_OCTAVE * math.log2(variance / held) / 2) / _STEPS_PER_OCTAVE


def agreed_factors(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The factors of all ranks, each measured on its own batch: their mean, rounded, so that all write the same bits.

    Args:
        ranks: what :func:`measured_factors` gave on each.
    """
    names = [name for name in ranks[0] if all(name in one for one in ranks)]
    means = {name: sum(one[name] for one in ranks) / len(ranks) for name in names}
    return {name: 2.0 ** (round(_STEPS_PER_OCTAVE * mean) / _STEPS_PER_OCTAVE) for name, mean in means.items()}


def scale_weights(plan: Iterable[Assignment], factors: Mapping[str, float]) -> None:
    """Multiply the weights by their factors, in place."""
    with torch.no_grad():
        for one in plan:
            if one.name in factors:
                one.site.parameter.mul_(factors[one.name])
