"""The ranks of this run, and the two ways in which they tell each other something; one rank where there is no group."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Message = TypeVar("Message")


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return world_size() > 1


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather_object(message: Message) -> list[Message]:
    """Every rank's message, in rank order. Slow: only when ranks first meet, or have something new to say."""
    if world_size() == 1:
        return [message]
    messages: list[Message] = [message] * world_size()
    dist.all_gather_object(messages, message)
    return messages


def all_reduce(vector: Tensor, *, maximum: bool = False) -> None:
    """Overwrite ``vector`` with the sum (or the maximum) of all ranks' vectors: one collective."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(vector, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
