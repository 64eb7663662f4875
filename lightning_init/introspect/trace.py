"""What feeds each weight, and where it leads: found in the operations of one call, whatever the model's code is.

From the input of every product with a weight, the graph of operations is walked back to where the signal is made anew:
another product with a weight, a normalisation, an addition of two branches, attention, a lookup, or the model's input.
What lies between is the function that feeds the weight. A linear one asks for no gain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_init.introspect.destinations import Destination, Kinds, destinations
from lightning_init.introspect.operation_kinds import (
    ATTENTIONS,
    LINEAR,
    LINEAR_IN_ONE,
    LOOKUPS,
    MOST_BETWEEN,
    NORMALIZATIONS,
    PRODUCTS,
    SUMS,
)
from lightning_init.introspect.operations import Operation, Value, normal_like, replay
from lightning_init.introspect.replayed_gain import gain_between, names_between

Feed = Literal["input", "linear", "nonlinear", "unknown"]
"""What feeds a weight: the model's input, something linear or normalised, something else, or nobody knows."""

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
        gain: that of what feeds it: 1/√E[f(z)²] with z ~ N(0, 1) where its signal was made anew; 1 of what is linear;
            None where it could not be found.
        functions: what is nonlinear in it, by PyTorch's names of operations: ``("gelu",)``.
        is_output: nothing that comes out of it goes into another product with a weight: a head.
        destination: what it is added to, and whether a constant enlarges it.
        follows: the parameters of the products that feed it, if nothing else does: no normalisation, no sum.
        is_normalized: all that comes out of it goes into normalisations.
    """

    parameters: frozenset[str]
    feed: Feed
    is_output: bool
    gain: float | None = None
    functions: tuple[str, ...] = ()
    destination: Destination = field(default_factory=Destination)
    follows: frozenset[str] = frozenset()
    is_normalized: bool = False


@dataclass(frozen=True)
class Trace:
    """What one call of a model has shown.

    Attributes:
        uses: every product with a weight, in order of execution.
        why_not: why there are none, where the call failed.
        is_of_call: whether the model was called; False of what its order of modules shows.
    """

    uses: tuple[Use, ...] = ()
    why_not: str = ""
    is_of_call: bool = True

    def feed_of(self, name: str) -> Feed:
        """What feeds a parameter: where it is used several times, the least linear of them."""
        order: tuple[Feed, ...] = ("linear", "input", "nonlinear", "unknown")
        return max((use.feed for use in self._uses_of(name)), key=order.index, default="unknown")

    def gain_of(self, name: str) -> float | None:
        """The gain of what feeds a parameter: where it is used several times, the smallest; None if any is unknown."""
        gains = [use.gain for use in self._uses_of(name)]
        known = [gain for gain in gains if gain is not None]
        return min(known) if known and len(known) == len(gains) else None

    def functions_of(self, name: str) -> tuple[str, ...]:
        """What is nonlinear in what feeds a parameter, by the names of operations."""
        return tuple(dict.fromkeys(one for use in self._uses_of(name) for one in use.functions))

    def _uses_of(self, name: str) -> Sequence[Use]:
        return self._by_parameter.get(name, ())

    @functools.cached_property
    def _by_parameter(self) -> dict[str, list[Use]]:
        return _by_names((use.parameters, use) for use in self.uses)

    @functools.cached_property
    def _by_parameter_before(self) -> dict[str, list[Use]]:
        """By parameter, the uses that it feeds."""
        return _by_names((use.follows, use) for use in self.uses)

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain data, for JSON: by parameter, what feeds it and where it leads to, in execution order."""
        heads = set(self.heads)
        rows = {
            name: {
                "feed": self.feed_of(name),
                "functions": list(self.functions_of(name)),
                "gain": self.gain_of(name),
                "tables_beside": dict(self.tables_beside(name)),
                "summands": self.summands_with(name),
                "is_output": name in heads,
            }
            for name in self._by_parameter
        }
        return {"why_not": self.why_not, "parameters": rows}

    def __str__(self) -> str:
        """A table: a line for each weight, in the order of execution."""
        if not self.uses:
            return f"nothing traced: {self.why_not}" if self.why_not else "nothing traced"
        lines = [("weight", "fed by", "gain", "added with", "")]
        for name, row in self.to_dict()["parameters"].items():
            fed_by = ", ".join(row["functions"]) or row["feed"]
            gain = "?" if row["gain"] is None else f"{row['gain']:.4g}"
            others = str(row["summands"] - 1) if row["summands"] > 1 else ""
            tables = ", ".join(row["tables_beside"])
            lines.append((name, fed_by, gain, " ".join(filter(None, (others, tables))), "output" * row["is_output"]))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(row.rstrip() for row in rows)

    def tables_beside(self, name: str) -> Mapping[str, float]:
        """The lookup tables whose rows are added to a weight's outputs, with the constant that multiplies the rows."""
        tables: dict[str, float] = {}
        for destination in self._destinations_of(name):
            for table, factor in destination.tables.items():
                tables[table] = max(factor, tables.get(table, 0.0))
        return tables

    def summands_with(self, name: str) -> int:
        """How many products are added up where what comes out of a weight goes; the weight's own counts."""
        return max((destination.summands for destination in self._destinations_of(name)), default=1)

    def is_enlarged(self, name: str) -> bool:
        """Whether a constant multiplies what comes out of a weight before something nonlinear reads it."""
        return any(destination.is_enlarged for destination in self._destinations_of(name))

    def is_reduced(self, name: str) -> bool:
        """Whether a constant makes smaller what a weight reads, or what comes out of it."""
        return any(destination.is_reduced for destination in self._destinations_of(name))

    def _destinations_of(self, name: str) -> list[Destination]:
        return [use.destination for use in self._uses_of(name)]

    def is_normalized(self, name: str) -> bool:
        """Whether all that comes out of a weight goes into normalisations, which make its scale meaningless."""
        uses = self._uses_of(name)
        return bool(uses) and all(use.is_normalized for use in uses)

    def functions_behind(self, name: str) -> tuple[str, ...]:
        """What is nonlinear between a weight's output and the weights that it feeds."""
        fed = self._by_parameter_before.get(name, ())
        return tuple(dict.fromkeys(one for use in fed for one in use.functions))

    def depth_of(self, name: str) -> int:
        """How many weights the longest chain through this one has: each feeds the next, and nothing else does."""
        before, after = self._depths
        return before.get(name, 1) + after.get(name, 1) - 1

    @functools.cached_property
    def _depths(self) -> tuple[dict[str, int], dict[str, int]]:
        """By parameter, the lengths of the longest chain that ends with it, and of the longest that begins with it."""
        before: dict[str, int] = {}
        for use in self.uses:
            length = 1 + max((before.get(one, 0) for one in use.follows - use.parameters), default=0)
            before.update({name: max(length, before.get(name, 0)) for name in use.parameters})
        after: dict[str, int] = {}
        for use in reversed(self.uses):
            length = max((after.get(name, 1) for name in use.parameters), default=1)
            after.update({name: max(length, after.get(name, 0)) for name in use.parameters})
            after.update({one: max(length + 1, after.get(one, 0)) for one in use.follows - use.parameters})
        return before, after

    def or_else(self, other: Trace) -> Trace:
        """This trace, or what another knows where this one has nothing; it still says why it has nothing."""
        return self if self.uses else Trace(other.uses, self.why_not, other.is_of_call)

    @functools.cached_property
    def heads(self) -> tuple[str, ...]:
        """Names of the weights that give the model's outputs."""
        return tuple(name for name, uses in self._by_parameter.items() if all(use.is_output for use in uses))


def _by_names(named: Iterable[tuple[frozenset[str], Use]]) -> dict[str, list[Use]]:
    """Uses by each of the names beside them."""
    found: dict[str, list[Use]] = {}
    for names, use in named:
        for name in sorted(names):
            found.setdefault(name, []).append(use)
    return found


def trace_of(operations: Sequence[Operation]) -> Trace:
    """The trace of recorded operations."""
    products = [product for product in map(_product, operations) if product is not None]
    leads_on = _ancestors(product.signal for product in products)
    walk = _Walk({id(product.operation) for product in products})
    found = destinations(operations, [product.operation for product in products], _KINDS)
    weights = {id(product.operation): product.weight.parameters for product in products}
    readers = _readers(operations)
    uses = []
    for product, destination in zip(products, found, strict=True):
        function = walk.function_behind(product.signal)
        uses.append(
            Use(
                product.weight.parameters,
                function.feed,
                not any(output in leads_on for output in product.operation.outputs),
                function.gain,
                function.names,
                destination,
                walk.products_behind(product.signal, weights),
                _is_normalized(product.operation, readers),
            )
        )
    return Trace(tuple(uses))


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


def _readers(operations: Sequence[Operation]) -> dict[Value, list[Operation]]:
    """The operations that read each value of data."""
    readers: dict[Value, list[Operation]] = {}
    for operation in operations:
        for value in operation.inputs:
            if value.is_data:
                readers.setdefault(value, []).append(operation)
    return readers


def _is_normalized(product: Operation, readers: Mapping[Value, Sequence[Operation]]) -> bool:
    """Whether all that comes out of a product goes into normalisations, by way of nothing but views and biases."""
    waiting, is_read = list(product.outputs), False
    seen: set[Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen or len(seen) > MOST_BETWEEN:
            continue
        seen.add(value)
        for operation in readers.get(value, ()):
            if operation.name in NORMALIZATIONS:
                is_read = True
            elif operation.name in LINEAR | SUMS and sum(one.is_data for one in operation.inputs) == 1:
                waiting += operation.outputs
            else:
                return False
    return is_read


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


class _Function(NamedTuple):
    """What feeds a weight, as in :class:`Use`."""

    feed: Feed
    gain: float | None = None
    names: tuple[str, ...] = ()


class _Walk:
    """Walks back from values to where their signal is made anew; what was found is remembered."""

    def __init__(self, products: set[int]) -> None:
        self._products = products
        self._origins: dict[Value, frozenset[Value]] = {}
        self._found: dict[Value, _Function] = {}

    def function_behind(self, value: Value) -> _Function:
        """What leads from the origins of a value to it."""
        if value not in self._found:
            self._found[value] = self._function_behind(value)
        return self._found[value]

    def products_behind(self, value: Value, weights: Mapping[int, frozenset[str]]) -> frozenset[str]:
        """The parameters of the products that a value's signal comes from; none where it comes from something else too.

        Args:
            value: what is fed.
            weights: parameters by the identity of their product.
        """
        origins = self._origins_of(value)
        found = [weights.get(id(origin.operation)) for origin in origins]
        return frozenset().union(*(one for one in found if one)) if origins and all(found) else frozenset()

    def _function_behind(self, value: Value) -> _Function:
        origins = self._origins_of(value)
        if not origins:
            return _Function("unknown")
        if all(origin.operation is None for origin in origins):
            return _Function("input", 1.0)
        if self._is_linear(value, origins):
            return _Function("linear", 1.0)
        return _replayed(value, origins)

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


def _replayed(value: Value, origins: frozenset[Value]) -> _Function:
    """Ask the recorded operations themselves, with random numbers at the origins."""
    order = sorted(origins, key=lambda one: one.number)
    first, second = ({one: normal_like(one, 2 * i + j + 1) for i, one in enumerate(order)} for j in range(2))
    try:
        at_first = replay(value, first, MOST_BETWEEN)
        at_double = replay(value, {one: 2 * tensor for one, tensor in first.items()}, MOST_BETWEEN)
        renewed = _renewed(value, at_first, at_double, origins)
        if renewed:
            return _replayed(value, renewed) if value not in renewed else _Function("linear", 1.0)
        at_second = replay(value, second, MOST_BETWEEN)
        at_sum = replay(value, {one: first[one] + second[one] for one in origins}, MOST_BETWEEN)
        at_zero = at_first[value] + at_second[value] - at_sum[value]
        if _is_close(at_double[value] - at_first[value], at_first[value] - at_zero):
            return _Function("linear", 1.0)
        return _Function("nonlinear", gain_between(value, origins), names_between(value, origins))
    except Exception:  # any operation may stand here, and refuse
        return _Function("unknown")


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
