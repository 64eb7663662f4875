"""The gain of what feeds each weight is found by replaying it, whatever its author called it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_init import Trace, gain_of, initialize, trace

WIDTH = 48


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], inner: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, inner), nn.Linear(WIDTH, 4)
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.second(self.function(self.first(rows)))
        return output


def found(model: nn.Module, batch: Any, name: str) -> float | None:
    seen = trace(model, batch)
    assert seen.why_not == ""
    return seen.gain_of(name)


def snake(x: Tensor) -> Tensor:
    return x + torch.sin(3 * x).square() / 3


ELEMENTWISE: dict[str, Any] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "selu": F.selu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "relu squared": lambda x: F.relu(x) ** 2,
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "leaky by hand": lambda x: torch.where(x > 0, x, 0.1 * x),
    "snake": snake,
}


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_gain_of_any_elementwise_function(name: str, rows: int) -> None:
    """The same numbers stand for N(0, 1) in every batch, so its size does not matter."""
    function = ELEMENTWISE[name]
    gain = found(Between(function), torch.randn(rows, WIDTH), "second.weight")
    assert gain == pytest.approx(gain_of(function), rel=3e-3)


def test_gain_does_not_depend_on_the_batch() -> None:
    gains = {found(Between(F.gelu), torch.randn(rows, WIDTH), "second.weight") for rows in (1, 64, 1000)}
    assert max(gains) == pytest.approx(min(gains), rel=1e-6)


@pytest.mark.parametrize(
    ("function", "gain"),
    [
        (lambda x: F.silu(x[:, :WIDTH]) * x[:, WIDTH:], 1.67653),
        (lambda x: F.gelu(x[:, :WIDTH]) * x[:, WIDTH:], 1.53353),
        (F.glu, 1.84623),
    ],
)
def test_gain_of_gates(function: Callable[[Tensor], Tensor], gain: float) -> None:
    assert found(Between(function, 2 * WIDTH), torch.randn(64, WIDTH), "second.weight") == pytest.approx(gain, rel=0.04)


def test_gain_of_what_follows_an_activation() -> None:
    """A constant counts, dropout and averages do not."""
    for function, gain in (
        (lambda x: 0.5 * F.relu(x), 2 * math.sqrt(2)),
        (lambda x: F.dropout(F.relu(x), 0.5), math.sqrt(2)),
        (lambda x: F.relu(x).view(-1, WIDTH // 2, 2).mean(-1).repeat(1, 2), math.sqrt(2)),
    ):
        assert found(Between(function), torch.randn(32, WIDTH), "second.weight") == pytest.approx(gain, rel=3e-3)


def test_gain_of_a_slope_that_is_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.PReLU(init=0.5), nn.Linear(8, 2))
    assert found(model, torch.randn(64, 8), "2.weight") == pytest.approx(math.sqrt(2 / (1 + 0.25)), rel=3e-3)


def test_gain_of_images_between_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    seen = trace(model, torch.randn(4, 3, 9, 9))
    assert seen.gain_of("0.weight") == 1.0
    assert seen.gain_of("3.weight") == pytest.approx(gain_of("silu"), rel=3e-3)
    assert seen.functions_of("3.weight") == ("silu",)


TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[float, float]]]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)),
        {"mlp.c_proj": (gain_of("gelu"), 3e-3), "mlp.c_fc": (1.0, 0), "attn.c_attn": (1.0, 0), "attn.c_proj": (1.0, 0)},
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**TINY, intermediate_size=64)),
        {"output.dense": (gain_of("gelu"), 3e-3), "intermediate.dense": (1.0, 0), "self.query": (1.0, 0)},
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=64)),
        {"mlp.down_proj": (gain_of("silu"), 0.06), "mlp.gate_proj": (1.0, 0), "q_proj": (1.0, 0), "o_proj": (1.0, 0)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gains_in_transformers(name: str) -> None:
    torch.manual_seed(0)
    build, expected = MODELS[name]
    model = build()
    seen = trace(model, {"input_ids": torch.randint(50, (2, 16))})
    for part, (gain, tolerance) in expected.items():
        names = [n for n, _ in model.named_parameters() if n.endswith(f"{part}.weight") and "attention.output" not in n]
        assert len(names) == 2, part
        for one in names:
            assert seen.gain_of(one) == pytest.approx(gain, rel=tolerance), one


def test_activation_auto_gives_each_weight_its_own_gain() -> None:
    model = nn.Sequential(
        *(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.SiLU()),
        *(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 256)),
    )
    report = initialize(model, "he_normal", activation="auto", seed=0, batch=torch.randn(32, 256))
    gains = {"0": math.sqrt(2), "2": gain_of("tanh"), "4": gain_of("silu"), "6": 1.0}
    gains["0"] = 1.0  # nothing nonlinear feeds it
    for name, gain in gains.items():
        entry = report[f"{name}.weight"]
        assert entry.gain == pytest.approx(gain, rel=3e-3)
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(gain / 16, rel=0.02)
    notes = "\n".join(report.notes)
    assert "fed by tanh" in notes
    assert "fed by silu" in notes


def test_activation_auto_without_a_batch_says_that_it_knows_nothing() -> None:
    report = initialize(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), activation="auto", seed=0)
    assert report["2.weight"].gain == pytest.approx(math.sqrt(2))
    assert any("was not found" in note for note in report.notes)


def test_trace_is_a_table_and_plain_data() -> None:
    model = Between(F.gelu)
    seen = trace(model, torch.randn(8, WIDTH))
    rows = seen.to_dict()["parameters"]
    assert list(rows) == ["first.weight", "second.weight"]
    assert rows["second.weight"]["functions"] == ["gelu"]
    assert rows["second.weight"]["is_output"]
    assert "second.weight  gelu" in str(seen)
    failed = trace(model, torch.randn(8, 3))
    assert not failed.uses
    assert str(failed).startswith("nothing traced: RuntimeError")
    assert str(Trace()) == "nothing traced"
