"""The watch for parameters that get their memory late; tests of the callbacks cover the rest of ``_lightning.py``."""

from __future__ import annotations

import copy
import pickle

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_init.callbacks._lightning import end_watches, start_meta_watch


class OneLayer(LightningModule):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, device=device)


def test_meta_watch_tells_whether_parameters_got_memory() -> None:
    for device in ("meta", "cpu"):
        module = OneLayer(device)
        start_meta_watch(module)
        assert module.to_empty(device="cpu") is module
        assert module.layer.weight.device == torch.device("cpu")
        assert end_watches(module) == (device == "meta")


def test_meta_watch_leaves_nothing_on_the_module() -> None:
    module = OneLayer("meta")
    before = set(module.__dict__)
    start_meta_watch(module)
    assert not end_watches(module)
    assert set(module.__dict__) == before
    assert not end_watches(module)  # the second of teardown and on_exception


def test_meta_watch_is_copied_with_the_module() -> None:
    """WeightAveraging copies the module while the watch is on; processes may be started then."""
    module = OneLayer("meta")
    start_meta_watch(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.to_empty(device="cpu")
        assert end_watches(other)
    assert module.layer.weight.is_meta
    assert not end_watches(module)
