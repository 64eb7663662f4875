"""The monitor without Lightning: a context manager around any code that runs a model forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_init.checks import check_list
from lightning_init.distributed.ranks import world_size
from lightning_init.introspect.layers import Parts, find_layers, select_layers
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import STATISTICS, LayerStats, StatName, chosen_stats


class observe:
    """Record every layer's output and gradient in a block of plain PyTorch: the same numbers as the monitor's.

    All forward passes inside the block are recorded, and all backward passes that reach a parameter: those of losses.
    Norms are those of the gradients that the block has left in ``parameter.grad`` when an optimizer steps or
    ``compute`` is called. ``compute`` may be called several times; each time it tells of everything since the block
    began. The object may be used for another block, which is cheaper than a new one. Where ``torch.distributed`` is
    initialised, all ranks have to do the same, and gradients are those of the mean of their losses.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> with observe(model, stats=["activation_variance", "gradient_norm"]) as observation:
    ...     model(torch.randn(16, 4)).square().mean().backward()
    >>> stats = observation.compute()
    >>> list(stats.values["activation_variance"]), list(stats.values["gradient_norm"])
    (['0', '1', '2'], ['0', '2', 'total'])

    Args:
        model: any module; it may be wrapped or compiled. Compiled modules with recorded layers run eagerly inside the
            block.
        layers: globs on layer names; None: every layer.
        stats: the statistics; None: the monitor's default set. Those that need an optimizer's step are not available.

    Raises:
        ValueError: a glob matches no layer; a statistic does not exist, or needs an optimizer's step.
    """

    def __init__(
        self, model: nn.Module, *, layers: Sequence[str] | None = None, stats: Sequence[StatName] | None = None
    ) -> None:
        check_list("layers", layers)
        chosen = chosen_stats(stats)
        if unfit := {stat for stat in chosen if STATISTICS[stat].needs_step}:
            need_a_step = {stat for stat, statistic in STATISTICS.items() if statistic.needs_step}
            allowed = ", ".join(stat for stat in get_args(StatName) if stat not in need_a_step)
            raise ValueError(
                f"observe sees no optimizer step, which {sorted(unfit)} would need; allowed are {allowed}. "
                "ActivationVarianceMonitor has all of them."
            )
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._model, self._patterns = model, layers
        found = find_layers(model)
        self._recorder = Recorder(select_layers(found, layers), chosen, device, found, Parts(model))
        self._stats: LayerStats | None = None
        self._is_open = False
        self._before: dict[nn.Parameter, _GradientState] = {}
        self._at_step: set[nn.Parameter] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> observe:
        self._recorder.keep_up_with(self._model, self._patterns)
        self._recorder.start_step()
        self._stats, self._is_open = None, True
        self._before = {parameter: _state_of(parameter) for parameter in self._model.parameters()}
        self._at_step = set()
        self._recorder.attach()
        self._recorder.announce_backward(1.0 / world_size(), self._model.parameters)
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        while self._handles:
            self._handles.pop().remove()
        self._recorder.detach()

    def compute(self) -> LayerStats:
        """The statistics of the block, as far as it has come. A collective where there are ranks.

        Raises:
            RuntimeError: a measurement has failed, on whichever rank.
        """
        if self._stats is None:
            self._record_norms(parameter for parameter in self._before if parameter not in self._at_step)
            stats = self._recorder.exchange(keep=True)
            if stats is None:
                raise RuntimeError(
                    f"the observation has failed: {self._recorder.disabled_reason or self._recorder.local_error}"
                )
            if self._is_open:
                return stats
            self._stats = stats
        return self._stats

    def _before_step(self, optimizer: Optimizer, *args: Any) -> None:
        """Called when any optimizer of the process is about to step: afterwards gradients may be gone."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._at_step.update(self._record_norms(parameter for parameter in parameters if parameter in self._before))

    def _record_norms(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Record the gradients that have come in the block, and return whose they are."""
        changed = [parameter for parameter in parameters if not self._before[parameter].is_that_of(parameter)]
        self._recorder.before_optimizer_step(changed)
        return changed


class _GradientState(NamedTuple):
    """A parameter's gradient as it was: which tensor, and after how many changes in place."""

    gradient: weakref.ref[Tensor] | None
    version: int

    def is_that_of(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter still has this gradient."""
        before = None if self.gradient is None else self.gradient()
        gradient = parameter.grad
        return gradient is before and (gradient is None or gradient._version == self.version)


def _state_of(parameter: nn.Parameter) -> _GradientState:
    gradient = parameter.grad
    return _GradientState(None, 0) if gradient is None else _GradientState(weakref.ref(gradient), gradient._version)
