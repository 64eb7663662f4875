"""Seeded streams: every element of every parameter has one value, whoever draws it and with how many threads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_init.schemes.distributions import Distribution

BLOCK = 1 << 18
"""Elements in one block. Part of the contract: another size means other weights for the same seed."""

# Layout of the CPU generator's state: seed (8 bytes), left (4), seeded (4), next (8), 624 words of 8 bytes,
# then the cache of the normal distribution. A test holds it against NumPy's Mersenne Twister.
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 624 * 8)

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Key:
    """Names one stream of random numbers: the run's seed, the parameter, and the slice of it.

    >>> Key(0, "net.0.weight").generator(0).initial_seed() == Key(0, "net.0.weight").generator(1).initial_seed()
    True
    """

    seed: int
    name: str
    slice_name: str = ""

    def generator(self, block: int = 0) -> torch.Generator:
        """A CPU generator whose whole state (624 words) is SHAKE-256 of the key and the block number.

        ``manual_seed`` keeps only 32 bits, so that large models would hold equal blocks; 19,968 bits do not collide.
        """
        text = json.dumps([self.seed, self.name, self.slice_name, block]).encode()
        words = torch.frombuffer(bytearray(hashlib.shake_256(text).digest(624 * 4)), dtype=torch.int32)
        generator = torch.Generator()
        state = generator.get_state()
        state[_WORDS].view(torch.int64).copy_(words).bitwise_and_(0xFFFFFFFF)
        state[_LEFT].view(torch.int32).fill_(1)  # as after seeding: the next number makes new words first
        state[_NEXT].view(torch.int64).zero_()
        generator.set_state(state)
        return generator


@dataclass(frozen=True, slots=True)
class Block:
    """Elements ``start`` to ``stop`` of a flattened parameter, drawn in one go from one generator."""

    start: int
    stop: int
    number: int

    def __len__(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def draw(
        self, distribution: Distribution, key: Key, out: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The block's values on the CPU, in ``out`` where that is given, else of ``dtype``. Shape: [len(self)]."""
        values = _empty(len(self), dtype) if out is None else out
        distribution.fill_(values, key.generator(self.number))
        return values


def blocks(start: int, stop: int) -> Iterator[Block]:
    """Cut elements ``start`` to ``stop`` into blocks of fixed size; the last may be shorter."""
    for number, first in enumerate(range(start, stop, BLOCK)):
        yield Block(first, min(first + BLOCK, stop), number)


def draw_all(distribution: Distribution, key: Key, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first ``count`` values of a stream, block after block, on the CPU. Shape: [count]

    Those of float64 are others than those of float32: they have more random bits.
    """
    out = _empty(count, dtype)
    for block in blocks(0, count):
        block.draw(distribution, key, out[block.start : block.stop])
    return out


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    """Whatever the user's default dtype and device are: the same seed draws the same numbers."""
    return torch.empty(count, dtype=dtype, device="cpu")


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Make torch's operations single-threaded, yield how many threads there were, and restore them.

    The blocks are spread over the threads instead. It also makes the bits of a QR factorisation independent
    of the number of threads. New threads take over the setting of the thread that last set it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def run_on_all_cores(jobs: Iterable[Callable[[], _Result]]) -> list[_Result]:
    """Run independent jobs on as many threads as torch may use; results in the order of the jobs."""
    with one_thread_each() as threads:
        if threads == 1:
            return [job() for job in jobs]
        with ThreadPoolExecutor(threads, thread_name_prefix="lightning_init") as pool:
            return list(pool.map(lambda job: job(), jobs))
