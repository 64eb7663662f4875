"""Roles and fans of sharded modules are those of the whole ones: nothing is read from a shard's shape."""

from __future__ import annotations

import copy

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_init import Role
from lightning_init.introspect.roles import role_of
from tests.support.modules import GemmaRMSNorm, LlamaRMSNorm, TransformersConv1D
from tests.support.ranks import run_ranks


def modules() -> list[nn.Module]:
    return [
        nn.Linear(3, 5),
        TransformersConv1D(5, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 6, 3, stride=2),
        nn.LSTM(3, 5, num_layers=2),
        nn.MultiheadAttention(6, 2, kdim=3),
        nn.Embedding(5, 3, padding_idx=4),
        nn.LayerNorm(5),
        LlamaRMSNorm(5, start=0.0),  # as ``to_empty`` may leave it
        GemmaRMSNorm(1),  # one of the two shards is empty
    ]


def roles_in(module: nn.Module) -> dict[str, Role | None]:
    return {
        f"{path}.{name}": role_of(inner, name)
        for path, inner in module.named_modules()
        for name, _ in inner.named_parameters(recurse=False)
    }


def roles_whole_and_sharded() -> list[tuple[dict[str, Role | None], dict[str, Role | None]]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pairs = []
    for module in modules():
        sharded = fully_shard(copy.deepcopy(module), mesh=mesh)
        pairs.append((roles_in(module), roles_in(sharded)))
    columns = parallelize_module(nn.Linear(3, 6), mesh, ColwiseParallel())
    pairs.append((roles_in(nn.Linear(3, 6)), roles_in(columns)))
    return pairs


def test_roles_of_sharded_modules() -> None:
    for rank in run_ranks(roles_whole_and_sharded, 2):
        assert len(rank) == len(modules()) + 1
        for whole, sharded in rank:
            assert None not in whole.values()
            # repr, because an embedding's fan_out is NaN, which equals nothing
            assert repr(sharded) == repr(whole)
