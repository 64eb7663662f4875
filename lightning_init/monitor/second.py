"""A second exchange, for statistics on request that don't add up: the largest value, and kurtosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_init.monitor.central import shifted_to
from lightning_init.monitor.layout import VectorLayout
from lightning_init.monitor.ranks import reduce_
from lightning_init.monitor.tap import LayerRecord


class SecondPass:
    """What has to wait for the first sum: fourth powers about the common mean, and a maximum.

    Args:
        stats: the chosen statistics; without ``activation_max`` and ``kurtosis`` nothing happens.
        layout: of the first exchange.
        records: of this rank, empty if it has failed. It takes part all the same.
    """

    def __init__(self, stats: Sequence[str], layout: VectorLayout, records: Mapping[str, LayerRecord]) -> None:
        self.largest: Tensor | None = None  # [layers]
        self.fourth: Tensor | None = None  # Σ(x - mean)⁴, [layers]
        self._stats, self._layout, self._records = stats, layout, records

    def exchange(self, total: Tensor, on_fault: Callable[[str, Exception], None]) -> None:
        """One collective per statistic; a rank that cannot tell its part makes it NaN for this step."""
        if "activation_max" in self._stats:
            self.largest = self._guarded(self._own_largest, on_fault)
            reduce_(self.largest, maximum=True)
        if "kurtosis" in self._stats:
            self.fourth = self._guarded(lambda: self._own_fourth(total), on_fault)
            reduce_(self.fourth)

    def _guarded(self, own: Callable[[], Tensor], on_fault: Callable[[str, Exception], None]) -> Tensor:
        try:
            return own()
        except Exception as error:
            on_fault("second exchange", error)
            return torch.full((len(self._layout.layers),), torch.nan, dtype=torch.float64, device=self._layout.device)

    def _own_largest(self) -> Tensor:
        values = self._zeros()
        for i, record in self._found():
            if record.largest is not None:
                values[i] = record.largest
        return values

    def _own_fourth(self, total: Tensor) -> Tensor:
        values, means = self._zeros(), self._layout.means(total)
        for i, record in self._found():
            if record.central is not None:
                values[i] = shifted_to(record.central, means[i])[2]
        return values

    def _found(self) -> list[tuple[int, LayerRecord]]:
        return [(i, self._records[name]) for i, name in enumerate(self._layout.layers) if name in self._records]

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._layout.layers), dtype=torch.float64, device=self._layout.device)
