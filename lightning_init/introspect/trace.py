"""What feeds each weight, and where it leads: found in the operations of one call, whatever the model's code is.

From the input of every product with a weight, the graph of operations is walked back to where the signal is made anew:
another product with a weight, a normalisation, an addition of two branches, attention, a lookup, or the model's input.
What lies between is the function that feeds the weight. A linear one asks for no gain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_init.introspect.destinations import Destination, Kinds, destinations
from lightning_init.introspect.operations import Operation, Value, normal_like, replay

Feed = Literal["input", "linear", "nonlinear", "unknown"]
"""What feeds a weight: the model's input, something linear or normalised, something else, or nobody knows."""

MOST_BETWEEN = 200
"""Values between two places where the signal is made anew, at most: a scan over time steps has thousands."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "linear", "trilinear"}
"""Operations that sum products of an input with a weight."""

NORMALIZATIONS = {
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "native_batch_norm_legit",
    "native_batch_norm_legit_no_training",
    "batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "fused_rms_norm",
}

ATTENTIONS = {
    "softmax",
    "safe_softmax",
    "scaled_dot_product_flash_attention",
    "scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_efficient_attention",
    "scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention_math",
}

LOOKUPS = {"embedding", "embedding_bag", "index_select", "index", "gather"}

LINEAR = {
    *("view", "unsafe_view", "reshape_alias", "t", "transpose", "transpose_", "permute", "expand", "as_strided"),
    *("unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "select", "slice", "unfold", "unbind", "index", "where"),
    *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "cat", "stack", "repeat", "flip", "roll"),
    *("clone", "detach", "alias", "to_copy", "copy_", "constant_pad_nd", "reflection_pad2d"),
    *("neg", "sum", "mean", "native_dropout", "masked_fill", "masked_fill_", "im2col", "col2im", "pixel_shuffle"),
    *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"),
}
"""Operations that are linear in what they read, if only one of their tensors is data or all are alike."""

LINEAR_IN_ONE = {"mul", "mul_", "div", "div_"}
"""Linear if only one factor is data, and that is no divisor."""

SUMS = {"add", "add_", "sub", "sub_", "rsub", "addcmul", "lerp"}


_KINDS = Kinds(
    frozenset(LINEAR),
    frozenset(LINEAR_IN_ONE),
    frozenset(SUMS),
    frozenset(LOOKUPS),
    frozenset(PRODUCTS | NORMALIZATIONS | ATTENTIONS),
)


@dataclass(frozen=True)
class Use:
    """One product with a weight.

    Attributes:
        parameters: full names of the parameters that the weight is made of.
        feed: what feeds it.
        is_output: nothing that comes out of it goes into another product with a weight: a head.
        destination: what it is added to, and whether a constant enlarges it.
    """

    parameters: frozenset[str]
    feed: Feed
    is_output: bool
    destination: Destination = field(default_factory=Destination)


@dataclass(frozen=True)
class Trace:
    """What one call of a model has shown.

    Attributes:
        uses: every product with a weight, in order of execution.
        why_not: why there are none, where the call failed.
    """

    uses: tuple[Use, ...] = ()
    why_not: str = ""

    def feed_of(self, name: str) -> Feed:
        """What feeds a parameter: where it is used several times, the least linear of them."""
        return self._feeds.get(name, "unknown")

    @functools.cached_property
    def _feeds(self) -> dict[str, Feed]:
        order: tuple[Feed, ...] = ("linear", "input", "nonlinear", "unknown")
        feeds: dict[str, Feed] = {}
        for use in self.uses:
            for name in use.parameters:
                feeds[name] = max(feeds.get(name, use.feed), use.feed, key=order.index)
        return feeds

    def tables_beside(self, name: str) -> Mapping[str, float]:
        """The lookup tables whose rows are added to a weight's outputs, with the constant that multiplies the rows."""
        tables: dict[str, float] = {}
        for destination in self._destinations.get(name, ()):
            for table, factor in destination.tables.items():
                tables[table] = max(factor, tables.get(table, 0.0))
        return tables

    def summands_with(self, name: str) -> int:
        """How many products are added up where what comes out of a weight goes; the weight's own counts."""
        return max((destination.summands for destination in self._destinations.get(name, ())), default=1)

    def is_enlarged(self, name: str) -> bool:
        """Whether a constant multiplies what comes out of a weight before something nonlinear reads it."""
        return any(destination.is_enlarged for destination in self._destinations.get(name, ()))

    def is_reduced(self, name: str) -> bool:
        """Whether a constant makes smaller what a weight reads, or what comes out of it."""
        return any(destination.is_reduced for destination in self._destinations.get(name, ()))

    @functools.cached_property
    def _destinations(self) -> dict[str, list[Destination]]:
        destinations: dict[str, list[Destination]] = {}
        for use in self.uses:
            for name in use.parameters:
                destinations.setdefault(name, []).append(use.destination)
        return destinations

    def or_else(self, other: Trace) -> Trace:
        """This trace, or what another knows where this one has nothing; it still says why it has nothing."""
        return self if self.uses else Trace(other.uses, self.why_not)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the weights that give the model's outputs."""
        names: dict[str, bool] = {}
        for use in self.uses:
            for name in sorted(use.parameters):
                names[name] = names.get(name, True) and use.is_output
        return tuple(name for name, is_output in names.items() if is_output)


def trace_of(operations: Sequence[Operation]) -> Trace:
    """The trace of recorded operations."""
    products = [product for product in map(_product, operations) if product is not None]
    leads_on = _ancestors(product.signal for product in products)
    walk = _Walk({id(product.operation) for product in products})
    found = destinations(operations, [product.operation for product in products], _KINDS)
    return Trace(
        tuple(
            Use(
                product.weight.parameters,
                walk.feed_of(product.signal),
                not any(output in leads_on for output in product.operation.outputs),
                destination,
            )
            for product, destination in zip(products, found, strict=True)
        )
    )


@dataclass(frozen=True)
class _Product:
    """An operation that multiplies a signal, which depends on data, by a weight, which does not."""

    operation: Operation
    signal: Value
    weight: Value


def _product(operation: Operation) -> _Product | None:
    if operation.name not in PRODUCTS:
        return None
    matrices = [one for one in operation.inputs if one.tensor.ndim > 1 or operation.name in ("mv", "addmv")]
    signals = [one for one in matrices if one.is_data]
    weights = [one for one in matrices if not one.is_data and one.parameters]
    return _Product(operation, signals[-1], weights[-1]) if signals and weights else None


def _ancestors(values: Iterable[Value]) -> set[Value]:
    """These values and all that lead to them."""
    found: set[Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += [one for one in value.inputs if one.is_data]
    return found


class _Walk:
    """Walks back from values to where their signal is made anew; what was found is remembered."""

    def __init__(self, products: set[int]) -> None:
        self._products = products
        self._origins: dict[Value, frozenset[Value]] = {}

    def feed_of(self, value: Value) -> Feed:
        """What kind of function leads from the origins of a value to it."""
        origins = self._origins_of(value)
        if not origins:
            return "unknown"
        if all(origin.operation is None for origin in origins):
            return "input"
        if self._is_linear(value, origins):
            return "linear"
        return _replayed_feed(value, origins)

    def _origins_of(self, value: Value) -> frozenset[Value]:
        """Where the signal in a value is made anew, nearest first."""
        waiting = [value]
        while waiting:  # not by recursion: scans over time steps are deep
            current = waiting[-1]
            if current in self._origins:
                waiting.pop()
                continue
            inputs = [one for one in current.inputs if one.is_data and one.tensor.is_floating_point()]
            missing = [] if self._is_origin(current) else [one for one in inputs if one not in self._origins]
            if missing:
                waiting += missing
                continue
            of_inputs = [self._origins[one] for one in inputs] if not self._is_origin(current) else []
            self._origins[current] = _joined(current, of_inputs)
            waiting.pop()
        return self._origins[value]

    def _is_origin(self, value: Value) -> bool:
        operation = value.operation
        if operation is None or id(operation) in self._products:
            return True
        if operation.name in NORMALIZATIONS or operation.name in ATTENTIONS or operation.name in PRODUCTS:
            return True  # of two signals, a product is attention
        return operation.name in LOOKUPS and any(one.parameters for one in operation.inputs)

    def _is_linear(self, value: Value, origins: frozenset[Value]) -> bool:
        """Whether everything in between is known to be linear."""
        waiting, seen = [value], set()
        while waiting:
            current = waiting.pop()
            if current in origins or current in seen:
                continue
            seen.add(current)
            operation = current.operation
            data = [one for one in current.inputs if one.is_data]
            if operation is None or len(seen) > MOST_BETWEEN:
                return False
            is_linear = operation.name in LINEAR or operation.name in SUMS
            if operation.name in LINEAR_IN_ONE:
                is_linear = len(data) == 1 and ("mul" in operation.name or operation.inputs[0] is data[0])
            if not is_linear or any(not one.tensor.is_floating_point() for one in data):
                return False
            waiting += data
        return True


def _joined(value: Value, of_inputs: Sequence[frozenset[Value]]) -> frozenset[Value]:
    """The origins of a value with inputs of these: itself, where it is the sum of signals from different places."""
    if not of_inputs:
        return frozenset({value})
    operation = value.operation
    if operation is not None and operation.name in SUMS and len(set(of_inputs)) > 1:
        return frozenset({value})
    return frozenset().union(*of_inputs)


def _replayed_feed(value: Value, origins: frozenset[Value]) -> Feed:
    """Ask the recorded operations themselves, with random numbers at the origins."""
    order = sorted(origins, key=lambda one: one.number)
    first, second = ({one: normal_like(one, 2 * i + j + 1) for i, one in enumerate(order)} for j in range(2))
    try:
        at_first = replay(value, first, MOST_BETWEEN)
        at_double = replay(value, {one: 2 * tensor for one, tensor in first.items()}, MOST_BETWEEN)
        renewed = _renewed(value, at_first, at_double, origins)
        if renewed:
            return _replayed_feed(value, renewed) if value not in renewed else "linear"
        at_second = replay(value, second, MOST_BETWEEN)
        at_sum = replay(value, {one: first[one] + second[one] for one in origins}, MOST_BETWEEN)
    except Exception:  # any operation may stand here, and refuse
        return "unknown"
    at_zero = at_first[value] + at_second[value] - at_sum[value]
    is_linear = _is_close(at_double[value] - at_first[value], at_first[value] - at_zero)
    return "linear" if is_linear else "nonlinear"


def _renewed(
    value: Value, at_first: Mapping[Value, Tensor], at_double: Mapping[Value, Tensor], origins: frozenset[Value]
) -> frozenset[Value]:
    """The first values on the way that do not depend on the scale at the origins: normalisations written by hand."""
    size = max(one.tensor.numel() for one in origins)
    found = [
        one
        for one, tensor in at_first.items()
        if one.is_data
        and one not in origins
        and tensor.is_floating_point()
        and tensor.numel() >= size
        and bool(tensor.std() > 0)
        and _is_close(tensor, at_double[one])
    ]
    first = [one for one in found if not any(other in found for other in one.inputs)]
    return frozenset(first) if _cuts(value, first, origins) else frozenset()


def _cuts(value: Value, cut: Sequence[Value], origins: frozenset[Value]) -> bool:
    """Whether no way leads from the origins to the value but through the cut."""
    waiting, seen = [value], set(cut)
    while waiting:
        current = waiting.pop()
        if current in origins:
            return False
        if current not in seen:
            seen.add(current)
            waiting += [one for one in current.inputs if one.is_data]
    return True


def _is_close(first: Tensor, second: Tensor) -> bool:
    scale = float(first.detach().float().abs().max()) if first.numel() else 0.0
    return torch.allclose(first.float(), second.float(), rtol=1e-2, atol=1e-2 * scale)
