"""The monitor without Lightning: a context manager around any code that runs a model forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import get_args

import torch
from torch import nn

from lightning_init.checks import check_list
from lightning_init.distributed.ranks import world_size
from lightning_init.introspect.layers import Parts, find_layers, select_layers
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import STATISTICS, LayerStats, StatName, chosen_stats


class observe:
    """Record every layer's output and gradient in a block of plain PyTorch: the same numbers as the monitor's.

    All forward and backward passes inside the block are recorded; norms are those of ``parameter.grad`` when
    ``compute`` is called. Where ``torch.distributed`` is initialised, all ranks have to do the same, and gradients are
    those of the mean of their losses.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> with observe(model, stats=["activation_variance", "gradient_norm"]) as observation:
    ...     model(torch.randn(16, 4)).square().mean().backward()
    >>> stats = observation.compute()
    >>> list(stats.values["activation_variance"]), list(stats.values["gradient_norm"])
    (['0', '1', '2'], ['0', '2', 'total'])

    Args:
        model: any module; it may be wrapped or compiled. Compiled code runs eagerly inside the block.
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
        self._parts = Parts(model)
        found = find_layers(model)
        self._recorder = Recorder(select_layers(found, layers), chosen, device, found)
        self._stats: LayerStats | None = None

    def __enter__(self) -> observe:
        if not self._parts.are_those_of(self._model):
            self._parts = Parts(self._model)
            found = find_layers(self._model)
            self._recorder.watch(select_layers(found, self._patterns, missing_ok=True), found)
        self._recorder.start_step()
        self._stats = None
        self._recorder.attach()
        self._recorder.announce_backward(1.0 / world_size())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.detach()

    def compute(self) -> LayerStats:
        """The statistics of the block. A collective where there are ranks.

        Raises:
            RuntimeError: a measurement has failed, on whichever rank.
        """
        if self._stats is None:
            self._recorder.before_optimizer_step(self._model.parameters())
            self._stats = self._recorder.exchange()
            if self._stats is None:
                raise RuntimeError(
                    f"the observation has failed: {self._recorder.disabled_reason or self._recorder.local_error}"
                )
        return self._stats
