"""Which modules are layers, under which names, with whose parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from lightning_init.introspect.activations import ActivationTraits
from lightning_init.introspect.layers import Parts, find_layers, select_layers
from tests.support.models import RowLSTM, RowTransformer, mlp


class Block(nn.Module):
    """Owns a parameter and has children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)
        self.act = nn.GELU()
        self.drop = nn.Dropout()
        self.module = nn.Linear(4, 4, bias=False)  # a user may call it that

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.module(self.drop(self.act(self.inner(x))))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.block = Block()


compiled = partial(torch.compile, backend="eager")


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)]


def test_layers_are_owners_and_activations_without_the_root() -> None:
    assert names(Root()) == ["block", "block.inner", "block.act", "block.module"]
    kinds = {layer.name: layer.activation for layer in find_layers(mlp(8, 1, nn.Tanh))}
    assert kinds == {"0": None, "1": ActivationTraits(False, -1.0, 1.0), "2": None}


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, nn.DataParallel, lambda m: Fabric(accelerator="cpu").setup(m)])
def test_model_that_is_one_layer_is_named_after_its_class(wrap) -> None:  # type: ignore[no-untyped-def]
    for model in (
        nn.Linear(2, 2),
        nn.LSTM(2, 2),
        nn.MultiheadAttention(2, 1),
        parametrizations.weight_norm(OneLayer()),
    ):
        (layer,) = find_layers(wrap(model))
        assert layer.name in ("Linear", "LSTM", "MultiheadAttention", "ParametrizedOneLayer")
        assert layer.module is model
        assert set(layer.parameters) == set(model.parameters())
    assert names(wrap(nn.Sequential(nn.Linear(2, 2)))) == ["0"]
    assert names(nn.ReLU()) == []


class OneLayer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


def test_parts_of_a_model_that_has_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    changes = [
        lambda: model.append(nn.ReLU()),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(2, 2))),
        lambda: parametrizations.weight_norm(model[1][0]),
        lambda: model[1].__setitem__(0, nn.Linear(2, 2)),
        lambda: setattr(model[0], "bias", None),
    ]
    for change in changes:
        parts = Parts(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2).requires_grad_(not parameter.requires_grad)
        assert parts.are_those_of(model)
        change()
        assert not parts.are_those_of(model)


def test_layers_of_attention_and_recurrent_networks_are_one() -> None:
    layers = {layer.name: layer for layer in find_layers(RowTransformer(depth=1))}
    assert "encoder.layers.0.self_attn" in layers
    assert not any("out_proj" in name for name in layers)
    attention = layers["encoder.layers.0.self_attn"]
    assert set(attention.parameters) == set(attention.module.parameters())
    assert len(attention.parameters) == 4
    assert names(RowLSTM(depth=2)) == ["lstm", "head"]


def test_layers_own_their_parametrizations() -> None:
    linear = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 4)))
    model = nn.Sequential(linear, nn.ReLU())
    assert names(model) == ["0", "1"]
    assert set(find_layers(model)[0].parameters) == set(linear.parameters())
    assert len(find_layers(model)[0].parameters) == 3  # bias, original0, original1


@pytest.mark.parametrize(
    "wrap",
    [
        *(compiled, checkpoint_wrapper, nn.DataParallel, lambda m: compiled(checkpoint_wrapper(m))),
        lambda m: Fabric(accelerator="cpu").setup_module(m),
    ],
    ids=["compile", "checkpoint", "parallel", "both", "fabric"],
)
def test_layer_names_are_the_users(wrap) -> None:  # type: ignore[no-untyped-def]
    model = Root()
    plain = names(model)
    model.block = wrap(model.block)
    assert names(model) == plain
    model.block = wrap(Block())
    root = wrap(model)
    assert names(root) == plain


def test_layers_shared_and_tied() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    assert names(model) == ["0", "1", "2"]
    model[2].weight = model[0].weight
    first, _, second = find_layers(model)
    assert first.parameters[0] is second.parameters[0]


def test_layers_include_lazy_modules() -> None:
    assert names(nn.Sequential(nn.LazyLinear(3), nn.ReLU())) == ["0", "1"]


def test_globs_select_layers() -> None:
    layers = find_layers(Root())
    assert [layer.name for layer in select_layers(layers, None)] == names(Root())
    assert [layer.name for layer in select_layers(layers, ["*.inner", "block"])] == ["block", "block.inner"]
    assert [layer.name for layer in select_layers(layers, ["block.*"])] == ["block.inner", "block.act", "block.module"]


def test_glob_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"layers: 'block\.iner' matches no layer") as error:
        select_layers(find_layers(Root()), ["block", "block.iner"])
    assert str(error.value).endswith(
        "This model's layers are: block, block.inner, block.act, block.module; did you mean 'block.inner'?"
    )
    with pytest.raises(ValueError, match="and 2 more"):
        select_layers(find_layers(mlp(4, 10)) + find_layers(nn.Sequential(nn.ReLU())), ["x"])
    with pytest.raises(ValueError, match="layers are: none"):
        select_layers([], ["x"])


def test_traced_module_has_its_names() -> None:
    with pytest.warns(DeprecationWarning, match="trace"):
        inner = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4))
    assert names(nn.Sequential(inner, nn.Linear(4, 2))) == ["0.0", "0.1", "1"]
