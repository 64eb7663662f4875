"""Eleven models of the ``transformers`` library train on two ranks: every layer is reported, with its true numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_init import ActivationVarianceMonitor
from lightning_init.introspect.layers import find_layers
from tests.support.oracle import MemoryLogger, assert_tags_close, expected_tags
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer
from tests.support.transformer_models import MODELS, batch_for

NOT_CALLED = {
    "t5": ["shared"],  # the embedding's other name
    "mamba": [f"backbone.layers.{i}.mixer.{part}" for i in range(2) for part in ("conv1d", "act", "dt_proj")],
}
"""Layers whose parameters a kernel or another module reads."""
RETURN_THEIR_CHILDS = {"mamba": [f"backbone.layers.{i}.mixer" for i in range(2)]}
CHANNELS_IN_FRONT = {
    "vit": "projection$",
    "swin": "projection$",
    "whisper": "encoder.conv",
    "resnet": "(?!classifier)",
    "convnext": r".*(patch_embeddings|embeddings\.layernorm|downsampling_layer\.\d|dwconv|stages\.\d\.layers\.0)$",
}
"""Layers whose outputs are images or (batch, channels, time)."""

WITHOUT_UNITS = {"swin": "relative_position_bias$"}
"""Layers whose outputs are tables that nothing has computed unit by unit."""


class Model(LightningModule):
    """Trains a model on its half of one batch; weights stay, so that every step is the same."""

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.rows = model, dict(rows)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.rows] * 3, batch_size=None)


def half(batch: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: rows[2 * rank : 2 * rank + 2] for name, rows in batch.items()}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def monitored(name: str) -> tuple[dict[int, dict[str, float]], list[str]]:
    torch.set_num_threads(1)
    model, memory = build(name), MemoryLogger()
    without_dropout(model)
    module = Model(model, half(batch_for(model), dist.get_rank()))
    trainer = make_ddp_trainer(
        max_epochs=1, logger=memory, callbacks=[ActivationVarianceMonitor(1)], use_distributed_sampler=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    return memory.steps, [str(w.message) for w in caught if "ActivationVarianceMonitor" in str(w.message)]


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_layers_are_all_logged(name: str) -> None:
    (steps, said), (_, others) = run_ranks(monitored, 2, name)
    assert sorted(steps) == [0, 1, 2]
    not_called, returned_child_output = NOT_CALLED.get(name, []), RETURN_THEIR_CHILDS.get(name, [])
    assert others == []
    assert [re.findall(r"'model\.(.*?)'", message) for message in said] == ([not_called] if not_called else [])

    model = build(name)
    without_dropout(model)
    layers = [layer for layer in find_layers(model) if layer.name not in not_called + returned_child_output]
    names = [layer.name for layer in layers]
    assert {tag for tag in steps[0] if tag.startswith("activation_variance")} == {
        f"activation_variance/model.{n}" for n in names
    }
    pattern = CHANNELS_IN_FRONT.get(name, "$^")
    batches: Any = [[half(batch_for(model), rank)] for rank in range(2)]
    expected = expected_tags(
        model,
        batches,
        accumulation=1,
        prefix="model.",
        loss=lambda network, batch: network(**batch).loss,  # type: ignore[call-arg]
        names=names,
        unit_dims={n: 1 for n in names if re.search(pattern, n)},
        rectifiers=[layer.name for layer in layers if layer.activation and layer.activation.rectifies],
    )
    for name_of_layer in names:
        if re.search(WITHOUT_UNITS.get(name, "$^"), name_of_layer):
            assert f"signal_variance/model.{name_of_layer}" not in steps[2]
            expected.pop(f"signal_variance/model.{name_of_layer}")
    # an owner's own norm only: the oracle's has its children's too
    owners = {layer.name for layer in layers if any(layer.module.children())}
    actual = {
        tag: value
        for tag, value in steps[2].items()
        if tag.partition("/model.")[2] not in not_called + returned_child_output
    }
    for tag in [f"gradient_norm/model.{owner}" for owner in owners]:
        assert (tag in actual) == (tag in expected)
        expected.pop(tag, None), actual.pop(tag, None)
    assert_tags_close(actual, expected, absolute=1e-18)  # rounding, where all words have the same embedding
    assert len(names) > 10
