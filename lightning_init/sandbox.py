"""Call a module to find out what it computes, and leave no trace: not in it, not in the random states, no warnings.

Some questions are answered best by the module itself: whether it is an activation, whether a norm multiplies by its
scale or by 1 + scale, what its second moment is. :func:`sandbox` makes the copy that is asked.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_MAX_OBJECTS = 1000
"""How many of the objects that a copy leads to are put back, at most, nearest first: a configuration has few dozens."""

_MAX_ELEMENTS = 1 << 16
"""Larger tensors are not put back: a copy of each would be needed."""


@contextmanager
def sandbox(module: nn.Module, *, dtype: torch.dtype | None = None, zeros: bool = False) -> Iterator[nn.Module]:
    """A copy of ``module`` without hooks, on the CPU and in eval mode, whose ``forward`` may be called at will.

    Inside of the context warnings are silenced; at its end the random states are as before, and so is whatever the copy
    shares with the module: an object whose ``__deepcopy__`` returns itself, what a function has in its closure.
    Attributes in ``__slots__`` and global variables are not restored.

    >>> with sandbox(nn.Dropout()) as copied:
    ...     copied(torch.ones(3))
    tensor([1., 1., 1.])

    Args:
        module: never called or changed itself.
        dtype: of the copy's floating-point parameters and buffers; None for their own.
        zeros: make new zeros for the tensors of a module without children, in their own dtype and whole shape. The
            values are not read, so they may be shards, on the meta device, or uninitialised memory. All else is
            shared, because the bookkeeping that comes with shards cannot be copied.

    Raises:
        Exception: the module cannot be copied.
    """
    with random_states_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shell = _without_hooks(module)
        copied = shell if zeros else copy.deepcopy(shell, _hooks_forgotten(module))
        with shared_state_kept(copied):
            if zeros:
                _fill_with_zeros(copied)
                copied.__dict__["training"] = False
            else:
                copied.to("cpu", dtype).eval()
            yield copied


@contextmanager
def random_states_kept(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Afterwards the global random states of torch (CPU), Python and NumPy are as before.

    Args:
        devices: accelerators whose states are kept too.
    """
    numpy = sys.modules.get("numpy")  # without it nothing draws from it
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        kinds = {device.type for device in devices}
        with ExitStack() as stack:
            for kind in kinds or {"cuda"}:
                of_kind = [device for device in devices if device.type == kind]
                stack.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def is_elementwise(
    function: Callable[[Tensor], object],
    numbers: Tensor,
    *,
    groups: Sequence[Tensor] | None = None,
    rtol: float = 1e-5,
) -> bool:
    """Whether a number's result is the same in other company, at another place. NaN (a logarithm's) equals NaN.

    >>> is_elementwise(torch.relu, torch.tensor([-1.0, 2.0])), is_elementwise(nn.Softmax(0), torch.tensor([-1.0, 2.0]))
    (True, False)

    Args:
        function: what is asked; it gets copies, because activations may work in place.
        numbers: what it is called with first. Shape: [at least 2]
        groups: the indices of the numbers that it is called with again, one group at a time; None: each alone.
        rtol: relative difference that is rounding.
    """
    together = function(numbers.clone())
    if not isinstance(together, Tensor) or together.shape != numbers.shape or not together.is_floating_point():
        return False
    if groups is None:
        groups = list(torch.arange(len(numbers), device="cpu").unsqueeze(1))  # each [1]
    apart: list[Tensor] = []
    for group in groups:
        result = function(numbers[group])  # indexing copies
        if not isinstance(result, Tensor) or result.shape != group.shape:
            return False
        apart.append(result)
    return torch.allclose(together[torch.cat(list(groups))], torch.cat(apart), rtol=rtol, atol=1e-6, equal_nan=True)


def _without_hooks(module: nn.Module) -> nn.Module:
    """An object of the module's type that has its attributes, but no hooks.

    Hooks are the user's, and a method among them leads to the whole model. The type's ``__new__`` and ``__init__``
    are not called, since they may ask for anything.
    """
    shell: nn.Module = object.__new__(type(module))
    shell.__dict__.update({name: OrderedDict() if _is_hooks(name) else value for name, value in vars(module).items()})
    return shell


def _hooks_forgotten(module: nn.Module) -> dict[int, Any]:
    """The memo with which ``copy.deepcopy`` puts empty dictionaries for the hooks of all modules inside."""
    return {
        id(value): OrderedDict()
        for inner in module.modules()
        for name, value in vars(inner).items()
        if _is_hooks(name) and isinstance(value, dict)
    }


def _is_hooks(attribute: str) -> bool:
    return attribute.endswith("_hooks")  # _forward_hooks, _forward_pre_hooks, _state_dict_pre_hooks, …


def _fill_with_zeros(shell: nn.Module) -> None:
    for group in ("_parameters", "_buffers"):
        shell.__dict__[group] = {
            name: None if tensor is None else torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in shell.__dict__[group].items()
        }


@contextmanager
def shared_state_kept(root: object, *, most: int = _MAX_OBJECTS, outside: Iterable[object] = ()) -> Iterator[None]:
    """Afterwards the objects that ``root`` leads to have the contents that they had before.

    Args:
        root: where to begin.
        most: objects, at most, nearest first.
        outside: objects that are left out, with what only they lead to.
    """
    restore = [_restorer(value) for value in _reachable(root, most, {id(value) for value in outside})]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _reachable(root: object, most: int, outside: set[int]) -> list[object]:
    """The object and what can be reached from it, nearest first."""
    found: dict[int, object] = {}
    queue = deque([root])
    while queue and len(found) < most:
        value = queue.popleft()
        members = _members(value) if id(value) not in outside else None
        if members is not None and id(value) not in found:
            found[id(value)] = value
            queue.extend(members)
    return list(found.values())


def _members(value: object) -> list[object] | None:
    """What is directly inside of a container, a function or a user's object; None for what has no contents."""
    if isinstance(value, (Tensor, torch.Generator, random.Random)) or type(value).__module__.startswith("numpy.random"):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, CellType):
        return _cell_contents(value)
    if isinstance(value, FunctionType):
        return list(value.__closure__ or ())
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    return [vars(value)] if _is_users_object(value) else None


def _is_users_object(value: object) -> bool:
    """Whether what an object has inside is the model's: not a class, a logger, a process group or a device mesh."""
    if isinstance(value, nn.Module):
        return True
    library = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and library != "torch" and library not in sys.stdlib_module_names


def _cell_contents(cell: CellType) -> list[object]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable without a value yet
        return []


def _restorer(value: Any) -> Callable[[], None]:
    """A function that gives an object its present contents again, if it has others by then."""
    if isinstance(value, Tensor):
        return _tensor_restorer(value)
    if isinstance(value, CellType) and (contents := _cell_contents(value)):
        return functools.partial(setattr, value, "cell_contents", contents[0])
    if isinstance(value, (dict, list, set, deque)):
        return _container_restorer(value)
    return _generator_restorer(value)


def _generator_restorer(value: Any) -> Callable[[], None]:
    """Random generators of one's own: torch's, Python's, and NumPy's old and new."""
    if isinstance(value, torch.Generator):
        return functools.partial(_set_state, value, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    if numpy and isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return _nothing


def _container_restorer(container: Any) -> Callable[[], None]:
    entries = list(container.items() if isinstance(container, dict) else container)
    before = _identities(container)

    def restore() -> None:
        if _identities(container) != before:
            container.clear()
            put_in = container.extend if isinstance(container, (list, deque)) else container.update
            put_in(entries)

    return restore


def _identities(container: Any) -> list[int]:
    """Of keys and values: ``==`` would compare tensors, whose result is no truth value."""
    parts = chain.from_iterable(container.items()) if isinstance(container, dict) else container
    return [id(part) for part in parts]


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    """Plain tensors in memory; those of inference mode have no version that would tell of a change."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not is_plain or tensor.is_inference() or tensor.numel() > _MAX_ELEMENTS or not has_memory(tensor):
        return _nothing
    memory, values, version = tensor.detach(), tensor.detach().clone(), tensor._version

    def restore() -> None:
        if tensor.dtype != memory.dtype or tensor.device != memory.device:  # Module.to replaces what is in a parameter
            tensor.data = memory
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(values)

    return restore


def has_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor's memory is there: FSDP frees what it has gathered, and reading that ends the process."""
    if tensor.layout is not torch.strided:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return int(tensor.untyped_storage().nbytes()) >= needed


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _nothing() -> None:
    """What most objects need to be as before."""
