"""One batch through a model with nothing left behind: not in it, not in the random states, not on the console.

Models are too large to be copied, and sharded ones cannot be. So the model itself is called, and put back: what an
operation is about to overwrite is saved before, and attributes and containers are compared afterwards.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_init.introspect.operations import recorded_operations, storage_of
from lightning_init.introspect.trace import Trace, trace_of
from lightning_init.sandbox import random_states_kept, shared_state_kept

MOST_OBJECTS = 100_000
"""Objects that a model leads to whose contents are put back, nearest first."""

_STATISTICS = slice(3, 5)
"""Running mean and variance among the arguments of batch norms, which overwrite them without saying so."""


def trace(model: nn.Module, batch: object) -> Trace:
    """What feeds each weight of a model, with its gain, and where it leads to: found by one call, which leaves nothing.

    The operations of the call are recorded. From the input of every product with a weight they are walked back to
    where the signal was made anew (another weight, a normalisation, a sum of branches, attention, the model's input).
    What lies in between is replayed with normal numbers: the gain is 1/√E[f(z)²], z ~ N(0, 1), of any function,
    whatever its name. ``print`` shows a table.

    >>> print(trace(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1)), torch.ones(8, 2)))
    weight    fed by  gain   added with
    0.weight  input   1
    2.weight  relu    1.414              output

    Args:
        model: any module that runs where its parameters are.
        batch: what it is called with: a tuple of its arguments, a dictionary of keyword arguments, or its one argument.

    Returns:
        The trace; if the call failed, an empty one whose ``why_not`` says why.
    """
    return trace_call(model, lambda: call_with(model, batch))


@dataclass
class Look:
    """Ways to call a model on real data, which leave nothing behind.

    Attributes:
        model: what is called.
        calls: each calls it; the first that can be traced is the one that is used.
        outside: objects that the model leads to and that are nobody's state, such as the Trainer.
        why_not: why there are none, or others than one would expect.
    """

    model: nn.Module
    calls: Sequence[Callable[[], object]]
    outside: Sequence[object] = ()
    why_not: str = ""
    _used: Callable[[], object] | None = None

    def trace(self) -> Trace:
        """What feeds each weight."""
        found = Trace(why_not=self.why_not)
        for call in self.calls:
            traced = trace_call(self.model, call, outside=self.outside)
            found = traced.or_else(found) if found.why_not else traced
            if traced.uses:
                self._used = call
                break
        return found

    def again(self) -> None:
        """Call the model once more, as it was traced; nothing happens if it could not be."""
        if self._used is not None:
            with nothing_left_behind(self.model, self.outside):
                self._used()


def trace_call(model: nn.Module, call: Callable[[], object], *, outside: Sequence[object] = ()) -> Trace:
    """The trace of one call, which leaves nothing behind.

    Args:
        model: that is called.
        call: calls it, or something that does, such as a training step.
        outside: objects that the model leads to and that are nobody's state, such as the Trainer.

    Returns:
        The trace; an empty one that says why if the call failed.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return Trace(why_not="FSDP1 puts other tensors in the place of parameters")
    try:
        with nothing_left_behind(model, outside):
            with recorded_operations(model) as operations:
                call()
            return trace_of(operations)  # here too: operations that are replayed may draw random numbers
    except Exception as error:  # any code may stand here
        first_line = next(iter(str(error).strip().splitlines()), "")
        return Trace(why_not=f"{type(error).__name__}: {first_line}")


def call_with(model: nn.Module, batch: object) -> object:
    """Call a model with a batch: a tuple of its arguments, a mapping of keyword arguments, or its one argument."""
    if isinstance(batch, tuple):
        return model(*batch)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextlib.contextmanager
def nothing_left_behind(model: nn.Module, outside: Sequence[object] = ()) -> Iterator[None]:
    """Afterwards parameters, buffers, gradients, modes, attributes and random states are as before, bit for bit.

    Inside of it compiled code runs eagerly, dropout lets everything pass, and nothing is printed.

    Args:
        model: what may be called.
        outside: objects that are not put back, nor what only they lead to.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with (
        random_states_kept(_devices(model)),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.compiler.set_stance("force_eager"),
        shared_state_kept(model, most=MOST_OBJECTS, outside=outside),
        _SavesWhatIsOverwritten() as saved,
    ):
        warnings.simplefilter("ignore")
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.training = False
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):  # the outermost stays gathered until a backward pass
                    module.reshard()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            saved.restore()


def _devices(model: nn.Module) -> list[torch.device]:
    """The accelerators that a model is on: each has a random state of its own."""
    found = {parameter.device for parameter in model.parameters()}
    return [device for device in found if device.type not in ("cpu", "meta")]


class _SavesWhatIsOverwritten(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Saves the memory that was there before an operation writes to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, Tensor] = {}
        self._saved: dict[int, tuple[Tensor, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _written(func, args, kwargs or {}):
            storage = storage_of(tensor)
            if storage not in self._made and storage not in self._saved and tensor.layout is torch.strided:
                self._saved[storage] = tensor, tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._made[storage_of(tensor)] = tensor  # kept, so that nothing else gets its address
        return result

    def restore(self) -> None:
        """Put everything back."""
        for tensor, before in self._saved.values():
            if tensor.untyped_storage().nbytes() == before.nbytes():  # FSDP frees what it has gathered
                tensor.untyped_storage().copy_(before)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation will write to."""
    for index, argument in enumerate(func._schema.arguments):
        given = kwargs.get(argument.name) if argument.kwarg_only else (args[index] if index < len(args) else None)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (
                one for one in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(one, Tensor)
            )
    if "batch_norm" in func._schema.name:
        yield from (one for one in args[_STATISTICS] if isinstance(one, Tensor))
