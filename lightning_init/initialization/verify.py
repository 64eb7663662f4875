"""Whether all ranks hold the same weights, and whether all of them got that far."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TypeVar

from lightning_init.distributed.ranks import all_gather_object, is_distributed
from lightning_init.initialization.draw import Measured

_Answer = TypeVar("_Answer")


def gather_or_raise(mine: _Answer, failure: Exception | None) -> list[_Answer]:
    """What every rank gives, in order of rank; or an exception on all ranks if one of them has failed.

    Args:
        mine: what this rank gives.
        failure: what went wrong on this rank, if anything did.

    Raises:
        Exception: ``failure`` itself, on the rank that has one.
        RuntimeError: on every other rank, naming the first that has failed.
    """
    if not is_distributed():  # a traceback that ends where the failure was, and no text made of it
        if failure is not None:
            raise failure
        return [mine]
    fault = "" if failure is None else f"{type(failure).__name__}: {failure}"
    answers = all_gather_object((fault, mine))
    if failure is not None:
        raise failure
    for rank, (their_fault, _) in enumerate(answers):
        if their_fault:
            raise RuntimeError(f"rank {rank} could not initialise the model: {their_fault}")
    return [answer for _, answer in answers]


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
    names_hash = hashlib.sha256("\n".join(names).encode()).hexdigest()
    sums = array(
        "d",
        [number for one in measured for number in (one.squares, one.count, one.is_transformed, one.is_refused)],
    )
    checksums = array("q", [one.checksum for one in measured])
    every = gather_or_raise((names_hash, checksums.tobytes(), sums.tobytes()), failure)
    if len(every) == 1:
        return list(measured)
    _same_names(names, [rank[0] for rank in every])
    _same_bits(names, [array("q", rank[1]) for rank in every])
    totals = [sum(column) for column in zip(*(array("d", rank[2]) for rank in every), strict=True)]
    of_parameters = zip(*[iter(totals)] * 4, strict=True)
    return [
        Measured(squares, round(count), one.checksum, bool(is_transformed), bool(is_refused))
        for one, (squares, count, is_transformed, is_refused) in zip(measured, of_parameters, strict=True)
    ]


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
