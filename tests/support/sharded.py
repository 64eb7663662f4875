"""One process that believes it is a certain rank of many: for code that asks no other rank anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, mesh_shape: Sequence[int]) -> Iterator[DeviceMesh]:
    """The mesh as this rank sees it. Collectives return at once and exchange nothing."""
    world_size = 1
    for size in mesh_shape:
        world_size *= size
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", tuple(mesh_shape))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor takes meshes out of it that are equal but another rank's
