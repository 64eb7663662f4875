"""What statistics on request measure of parameters and of their gradients: histograms, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.moments import Measured
from lightning_init.monitor.parameter_norms import local_elements
from lightning_init.monitor.record import LayerRecord, Place
from lightning_init.monitor.statistics import measures_of


class ParameterMeasures:
    """Measures, between two exchanges, the parameters of layers and their gradients before an optimizer's step.

    Args:
        layers: whose parameters are measured.
        stats: which statistics will be asked for.
        world_size: number of ranks that will be summed over.
    """

    def __init__(self, layers: Sequence[Layer], stats: Sequence[str], world_size: int) -> None:
        self.layers = [layer for layer in layers if layer.parameters]
        self.measures = measures_of(stats, of=["weight", "gradient"])
        self.world_size = world_size
        self._measured: dict[str, dict[nn.Parameter, Measured]] = {name: {} for name in self.measures}

    def before_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: float | Tensor = 1.0) -> None:
        """Measure ``gradients`` times ``factor``, and their parameters; of a parameter, the last time counts."""
        for name, measure in self.measures.items():
            for layer in self.layers:
                for parameter in layer.parameters:
                    if parameter not in gradients:
                        continue
                    whole = gradients[parameter] * factor if measure.of == "gradient" else parameter.detach()
                    elements, copies = local_elements(whole, self.world_size)
                    measured = measure.measure(layer, elements)
                    if isinstance(measured, Tensor) and measure.adds_up == "sum":
                        measured = measured / copies  # ranks that hold the same elements count them once together
                    if measured is not None:
                        self._measured[name][parameter] = measured

    def clear(self) -> None:
        """Forget what was measured."""
        for measured in self._measured.values():
            measured.clear()

    def add_to(self, records: Mapping[Place, LayerRecord]) -> None:
        """Put what was measured of a layer's parameters to what was recorded of its outputs."""
        for name, measure in self.measures.items():
            for layer in self.layers:
                record = records.get(Place(layer.name))
                of_parameters = [self._measured[name][p] for p in layer.parameters if p in self._measured[name]]
                if record is not None and of_parameters:
                    total, *others = of_parameters
                    for measured in others:
                        total = measure.merge(total, measured)
                    record.measured[name] = total
