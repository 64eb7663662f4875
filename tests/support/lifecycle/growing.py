"""Models that have something new at a later fit: that is drawn, and what an earlier fit started from is kept."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.lifecycle.setting import Recording, Setting, initialized, new_callback
from tests.support.weights import Weights, assert_same, weights_of

HEAD = "network.4."


def with_new_head(model: Recording) -> Recording:
    """The last layer replaced, as for another task."""
    torch.manual_seed(5)
    head = model.network[4]
    assert isinstance(head, nn.Linear)
    model.network[4] = nn.Linear(head.in_features, head.out_features)
    return model


def assert_only_head_drawn(start: Weights, trained: Weights) -> None:
    fresh = initialized()
    assert any(name.startswith(HEAD) for name in start)
    for name, value in start.items():
        expected = fresh if name.startswith(HEAD) else trained
        assert_same({name: value}, {name: expected[name]})


def new_head_at_the_second_fit(setting: Setting) -> None:
    model, callback = setting.model(), new_callback()
    setting.trainer(callback).fit(model)
    trained = weights_of(model)
    setting.trainer(callback).fit(with_new_head(model))
    assert_only_head_drawn(model.starts[1], trained)
    assert callback.report is not None
    assert {entry.name for entry in callback.report.drawn} == {HEAD + "weight", HEAD + "bias"}
    assert callback.report["network.0.weight"].reason == "an earlier fit started from it"


def same_network_in_a_new_module(setting: Setting) -> None:
    """scvi-tools wraps one network anew at each train(), with callbacks that are made anew too."""
    first = setting.model()
    setting.trainer(new_callback()).fit(first)
    trained = weights_of(first)
    second = setting.model(lambda: first.network)
    setting.trainer(new_callback()).fit(second)
    assert_same(second.starts[0], trained)


def head_missing_in_the_checkpoint(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    checkpoint = torch.load(path, weights_only=True)
    for name in [name for name in checkpoint["state_dict"] if name.startswith(HEAD)]:
        del checkpoint["state_dict"][name]
    trainer = setting.trainer(new_callback(), max_epochs=2)
    trainer.strategy.barrier()  # all ranks have read the file
    if setting.is_first_rank:
        torch.save(checkpoint, path)
    trainer.strategy.barrier()
    model = setting.model()
    model.strict_loading = False
    trainer.fit(model, ckpt_path=path)
    assert_only_head_drawn(model.starts[0], trained)


def parametrized_at_the_second_fit(setting: Setting) -> None:
    """The weight is the same, whatever computes it now."""
    model, callback = setting.model(), new_callback()
    setting.trainer(callback).fit(model)
    trained = weights_of(model)
    nn.utils.parametrizations.weight_norm(model.network[0])
    setting.trainer(callback).fit(model)
    then = model.starts[1]["network.0.parametrizations.weight.original1"]
    assert_same({"weight": then}, {"weight": trained["network.0.weight"]})
