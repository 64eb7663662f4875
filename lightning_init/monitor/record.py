"""What hooks keep of one layer in one logged step, until ranks add it up."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_init.monitor.moments import Measured, Moments


@dataclass(slots=True)
class LayerRecord:
    """What was recorded of one layer since the collector was last drained.

    Attributes:
        outputs: moments of its outputs by number of units: a module that is called at two widths has two.
        gradients: moments of d loss / d output, all elements together.
        measured: by statistic, what else of its outputs was measured.
    """

    outputs: dict[int, Moments] = field(default_factory=dict)
    gradients: Moments | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
