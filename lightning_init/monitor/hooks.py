"""What is hung on modules and on the graph: it never disturbs the pass it belongs to, nor what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_init.monitor.layers import Layer


class Hook:
    """Shows what it is called with to ``see``, after ``layer``; what that raises goes to ``on_fault``, with its name.

    It copies and pickles as a hook that does nothing: a model is saved as if it had none.
    """

    __slots__ = ("layer", "on_fault", "see")

    def __init__(self, layer: Layer, see: Callable[..., None], on_fault: Callable[[str, Exception], None]) -> None:
        self.layer, self.see, self.on_fault = layer, see, on_fault

    def __call__(self, *shown: Any) -> None:
        """On a module, before or after its forward, or on a tensor: something is to be seen."""
        try:
            self.see(self.layer, *shown)
        except Exception as error:
            self.on_fault(self.layer.name, error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _make_no_hook, ()


class GradientHook(Hook):
    """Before the backward of the node that has made a tensor, which is its ``place``-th output."""

    __slots__ = ("output_nr",)

    def __init__(
        self, layer: Layer, see: Callable[..., None], on_fault: Callable[[str, Exception], None], output_nr: int = 0
    ) -> None:
        super().__init__(layer, see, on_fault)
        self.output_nr = output_nr

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """The node is about to be given the gradients of all its outputs; None is of one that nobody needs."""
        try:
            gradient = gradients[self.output_nr]
            if gradient is not None:
                self.see(self.layer, gradient)
        except Exception as error:
            self.on_fault(self.layer.name, error)


def no_hook(*args: Any) -> None:
    """What a copied or unpickled hook is."""


def _make_no_hook() -> Callable[..., None]:
    return no_hook
