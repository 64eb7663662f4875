"""Agreement in one process; on several ranks: test_verify_on_ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lightning_init.distributed.ranks import all_gather_object, is_distributed
from lightning_init.initialization.draw import Measured
from lightning_init.initialization.verify import agree


@pytest.fixture(params=["no group", "a group of one"])
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "a group of one":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_agree_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather_object", None)  # nobody is asked
    measured = [Measured(1.5, 3, 42), Measured(is_transformed=True)]
    assert not is_distributed()
    assert agree(["a", "b"], measured) == measured
    assert all_gather_object("me") == ["me"]
    assert agree([], []) == []
