"""What feeds each weight and which weights give the outputs, found by one call, or in the order of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_init.introspect.module_order import trace_of_order
from lightning_init.introspect.probe import trace_call
from lightning_init.introspect.trace import Trace

WIDTH = 16
ROWS = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(16).view(2, 8)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.second(self.function(self.first(rows)))
        return output


def traced(model: nn.Module, *arguments: Any, **options: Any) -> Trace:
    trace = trace_call(model, lambda: model(*arguments, **options))
    assert trace.why_not == ""
    return trace


def rms_normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "dropout": lambda x: F.dropout(x, 0.5),
    "scale and shift": lambda x: 3 * x + 1,
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "a norm written by hand": rms_normalized,
    "a norm with dropout": lambda x: F.dropout(rms_normalized(x), 0.1),
    "mean over pairs": lambda x: x.view(-1, WIDTH // 2, 2).mean(-1).repeat(1, 2),
    "difference of neighbours": lambda x: x - x.roll(1, -1),
    "a residual sum": lambda x: x + torch.ones(WIDTH),
}
NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x.clone()),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "swish by hand": lambda x: x * torch.sigmoid(1.702 * x),
    "absolute value": torch.abs,
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "clamp": lambda x: x.clamp(min=0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "relu after a norm": lambda x: F.relu(rms_normalized(x)),
    "a gate": lambda x: x * torch.sigmoid(x.flip(-1)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_trace_finds_nothing_nonlinear(name: str) -> None:
    assert traced(Between(LINEAR[name]), ROWS).feed_of("second.weight") == "linear"


@pytest.mark.parametrize("name", NONLINEAR)
def test_trace_finds_a_nonlinearity(name: str) -> None:
    assert traced(Between(NONLINEAR[name]), ROWS).feed_of("second.weight") == "nonlinear"


def test_trace_tells_the_first_layer_and_the_head() -> None:
    trace = traced(Between(F.relu), ROWS)
    assert trace.feed_of("first.weight") == "input"
    assert trace.heads == ("second.weight",)
    assert trace.feed_of("no such parameter") == "unknown"


def test_trace_of_a_weight_that_is_used_twice() -> None:
    model = Between(F.relu)
    model.second = model.first
    assert traced(model, ROWS).feed_of("first.weight") == "nonlinear"


def test_trace_of_a_convolutional_network() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1)]
    trace = traced(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)), IMAGES)
    feeds = {name: trace.feed_of(name) for name in ("0.weight", "3.weight", "6.weight")}
    assert feeds == {"0.weight": "input", "3.weight": "nonlinear", "6.weight": "linear"}


def test_trace_of_summed_heads() -> None:
    """Forecasters add what each block says; no block's output goes on into another layer."""

    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
            self.backcasts = nn.ModuleList(nn.Linear(8, WIDTH) for _ in range(2))

        def forward(self, rows: Tensor) -> Tensor:
            forecast = torch.zeros(len(rows), 4)
            for hidden, head, backcast in zip(self.hidden, self.heads, [*self.backcasts, None], strict=True):
                inner = F.relu(hidden(rows))
                forecast = forecast + head(inner)
                rows = rows if backcast is None else rows - backcast(inner)
            return forecast

    trace = traced(Forecaster(), ROWS)
    assert trace.heads == tuple(f"heads.{i}.weight" for i in range(3))
    assert [trace.feed_of(f"hidden.{i}.weight") for i in range(3)] == ["input", "linear", "linear"]


def feeds_of_transformer(model: nn.Module, **options: Tensor) -> dict[str, str]:
    trace = traced(model, **options)
    names = [name for use in trace.uses for name in sorted(use.parameters)]
    return {name: trace.feed_of(name) for name in names}


GPT2 = {
    "vocab_size": 32,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
T5 = {
    "vocab_size": 32,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options", "behind_activation"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), {}, "mlp.c_proj"),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), {}, "mlp.down_proj"),
        (lambda: BertForMaskedLM(BertConfig(**BERT)), {}, "layer.0.output.dense"),
        (
            lambda: T5ForConditionalGeneration(T5Config(**T5)),
            {"labels": TOKENS[:, :4].contiguous()},
            "DenseReluDense.wo",
        ),
    ],
    ids=["gpt2", "llama", "bert", "t5"],
)
def test_trace_of_transformers(make: Any, options: dict[str, Tensor], behind_activation: str) -> None:
    """Only what stands behind the activation of a feed-forward block is fed by a nonlinearity."""
    feeds = feeds_of_transformer(make(), input_ids=TOKENS, **options)
    assert len(feeds) > 5
    for name, feed in feeds.items():
        assert feed == ("nonlinear" if behind_activation in name else "linear"), name


def test_trace_of_a_call_that_fails_says_why() -> None:
    trace = trace_call(model := Between(F.relu), lambda: model(torch.randn(2, 3)))
    assert trace.uses == ()
    assert "RuntimeError" in trace.why_not


def test_order_of_modules_shows_what_a_trace_shows() -> None:
    layers = [nn.Linear(WIDTH, 8), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8)]
    model = nn.Sequential(*layers, nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 3)))
    order, call = trace_of_order(model), traced(model, ROWS)
    names = [f"{path}.weight" for path in ("0", "2", "4", "6.0", "6.2")]
    assert [call.feed_of(name) for name in names] == ["input", "linear", "nonlinear", "linear", "linear"]
    assert [order.feed_of(name) for name in names] == ["unknown", "linear", "unknown", "linear", "linear"]
    assert order.heads == call.heads == ("6.2.weight",)
