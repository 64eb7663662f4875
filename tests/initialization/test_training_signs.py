"""Trained models are recognised, and fresh ones of the same kinds are not taken for trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_init import SCHEMES, Fans, InitCallback, Rule, initialize, register
from lightning_init.introspect import roles
from tests.support.kinds import KINDS, UNDECIDED, Build, with_weights, without_biases
from tests.support.models import DigitsModule, RowLSTM, conv_net, digits, mlp
from tests.support.modules import Pretrained, loaded
from tests.support.signs import signs
from tests.support.training import fresh, trained, weights_at_start
from tests.support.weights import assert_differ, assert_same, weights_of

SEEDS = 10


@pytest.mark.parametrize("kind", [*KINDS, *UNDECIDED])
def test_signs_of_fresh_models_are_none(kind: str) -> None:
    build = {**KINDS, **UNDECIDED}[kind]
    for seed in range(SEEDS):
        assert signs(fresh(build, seed)) == [], f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
def test_signs_after_one_step_of_adamw(kind: str) -> None:
    for seed in range(SEEDS):
        assert signs(trained(fresh(KINDS[kind], seed), 1)), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_signs_after_a_longer_training(kind: str) -> None:
    for steps in (20, 200):
        assert signs(trained(fresh(KINDS[kind]), steps)), f"after {steps} steps"


def test_signs_of_normal_weights_are_in_the_input_columns() -> None:
    """Any draw could look like this, but not with such columns."""
    model = redrawn(fresh(without_biases), partial(nn.init.normal_, std=0.02))
    (sign, *_) = signs(loaded(fresh(without_biases), trained(model, 1000).state_dict()))
    assert re.fullmatch(r"0\.weight: its input columns differ in size by more than chance", sign)


@pytest.mark.parametrize(("rate", "steps"), [(1e-2, 10), (1e-3, 100)])
def test_signs_of_sharp_edges_that_are_blurred(rate: float, steps: int) -> None:
    model = redrawn(fresh(without_biases), nn.init.xavier_uniform_)
    state = trained(model, steps, partial(torch.optim.AdamW, lr=rate)).state_dict()
    assert any("blurred" in sign for sign in signs(loaded(fresh(without_biases), state)))


@pytest.mark.parametrize("cut", [2.0, 2.5, 3.0, 10.0])
def test_signs_of_cut_normal_draws_are_none(cut: float) -> None:
    for seed in range(SEEDS):
        model = fresh(without_biases, seed)
        signs_found = signs(redrawn(model, partial(nn.init.trunc_normal_, std=0.1, a=-0.1 * cut, b=0.1 * cut)))
        assert signs_found == [], f"seed {seed}"


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("draw", "rate"),
    [
        (None, 1e-4),
        (None, 1e-3),
        (None, 1e-2),
        (nn.init.xavier_uniform_, 1e-4),
        (partial(nn.init.uniform_, a=-0.0777, b=0.0777), 1e-5),
    ],
)
def test_signs_in_uniform_weights_without_biases_have_no_window(
    draw: Any, optimizer: Any, rate: float, steps: int
) -> None:
    """Trained elsewhere and loaded: one step of any size leaves numbers that no uniform draw gives."""
    model = redrawn(fresh(without_biases), draw)
    assert not signs(model)
    state = trained(model, steps, partial(optimizer, lr=rate)).state_dict()
    assert signs(loaded(fresh(without_biases), state))


@pytest.mark.parametrize("draw", [nn.init.normal_, nn.init.kaiming_normal_, nn.init.orthogonal_])
def test_signs_of_training_in_this_process_have_no_window(draw: Any) -> None:
    """A backward pass without a step is no training."""
    model = redrawn(fresh(without_biases), draw)
    model(digits()[0][:8]).square().mean().backward()
    assert not signs(model)
    assert signs(trained(model, 1, partial(torch.optim.SGD, lr=1e-4)))


def test_weights_that_earlier_fits_left_as_they_were_are_no_sign_of_training() -> None:
    """A structure of the author's stays, and a learning rate of 0 writes to it without changing it."""
    model = redrawn(fresh(without_biases), nn.init.orthogonal_)
    initialize(model, "he_normal")
    for _ in range(3):
        trained(model, 1, partial(torch.optim.SGD, lr=0.0))
    assert not signs(model)
    assert signs(trained(model, 1, partial(torch.optim.SGD, lr=1e-4)))


def redrawn(model: nn.Module, draw: Any) -> nn.Module:
    for parameter in model.parameters() if draw else ():
        draw(parameter)
    return model


# Plain gradient descent moves what starts constant too, but may leave a uniform draw within its interval.
BY_SGD = [kind for kind in KINDS if kind not in ("lstm", "tied head", "decoder", "own weights, torch's biases")]


@pytest.mark.parametrize("kind", BY_SGD)
def test_signs_after_one_step_of_sgd(kind: str) -> None:
    assert signs(trained(fresh(KINDS[kind]), 1, partial(torch.optim.SGD, lr=0.1)))


def test_signs_that_need_many_steps() -> None:
    """Normal weights give nothing to hold on to but their columns; torch's biases leave their interval in time."""
    assert signs(trained(fresh(UNDECIDED["normal, no biases"]), 300))
    assert signs(trained(fresh(UNDECIDED["torch's biases, few"]), 300))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_signs_of_initialized_models_are_none(scheme: str) -> None:
    """A model that `initialize` prepared in __init__ is fresh."""
    for kind in ("mlp", "batch norm", "lstm", "nn.Transformer", "rms norm"):
        model = KINDS[kind]()
        if scheme == "delta_orthogonal" and kind == "lstm":
            continue
        initialize(model, scheme)
        assert signs(model) == [], kind


def uniform(width: float, *shape: int) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    nn.init.uniform_(layer.weight, -width, width)
    return layer


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        partial(uniform, 0.1, 300, 102),  # torch's own bound is 0.099
        partial(uniform, (6 / 40) ** 0.5, 32, 8),  # Xavier's; torch's is 9 % narrower, and 256 values can't tell
        partial(uniform, 0.05, 400, 405),
        partial(uniform, (6 / 118) ** 0.5, 98, 20),  # Xavier's is 1 % wider than torch's
        partial(with_weights, partial(nn.Linear, 8, 4, bias=False), partial(nn.init.normal_, std=0.17)),
        partial(with_weights, partial(nn.Linear, 8, 32, bias=False), partial(nn.init.normal_, std=0.13)),
        partial(with_weights, partial(nn.Linear, 16, 16, bias=False), nn.init.normal_),
    ],
)
def test_signs_of_uniform_draws_by_hand_are_none(build: Build) -> None:
    """It has an edge as sharp as any fresh draw's; training blurs it. A few values may end anywhere."""
    for seed in range(200):
        assert signs(fresh(build, seed)) == [], f"seed {seed}"


def test_signs_ignore_rounding_beyond_the_bound() -> None:
    """The bound 1/√12 = 0.288675 rounds to 0.289062 in bfloat16, also for a model that has become float32 since."""
    layer = fresh(partial(nn.Linear, 12, 4000)).to(torch.bfloat16)
    assert layer.weight.detach().float().max() > 12**-0.5
    assert signs(layer) == []
    assert signs(layer.float()) == []


@torch.no_grad()
def filled(module: nn.Module, **values: Tensor) -> nn.Module:
    for name, value in values.items():
        getattr(module, name).copy_(value)
    return module


def moved(module: nn.Module) -> nn.Module:
    """Every parameter a little beyond the bound it was drawn within."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)
    return module


def filled_alike(module: nn.Module, draw: Callable[[Tensor], object]) -> nn.Module:
    for parameter in module.parameters():
        draw(parameter)
    return module


RAMP = torch.linspace(-1.0, 1.0, 32)
NORM_LIKE = r"\(-1 … 1\) is not constant, as a fresh {}'s is"
EVIDENCE: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: filled(nn.LayerNorm(32), weight=RAMP, bias=RAMP), "weight " + NORM_LIKE.format("LayerNorm")),
    (lambda: filled(nn.RMSNorm(32), weight=RAMP), "weight " + NORM_LIKE.format("RMSNorm")),
    (lambda: filled(nn.PReLU(32), weight=RAMP), "weight " + NORM_LIKE.format("PReLU")),
    (lambda: filled(nn.MultiheadAttention(32, 2), in_proj_bias=RAMP.repeat(3)),
     "in_proj_bias " + NORM_LIKE.format("MultiheadAttention")),
    (lambda: filled(nn.Linear(4, 32), bias=RAMP),
     r"bias \(-1 … 1\) is no longer what its module drew, uniform within ±0.5"),
    (lambda: filled(nn.Linear(4, 32), bias=0.1 * RAMP), r"bias .* within ±0.5"),
    # One element is no constant.
    (lambda: filled(nn.Linear(2000, 1), weight=1.01 * nn.Linear(2000, 1).weight), r"weight .* ±0.0223607"),
    (lambda: filled(moved(nn.ConvTranspose1d(16, 32, 4)), bias=RAMP), r"bias .* within ±0.0883883"),
    (lambda: filled(moved(nn.LSTM(4, 32)), bias_ih_l0=RAMP.repeat(4)), r"bias_ih_l0 .* within ±0.176777"),
    (lambda: filled(nn.Embedding(32, 64), weight=RAMP[:, None] * torch.randn(32, 64)), r"weight: its rows differ .*"),
    (lambda: filled(nn.Embedding(33, 64, 0), weight=torch.cat([torch.zeros(1), RAMP])[:, None] * torch.randn(33, 64)),
     r"weight: its rows differ .*"),
    (lambda: filled(nn.ConvTranspose1d(32, 64, 1, bias=False), weight=RAMP[:, None, None] * torch.randn(32, 64, 1)),
     r"weight: its input columns .*"),
    (lambda: filled(prune.identity(nn.Linear(32, 64, bias=False), "weight"), weight_orig=RAMP * torch.randn(64, 32)),
     r"weight_orig: its input columns .*"),
    (lambda: filled(nn.Linear(32, 64, bias=False, dtype=torch.complex64), weight=RAMP * torch.randn(64, 32)),
     r"weight: its input columns .*"),
    (lambda: filled(nn.Linear(32, 64, bias=False), weight=RAMP * torch.randn(64, 32)), r"weight: its input columns .*"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "words"), EVIDENCE)
def test_signs_name_the_evidence(build: Build, words: str) -> None:
    (sign,) = [sign for sign in signs(fresh(build)) if re.fullmatch(words, sign)]
    assert sign


CUT_AT_ONE_STD = nn.init.trunc_normal_(torch.empty(256, 64), 0, 0.25, -0.25, 0.25)
TWO_SIZES = torch.tensor([[1.0], [1.12]])
NO_EVIDENCE: list[Callable[[], nn.Module]] = [
    # Nothing but an author's draw moves one of two parameters that a step moves both.
    lambda: filled(nn.BatchNorm2d(32), weight=RAMP),
    # A prior in a bias: training that moves it that far would have moved weights beyond their bound.
    lambda: filled(nn.ConvTranspose1d(16, 32, 4), bias=RAMP),
    lambda: filled(nn.LSTM(4, 32), bias_ih_l0=RAMP.repeat(4)),
    # All parameters drawn alike, biases included.
    lambda: filled_alike(nn.LSTM(32, 512), lambda parameter: nn.init.uniform_(parameter, -0.1, 0.1)),
    lambda: filled_alike(nn.Linear(64, 256), lambda parameter: nn.init.normal_(parameter, std=0.3)),
    lambda: filled(nn.Linear(4, 32), weight=torch.zeros(32, 4), bias=RAMP),
    lambda: filled(nn.Linear(4, 32), bias=1e-6 * RAMP),
    lambda: filled(nn.MultiheadAttention(32, 2), in_proj_bias=1e-6 * RAMP.repeat(3)),
    # As flat as a uniform draw and without its edges, but of another size than torch's.
    lambda: filled(nn.Linear(64, 256, bias=False), weight=CUT_AT_ONE_STD),
    lambda: filled(nn.LSTM(4, 32), bias_ih_l0=torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(32)),
    # Outputs may differ: gates of different sizes are packed in one matrix.
    lambda: filled(nn.Linear(32, 64, bias=False), weight=torch.cat([torch.randn(32, 32), 1e-3 * torch.randn(32, 32)])),
    # Two inputs are joined in one matrix, each with its own number of terms; or some of them are cut off.
    lambda: filled(nn.Linear(2048, 64, bias=False), weight=torch.randn(64, 2, 1024).mul(TWO_SIZES).flatten(1)),
    lambda: filled(nn.Linear(64, 64, bias=False), weight=torch.randn(64, 64).mul(torch.arange(64) < 32)),
    # Rounded values are no longer spread evenly: there may be too few between the bound and the largest.
    lambda: uniform(1.1 / 16, 1562, 256).to(torch.bfloat16),
    lambda: filled(nn.ConvTranspose1d(16, 64, 4), bias=torch.rand(64) / 4 - 1 / 8),  # by its 16·4 inputs
    lambda: nn.Linear(64, 64, dtype=torch.complex64),
    lambda: nn.Linear(64, 64, device="meta"),
    lambda: nn.Embedding(32, 64, padding_idx=0),
    lambda: nn.Linear(4, 1),
]


@pytest.mark.parametrize("build", NO_EVIDENCE)
def test_signs_of_draws_by_hand_are_none(build: Build) -> None:
    assert signs(fresh(build)) == []


def test_signs_after_a_forward_pass_are_none() -> None:
    """A lazy module has to see a batch before fit; batch norm counts it, but its weights have not moved."""
    model = fresh(conv_net)
    model(digits()[0][:8])
    assert signs(model) == []
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight += 1e-3 * torch.randn(8)
                module.bias += 1e-3 * torch.randn(8)
    assert "1.1.num_batches_tracked is 1" in signs(model)


def test_signs_of_kept_parameters_are_ignored() -> None:
    model = trained(fresh(KINDS["kaiming normal"]), 1)
    assert layers(signs(model)) == {"0", "2", "4"}
    assert layers(signs(model, Rule("0.*", "keep"))) == {"2", "4"}
    for parameter in model[4].parameters():
        parameter.requires_grad = False
    assert layers(signs(model, Rule("0.*", "keep"))) == {"2"}


def layers(found: list[str]) -> set[str]:
    return {sign.split(".")[0] for sign in found}


@pytest.mark.parametrize("build", [partial(mlp, 64), conv_net, RowLSTM])
def test_guard_refuses_loaded_weights_and_its_rule_keeps_them(build: Build, tmp_path: Path) -> None:
    torch.save(trained(fresh(build), 50).state_dict(), tmp_path / "backbone.pt")
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    model = Pretrained(lambda: loaded(fresh(build, 1), state), new_head=True)
    rules = refusal_of(model, r"network\.")
    assert rules == [Rule("network.*", "keep")]
    before, start = weights_of(model), weights_at_start(model, InitCallback(seed=3, rules=rules))
    assert_same(kept(start, "network."), kept(before, "network."))
    assert_differ(kept(start, "head."), kept(before, "head."))


def test_guard_is_off_when_trained_weights_are_to_be_overwritten(tmp_path: Path) -> None:
    torch.save(trained(fresh(mlp), 50).state_dict(), tmp_path / "backbone.pt")
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    model = Pretrained(lambda: loaded(fresh(mlp, 1), state), new_head=True)
    expected = copy.deepcopy(model)
    initialize(expected, seed=3, batch=digits()[0][:32])
    assert_same(weights_at_start(model, InitCallback("he_normal", seed=3, trained="overwrite")), weights_of(expected))


def test_guard_keeps_all_where_the_root_owns_a_trained_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(DigitsModule):
        def __init__(self) -> None:
            super().__init__(mlp)
            self.kernel = nn.Parameter(RAMP * torch.randn(64, 32))

    monkeypatch.setattr(roles, "_registry", dict(roles._registry))
    register(Bare, "kernel", Fans(32, 64))
    assert refusal_of(Bare(), "kernel: its input columns") == [Rule("*", "keep")]


def refusal_of(model: DigitsModule, evidence: str) -> list[Rule]:
    """The rules that the error prints, as Python reads them; the weights must be as they were."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=rf"signs of training(.|\n)*{evidence}(.|\n)*trained='overwrite'") as error:
        weights_at_start(model, InitCallback(seed=3))
    assert_same(weights_of(model), before)
    to_paste = re.search(r"rules=(\[.*?\])", str(error.value))
    assert to_paste
    rules: list[Rule] = eval(to_paste[1], {"Rule": Rule})
    return rules


def kept(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith(prefix)}
