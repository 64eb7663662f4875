"""What becomes of the output of each product with a weight: the sums it is added into, and what constants do to it.

What is added to the rows of a lookup table has to fit their scale. What is multiplied by a constant before a nonlinear
function reads it, as in sin(30·Wx), was drawn for that; and an output that is made smaller, as T5's is, needs no small
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_init.introspect.operations import Operation, Value

ENLARGED, REDUCED = 2.0, 0.5
"""Factors from which on a signal counts as multiplied: 1.702, of approximations of GELU, does not."""


@dataclass(frozen=True)
class Destination:
    """What becomes of one product.

    Attributes:
        tables: by full name, the lookup tables whose rows it is added to, by way of whatever sums, with the constant
            that multiplies the rows before.
        summands: how many products are added up there.
        is_enlarged: it is multiplied by a constant of 2 or more before something nonlinear reads it.
        is_reduced: what it reads, or what comes out of it, is multiplied by a constant of ½ or less.
    """

    tables: Mapping[str, float] = field(default_factory=dict)
    summands: int = 1
    is_enlarged: bool = False
    is_reduced: bool = False


@dataclass(frozen=True)
class Kinds:
    """Names of operations by what they do; :mod:`~lightning_init.introspect.trace` has them."""

    linear: frozenset[str]
    linear_in_one: frozenset[str]
    sums: frozenset[str]
    lookups: frozenset[str]
    anew: frozenset[str]
    """Products, normalisations and attention: what comes out has a scale of its own."""

    def pass_on(self, name: str, signals: int) -> bool:
        """Whether an operation gives what it reads, of so many signals, but for a constant factor."""
        return name in self.linear or name in self.sums or (name in self.linear_in_one and signals == 1)


def destinations(operations: Iterable[Operation], products: Sequence[Operation], kinds: Kinds) -> list[Destination]:
    """The destination of each product, found in one pass over all operations in their order.

    Args:
        operations: of one call, as they were recorded.
        products: those among them that multiply a signal by a weight.
        kinds: what operations do.
    """
    follower = _Follower(products, kinds)
    for operation in operations:
        follower.follow(operation)
    return follower.found()


class _Follower:
    """Follows signals forward. What is added up belongs to one sum; sums that meet become one.

    Products are numbered from 0 on and lookups after them; each begins a sum.
    """

    def __init__(self, products: Sequence[Operation], kinds: Kinds) -> None:
        self._numbers = {id(product): number for number, product in enumerate(products)}
        self._kinds = kinds
        self._joined = list(range(len(products)))  # by sum: the one that it has become a part of, or itself
        self._summands = [1] * len(products)
        self._tables: list[dict[str, float]] = [{} for _ in products]
        self._names: dict[int, frozenset[str]] = {}  # of the tables that are looked up
        self._enlarged = [False] * len(products)
        self._reduced = [False] * len(products)
        self._sums: dict[Value, frozenset[int]] = {}
        self._factors: dict[Value, Mapping[int, float]] = {}  # of the products and lookups that alone make up a value
        self._scales: dict[Value, float] = {}  # by which a value was multiplied since it was made anew

    def found(self) -> list[Destination]:
        """What was found of each product."""
        roots = list(map(self._root, range(len(self._enlarged))))
        return [
            Destination(self._tables[root], self._summands[root], is_enlarged, is_reduced)
            for root, is_enlarged, is_reduced in zip(roots, self._enlarged, self._reduced, strict=True)
        ]

    def follow(self, operation: Operation) -> None:
        """Take one operation into account."""
        kinds, number = self._kinds, self._numbers.get(id(operation))
        signals = [one for one in operation.inputs if one.is_data or one in self._sums]
        if number is not None:
            self._reduced[number] = any(self._scales.get(one, 1.0) <= REDUCED for one in signals)
            self._give(operation, frozenset({number}), {number: 1.0})
        elif operation.name in kinds.lookups and any(one.parameters for one in operation.inputs):
            number = self._new_sum(frozenset().union(*(one.parameters for one in operation.inputs)))
            self._give(operation, frozenset({number}), {number: 1.0})
        elif operation.name in kinds.sums and len(signals) > 1:
            self._give(operation, self._added(signals), {})
        elif operation.name in kinds.linear | kinds.sums or (
            operation.name in kinds.linear_in_one and len(signals) == 1
        ):
            self._pass_on(operation, signals)
        elif operation.name not in kinds.anew:
            for key in self._products_in(signals):
                self._enlarged[key] |= max(one.get(key, 0.0) for one in self._factors_of(signals)) >= ENLARGED

    def _new_sum(self, tables: frozenset[str]) -> int:
        """Begin a sum with the rows of tables."""
        number = len(self._joined)
        self._joined.append(number)
        self._summands.append(0)
        self._tables.append({})
        self._names[number] = tables
        return number

    def _pass_on(self, operation: Operation, signals: Sequence[Value]) -> None:
        """What comes out is what went in, but for a constant factor."""
        factor = constant_factor(operation)
        sums = frozenset(self._root(number) for one in signals for number in self._sums.get(one, ()))
        factors = {key: old * factor for factors in self._factors_of(signals) for key, old in factors.items()}
        scale = factor * min((self._scales.get(one, 1.0) for one in signals), default=1.0)
        for key in self._products_in(signals):
            self._reduced[key] |= factors[key] <= REDUCED
        self._give(operation, sums, factors, scale)

    def _give(
        self, operation: Operation, sums: frozenset[int], factors: Mapping[int, float], scale: float = 1.0
    ) -> None:
        for output in operation.outputs:
            self._sums[output], self._factors[output], self._scales[output] = sums, factors, scale

    def _factors_of(self, signals: Iterable[Value]) -> list[Mapping[int, float]]:
        return [self._factors.get(one, {}) for one in signals]

    def _products_in(self, signals: Iterable[Value]) -> set[int]:
        """The products that alone make up one of these values."""
        return {key for factors in self._factors_of(signals) for key in factors if key < len(self._enlarged)}

    def _added(self, signals: Sequence[Value]) -> frozenset[int]:
        """The one sum that those of these values become."""
        for factors in self._factors_of(signals):
            for key, factor in factors.items():
                for name in self._names.get(key, ()):
                    tables = self._tables[self._root(key)]
                    tables[name] = max(factor, tables.get(name, 0.0))
        roots = sorted({self._root(number) for one in signals for number in self._sums.get(one, ())})
        for root in roots[1:]:
            self._joined[root] = roots[0]
            self._summands[roots[0]] += self._summands[root]
            for name, factor in self._tables[root].items():
                self._tables[roots[0]][name] = max(factor, self._tables[roots[0]].get(name, 0.0))
        return frozenset(roots[:1])

    def _root(self, number: int) -> int:
        while self._joined[number] != number:
            self._joined[number] = self._joined[self._joined[number]]
            number = self._joined[number]
        return number


def constant_factor(operation: Operation) -> float:
    """The size of the constant that an operation multiplies by; 1 where there is none, or none that can be read."""
    if operation.name.rstrip("_") not in ("mul", "div"):
        return 1.0
    others = [one for one in operation.arguments if not (isinstance(one, Value) and one.is_data)]
    number = next(map(_number, others), None)
    if number is None:
        return 1.0
    return abs(number) if operation.name.startswith("mul") else 1 / abs(number) if number else 1.0


def _number(argument: object) -> float | None:
    """A constant as a number, if it is one."""
    if isinstance(argument, Value):
        tensor = argument.tensor
        if tensor.numel() != 1 or tensor.is_meta or tensor.is_complex():
            return None
        argument = float(tensor)
    return float(argument) if isinstance(argument, (int, float)) and math.isfinite(argument) else None
