def by_unit(address: int, outer: int, units: int, inner: int, address_of_sums: int, /) -> float:
    """Σx² of float32 [outer, units, inner] in memory; writes Σx of each unit, float64 [units]."""

def whole(address: int, count: int, /) -> tuple[float, float]:
    """Σx and Σx² of float32 [count] in memory."""
