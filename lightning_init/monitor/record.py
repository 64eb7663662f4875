"""What hooks keep of one layer in one logged step, until ranks add it up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_init.monitor.moments import Measured, Moments


class Place(NamedTuple):
    """A layer at one place of the model: an activation may be called behind several layers.

    Attributes:
        layer: its name.
        behind: of an activation, the name of the layer whose output it is called with; "" if that is not known.
    """

    layer: str
    behind: str = ""


def label_of(layer: str) -> str:
    """The name that a layer's numbers are logged under: its own, unless that is what the sum of all is called."""
    return "total:layer" if layer == "total" else layer


@dataclass(slots=True)
class LayerRecord:
    """What was recorded of one layer, at one place, since the collector was last drained.

    Attributes:
        outputs: moments of its outputs by number of units: a module that is called at two widths has two.
        gradients: moments of d loss / d output, all elements together.
        measured: by statistic, what else of its outputs was measured.
        with_graph: whether they are of calls that autograd records; those count more than calls under ``no_grad``.
    """

    outputs: dict[int, Moments] = field(default_factory=dict)
    gradients: Moments | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    with_graph: bool = False
