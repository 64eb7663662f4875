"""A Trainer inside the ranks uses the ranks that are there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.support.models import DigitsMLP, ShardedModule, mlp
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer, make_fsdp2_trainer

pytestmark = pytest.mark.processes


def trained_weights(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "ddp":
        model, trainer = DigitsMLP(width=20, num_samples=192), make_ddp_trainer(max_epochs=1)
    else:
        model = ShardedModule(partial(mlp, 20), device=kind, num_samples=192)
        trainer = make_fsdp2_trainer(max_epochs=1)
    trainer.fit(model)
    assert trainer.world_size == dist.get_world_size()
    assert trainer.global_rank == dist.get_rank()
    assert trainer.callback_metrics["val_accuracy"] > 0
    parameters = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values()) == (kind != "ddp")
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in parameters.items()}


@pytest.mark.parametrize("kind", ["ddp", "cpu", "meta"])
def test_ranks_train_one_model(kind: str) -> None:
    on_0, on_1 = run_ranks(trained_weights, 2, kind)
    assert len(on_0) == 6
    for name, weight in on_0.items():
        assert torch.equal(weight, on_1[name]), name


def test_fsdp2_trains_what_ddp_trains() -> None:
    ddp, _ = run_ranks(trained_weights, 2, "ddp")
    fsdp2, _ = run_ranks(trained_weights, 2, "cpu")
    for name, weight in ddp.items():
        # AdamW divides by the gradient's root mean square, so a rounding difference may grow a hundredfold
        torch.testing.assert_close(weight, fsdp2[name], rtol=0, atol=1e-5, msg=name)
