"""The names users wrote, under every wrapper that adds steps to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_init.introspect.names import clean_name


def net() -> nn.Module:
    """Names on purpose those of wrappers' steps: ``module`` is a user's own attribute here."""
    inner = nn.ModuleDict({"module": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
    outer = nn.Module()
    outer.module = inner
    return outer


GENERIC_ROLE = [name for name, _ in net().named_parameters()]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def inner_compiled(model: nn.Module) -> nn.Module:
    model.module["body"] = torch.compile(model.module["body"], backend="eager")
    return model


def inner_checkpointed(model: nn.Module) -> nn.Module:
    model.module["module"] = checkpoint_wrapper(model.module["module"])
    return model


def inner_data_parallel(model: nn.Module) -> nn.Module:
    model.module["body"] = DataParallel(model.module["body"])
    return model


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    lambda model: model,
    compiled,
    inner_compiled,
    inner_checkpointed,
    inner_data_parallel,
    DataParallel,
    lambda model: compiled(inner_checkpointed(inner_compiled(model))),
    lambda model: DataParallel(compiled(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=range(len(WRAPPERS)))
def test_clean_name_drops_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(net())
    assert [clean_name(model, path) for path, _ in model.named_parameters()] == GENERIC_ROLE


@pytest.fixture
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        lambda model: compiled(DistributedDataParallel(model)),
        lambda model: DistributedDataParallel(compiled(inner_compiled(model))),
    ],
    ids=["plain", "compiled", "around compiled"],
)
def test_clean_name_under_ddp(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(net())
    assert [clean_name(model, path) for path, _ in model.named_parameters()] == GENERIC_ROLE


@pytest.mark.usefixtures("_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # one process
def test_clean_name_under_fsdp1() -> None:
    wrap = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    model = net()
    model.module["body"] = wrap(model.module["body"])
    paths = [path for path, _ in model.named_parameters()]
    assert sum("_fsdp_wrapped_module" in path for path in paths) == 4
    assert [clean_name(model, path) for path in paths] == GENERIC_ROLE
    root = wrap(model)
    with FullyShardedDataParallel.summon_full_params(root):
        assert [clean_name(root, path) for path, _ in root.named_parameters()] == GENERIC_ROLE


def test_clean_name_keeps_a_path_without_module() -> None:
    assert clean_name(nn.Sequential(), "0.parametrizations.weight.original0") == "0.parametrizations.weight.original0"
    assert clean_name(nn.Sequential(), "") == ""
