"""Every rank looks for signs of training in its own shard: gates end in the middle of one, and some hold nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor

from tests.support.kinds import lstm_with_open_forget_gates
from tests.support.models import RowLSTM, conv_net
from tests.support.sharded import as_rank
from tests.support.signs import signs
from tests.support.training import trained

pytestmark = pytest.mark.slow


def shard(model: nn.Module, mesh: DeviceMesh, placement: Placement) -> nn.Module:
    """Every parameter as FSDP2 leaves it; short dimensions leave ranks without elements."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            where = placement if parameter.ndim > 1 else Shard(0)
            held = distribute_tensor(parameter.detach(), mesh, [where], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(held))
    return model


def signs_on_ranks(build: Callable[[], nn.Module], ranks: int, placement: Placement) -> list[list[str]]:
    found = []
    for rank in range(ranks):
        with as_rank(rank, [ranks]) as mesh:
            model = shard(build(), mesh, placement)
            found.append(signs(model))
    return found


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)])
@pytest.mark.parametrize("ranks", [2, 3, 13])
@pytest.mark.parametrize("build", [lstm_with_open_forget_gates, RowLSTM, conv_net])
def test_signs_of_fresh_shards_are_none(build: Callable[[], nn.Module], ranks: int, placement: Placement) -> None:
    torch.manual_seed(0)
    model = build()

    def same() -> nn.Module:
        twin = build()
        twin.load_state_dict(model.state_dict())
        return twin

    assert signs_on_ranks(same, ranks, placement) == [[]] * ranks


def test_signs_of_trained_shards() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return trained(conv_net(), 1)

    for found in signs_on_ranks(build, 2, Shard(0)):
        assert "1.1.num_batches_tracked is 1" in found


def test_signs_of_one_gate_are_on_the_rank_that_holds_it() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        lstm = nn.LSTM(4, 32)
        with torch.no_grad():
            lstm.bias_ih_l0[32:64] = torch.linspace(-0.18, 0.18, 32)  # drawn within ±0.177
        return lstm

    first, second = signs_on_ranks(build, 2, Shard(0))
    assert [sign.split(" ")[0] for sign in first] == ["bias_ih_l0"]
    assert second == []
