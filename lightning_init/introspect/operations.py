"""A graph of what a model computes: every operation of one call, with what it read, down to parameters and data.

The calls are recorded where PyTorch dispatches them, below autograd, so that functions, custom layers and subclasses of
modules all show, under whatever name their authors gave them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_init.introspect.names import clean_name
from lightning_init.sandbox import has_memory

View = tuple[int, int, torch.Size, tuple[int, ...]]
"""What tells one tensor from another: its storage, and which part of it. Autograd makes new objects of one tensor."""

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "new_",
    "arange",
    "scalar_tensor",
    "bernoulli",
    "normal",
    "lift",
)
"""Beginnings of operations whose result depends on their input's shape only, or on numbers in the code (lift)."""

_DRAWS_INTO = ("bernoulli_", "normal_", "uniform_", "random_", "exponential_", "zero_", "fill_")


@dataclass(eq=False, slots=True)
class Operation:
    """One call of one operation.

    Attributes:
        name: as in ``aten``, without overload and leading underscores: ``addmm``, ``softmax``.
        function: what was called.
        arguments: positional ones; a :class:`Value` in place of every tensor.
        options: keyword ones, likewise.
        inputs: the values among both.
        outputs: the tensors that it gave.
    """

    name: str
    function: Any
    arguments: Any
    options: Any
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Value:
    """A tensor at one moment.

    Attributes:
        tensor: it, kept alive: it may have been overwritten since.
        operation: what gave it; None for parameters, data and constants.
        parameters: full names of the parameters that it was made of.
        is_data: whether it depends on the model's input.
        kept: a copy of what a parameter of one dimension held.
        number: greater than those of all values before.
    """

    tensor: Tensor
    operation: Operation | None = None
    parameters: frozenset[str] = frozenset()
    is_data: bool = False
    kept: Tensor | None = None
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def inputs(self) -> list[Value]:
        """What it was computed from."""
        return self.operation.inputs if self.operation else []


@contextmanager
def recorded_operations(model: nn.Module) -> Iterator[list[Operation]]:
    """Record all operations that are called inside of the context, in order.

    Tensors that are neither parameters nor buffers of the model, nor made in the context, count as data.

    Args:
        model: whose parameters are to be told from data. They are asked for before each module's forward pass, because
            FSDP2 gathers them there.
    """
    recorder = _Recorder(model)
    hooks = [
        module.register_forward_pre_hook(lambda module, _: recorder.know(module))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks, and keeps its parameters
    ]
    try:
        with recorder:
            yield recorder.operations
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, with the tensors that go in and come out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._values: dict[View, Value] = {}
        self._views: dict[int, set[View]] = {}
        self._names_of: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._constants: dict[int, Tensor] = {}
        self._full_names = _full_names(model)
        for buffer in model.buffers():
            self._constants[storage_of(buffer)] = buffer
        self.know(model)

    def know(self, module: nn.Module) -> None:
        """Take note of the parameters that a module, and what is inside, has now."""
        for inner in module.modules():
            for attribute, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
                names = self._full_names.get((id(inner), attribute), frozenset())
                _, known = self._names_of.get(storage_of(parameter), (None, frozenset()))
                self._names_of[storage_of(parameter)] = parameter, known | names
                # What FSDP2 has gathered came from somewhere: it is the parameter all the same. Vectors, such as slopes
                # of activations and scales of norms, are copied: FSDP2 frees them, and a replay needs what they hold.
                before = self._values.get(_view(parameter))
                kept = before.kept if before is not None and before.parameters == known | names else _copy_of(parameter)
                self._values[_view(parameter)] = Value(parameter, parameters=known | names, kept=kept)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__.lstrip("_")
        arguments, options = tree_map(self._value_of, (tuple(args), dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_flatten((arguments, options))[0] if isinstance(one, Value)]
        operation = Operation(name, func, arguments, options, inputs)
        self._add(operation, result)
        return result

    def _add(self, operation: Operation, result: Any) -> None:
        inputs = operation.inputs
        is_drawn = operation.name.startswith(_FACTORIES) or operation.name in _DRAWS_INTO
        parameters = frozenset().union(*(one.parameters for one in inputs)) if not is_drawn else frozenset()
        is_data = not is_drawn and any(one.is_data for one in inputs)
        outputs = [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
        operation.outputs = [
            Value(tensor, operation, frozenset() if is_data else parameters, is_data) for tensor in outputs
        ]
        self.operations.append(operation)
        for value in operation.outputs:
            self._values[_view(value.tensor)] = value
            self._views.setdefault(storage_of(value.tensor), set()).add(_view(value.tensor))
            if is_data and operation.name.endswith("_"):
                self._spread(value)

    def _spread(self, written: Value) -> None:
        """Data that is written into a part of a constant, such as shifted tokens, makes data of the whole."""
        mine = _view(written.tensor)
        for view in self._views[mine[0]] - {mine}:
            if not self._values[view].is_data:
                self._values[view] = Value(self._values[view].tensor, is_data=True)

    def _value_of(self, argument: Any) -> Any:
        """The value that a tensor has now; anything else as it is."""
        if not isinstance(argument, Tensor):
            return argument
        view = _view(argument)
        value = self._values.get(view)
        if value is None:
            value = self._values[view] = self._outer_value(argument)
        return value

    def _outer_value(self, tensor: Tensor) -> Value:
        """A tensor that was there before: a parameter, a buffer, or else data."""
        storage = storage_of(tensor)
        if storage in self._names_of:
            return Value(tensor, parameters=self._names_of[storage][1])
        return Value(tensor, is_data=storage not in self._constants)


def _full_names(model: nn.Module) -> dict[tuple[int, str], frozenset[str]]:
    """Every name of each module's parameters, by the module and the name there."""
    names: dict[tuple[int, str], frozenset[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            name = clean_name(model, f"{path}.{attribute}" if path else attribute)
            names[id(module), attribute] = names.get((id(module), attribute), frozenset()) | {name}
    return names


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common, for as long as one of them lives."""
    try:
        held = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        return int(held.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and some subclasses, have none
        return id(tensor)


def _view(tensor: Tensor) -> View:
    if tensor.layout is not torch.strided:
        return id(tensor), 0, tensor.shape, ()
    return storage_of(tensor), int(tensor.storage_offset()), tensor.shape, tensor.stride()


def normal_like(value: Value, seed: int = 0) -> Tensor:
    """Normal random numbers of a value's shape, type and device, where it has real ones; else the value itself."""
    if not value.tensor.is_floating_point():
        return value.tensor
    drawn = torch.randn(value.tensor.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(value.tensor.device, value.tensor.dtype)  # whole, also of what ranks hold in parts


def _copy_of(parameter: Tensor) -> Tensor | None:
    """What a parameter of one dimension holds, where it is whole and in memory."""
    is_readable = parameter.ndim <= 1 and not isinstance(parameter, DTensor) and not parameter.is_meta
    return parameter.detach().clone() if is_readable and has_memory(parameter) else None


def _is_of_vectors(value: Value, depth: int = 8) -> bool:
    """Whether a value is made of nothing but constants and parameters whose numbers are known."""
    if value.is_data or depth == 0:
        return False
    if value.operation is None:
        return not value.parameters or _is_plausible(value.kept)
    return all(_is_of_vectors(one, depth - 1) for one in value.inputs)


def _is_plausible(kept: Tensor | None) -> TypeGuard[Tensor]:
    """Whether the copy of a parameter, if there is one, holds numbers that somebody could have written."""
    return kept is not None and bool(kept.isfinite().all()) and bool((kept.abs() < 1e3).all())


def replay(value: Value, given: Mapping[Value, Tensor], limit: int) -> dict[Value, Tensor]:
    """Compute a value again from other tensors than it was computed from, with random numbers for parameters.

    The parameters' own may be gone by now (FSDP2 frees what it gathers), and are arbitrary before they are drawn; but
    vectors (slopes, scales) keep their own, unless nobody has written to their memory.

    Args:
        value: what is asked for.
        given: tensors in place of some of the values that lead to it; all others that depend on data are computed.
        limit: operations between ``given`` and ``value``, at most.

    Returns:
        All values that were computed, ``value`` among them.

    Raises:
        RuntimeError: there are too many operations in between, or one of them fails.
    """
    computed: dict[Value, Tensor] = dict(given)

    def tensor_of(one: Any) -> Any:
        if not isinstance(one, Value):
            return one
        if one.operation is not None and one not in computed and (one.is_data or _is_of_vectors(one)):
            compute(one.operation)
        if one not in computed:
            if not one.parameters and (isinstance(one.tensor, DTensor) or not has_memory(one.tensor)):
                raise RuntimeError("a rank holds only a part of it, or nothing any more")
            if not one.parameters:
                computed[one] = one.tensor
            else:
                computed[one] = one.kept if _is_plausible(one.kept) else normal_like(one)
        return computed[one].clone()  # operations may work in place

    def compute(operation: Operation) -> None:
        if len(computed) > limit:
            raise RuntimeError(f"more than {limit} values in between")
        if "c10d" in operation.function.namespace:
            raise RuntimeError("ranks would wait for each other")
        arguments, options = tree_map(tensor_of, (operation.arguments, operation.options))
        outputs = [one for one in tree_flatten(operation.function(*arguments, **options))[0] if isinstance(one, Tensor)]
        computed.update(
            (one, output) for one, output in zip(operation.outputs, outputs, strict=True) if one not in given
        )

    tensor_of(value)
    return computed
