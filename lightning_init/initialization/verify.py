"""Whether all ranks hold the same: one collective after drawing, and one question before it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from lightning_init.distributed.ranks import all_gather_object, is_distributed
from lightning_init.initialization.draw import Measured


def agree(names: Sequence[str], measured: Sequence[Measured], failure: Exception | None = None) -> list[Measured]:
    """Compare what every rank wrote, and add up what each holds of the sharded parameters.

    Args:
        names: full name of each parameter. [parameters]
        measured: what this rank wrote of each. [parameters]
        failure: what went wrong on this rank instead, if anything did; it is raised here.

    Returns:
        The sums over all ranks; ``measured`` itself where there is only one.

    Raises:
        RuntimeError: on every rank, naming the first parameter that differs and the ranks that differ, or the rank
            that has failed.
    """
    if not is_distributed():
        if failure is not None:
            raise failure
        return list(measured)
    names_hash = hashlib.sha256("\n".join(names).encode()).hexdigest()
    sums = array("d", [number for part in measured for number in (part.squares, part.count, part.is_transformed)])
    fault = "" if failure is None else f"{type(failure).__name__}: {failure}"
    mine = (names_hash, array("q", [part.checksum for part in measured]).tobytes(), sums.tobytes(), fault)
    every = all_gather_object(mine)
    if failure is not None:
        raise failure
    _no_faults([rank[3] for rank in every])
    _same_names(names, [rank[0] for rank in every])
    _same_bits(names, [array("q", rank[1]) for rank in every])
    totals = [sum(column) for column in zip(*(array("d", rank[2]) for rank in every), strict=True)]
    return [
        Measured(totals[3 * i], round(totals[3 * i + 1]), part.checksum, bool(totals[3 * i + 2]))
        for i, part in enumerate(measured)
    ]


def _no_faults(faults: Sequence[str]) -> None:
    for rank, fault in enumerate(faults):
        if fault:
            raise RuntimeError(f"rank {rank} could not initialise the model: {fault}")


def _same_names(names: Sequence[str], hashes: Sequence[str]) -> None:
    if len(set(hashes)) == 1:
        return
    theirs = all_gather_object(list(names))
    for rank, other in enumerate(theirs):
        if other != theirs[0]:
            only = sorted(set(other) ^ set(theirs[0])) or [a for a, b in zip(other, theirs[0], strict=True) if a != b]
            raise RuntimeError(f"rank {rank} has other parameters than rank 0; the first that differs: {only[0]!r}")


def _same_bits(names: Sequence[str], checksums: Sequence[Sequence[int]]) -> None:
    for i, name in enumerate(names):
        others = [rank for rank, sums in enumerate(checksums) if sums[i] != checksums[0][i]]
        if others:
            raise RuntimeError(
                f"parameter {name!r} was drawn differently on rank {', '.join(map(str, others))} than on rank 0: "
                "all ranks need the same seed, scheme, rules and model"
            )
