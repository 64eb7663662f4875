"""Sums of squares of many tensors, large and small, whole and spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_init.moments import Number, has_fast_path, moments_of, needs_device_sync

_SMALL = 1 << 13
"""Elements up to which tensors are squared together, where the calls cost more than the numbers."""
_TOGETHER = 1 << 17
"""Elements that are enough for one go: their float64 copy stays in the cache."""


def sums_of_squares(tensors: Sequence[Tensor], world_size: int = 1) -> list[Number]:
    """This rank's share of Σx² of each tensor: summed over all ranks it is the squared norm."""
    sums: dict[int, Number] = {}
    small: list[tuple[int, Tensor]] = []
    copies = [world_size] * len(tensors)
    for i, tensor in enumerate(tensors):
        quick = has_fast_path(tensor)
        if not quick:
            tensor, copies[i] = _held(tensor, world_size)
            quick = has_fast_path(tensor)
        if quick or tensor.numel() > _SMALL or tensor.is_mps:  # which has no float64
            sums[i] = moments_of(tensor).squares
        else:
            small.append((i, tensor))
    for group in _groups(small):
        flat = torch.cat([tensor.reshape(-1) for _, tensor in group]).double()
        sizes = torch.tensor([tensor.numel() for _, tensor in group], device="cpu")
        lengths = sizes.to(flat.device, non_blocking=True)  # or it would wait for the backward pass
        together = torch.segment_reduce(flat * flat, "sum", lengths=lengths, unsafe=True)  # unsafe: lengths unread
        sums.update(
            zip((i for i, _ in group), together.unbind() if needs_device_sync(flat) else together.tolist(), strict=True)
        )
    return [sums[i] / copies[i] for i in range(len(tensors))]


def _held(tensor: Tensor, world_size: int) -> tuple[Tensor, int]:
    """This rank's real numbers of ``tensor``, and the number of ranks that hold the same."""
    copies = world_size
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                copies //= tensor.device_mesh.size(dim)
        tensor = tensor.to_local()
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor, copies


def _groups(tensors: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Tensors of one type and device together, in groups that are large enough."""
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for i, tensor in tensors:
        key = tensor.dtype, tensor.device
        groups.setdefault(key, []).append((i, tensor))
        sizes[key] = sizes.get(key, 0) + tensor.numel()
        if sizes[key] >= _TOGETHER:
            sizes[key] = 0
            yield groups.pop(key)
    yield from groups.values()
