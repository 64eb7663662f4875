"""How many ranks there are, and the two ways in which they exchange data. Without a process group: one rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Message = TypeVar("Message")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_distributed() -> bool:
    """Whether there are other ranks: a process group of one rank is not distributed."""
    return world_size() > 1


def is_first_rank() -> bool:
    """Whether this is rank 0, which speaks for all."""
    return not is_distributed() or dist.get_rank() == 0


def all_gather_object(message: Message) -> list[Message]:
    """Every rank's message, in order of rank; ``[message]``, without a collective, where there are no others.

    Messages are pickled, which takes milliseconds: use it where a fit starts or when something new has to be agreed
    on, not at every step. As with every collective, all ranks have to call it.
    """
    if not is_distributed():
        return [message]
    messages: list[Message] = [message] * world_size()
    dist.all_gather_object(messages, message)
    return messages


def all_reduce(vector: Tensor, *, maximum: bool = False) -> None:
    """Overwrite ``vector`` with the elementwise sum (or maximum) of all ranks' vectors: one collective.

    Args:
        vector: of the same shape and dtype on every rank, on a device that the process group can send from.
        maximum: take the maximum instead of the sum.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(vector, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
