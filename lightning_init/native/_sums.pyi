# Addresses are those of contiguous float32 memory, which has to stay alive during the call: README.md beside this file.

def by_unit(address: int, outer: int, units: int, inner: int, address_of_sums: int, /) -> float:
    """Σx² of a float32 tensor [outer, units, inner]; writes Σx of each unit to float64 memory, [units]."""

def whole(address: int, count: int, /) -> tuple[float, float]:
    """Σx and Σx² of ``count`` float32 numbers."""
