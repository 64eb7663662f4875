"""Eleven models of the ``transformers`` library: no parameter unexplained, and they train from what was drawn."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_init import InitCallback, Rule, initialize
from tests.support.modules import Pretrained
from tests.support.signs import signs
from tests.support.training import weights_at_start
from tests.support.transformer_models import MODELS, WIDTH, batch_for
from tests.support.weights import assert_differ, assert_same, weights_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:only .* of the weights are of a known type:UserWarning"),  # Mixtral's experts
]

UNKNOWN = "module type unknown"
OWN_SCALE = "set by its author: a scale of its own"
LEFT_ALONE: dict[str, dict[str, str]] = {
    "bert": {},
    "gpt2": {"transformer.wte.weight": "tied to lm_head.weight"},
    "llama": {},
    "t5": {
        "shared.weight": "tied to decoder.embed_tokens.weight",
        "encoder.embed_tokens.weight": "tied to decoder.embed_tokens.weight",
        "lm_head.weight": "tied to decoder.embed_tokens.weight",
        "*Attention.q.weight": OWN_SCALE,
    },
    "vit": {"vit.embeddings.cls_token": UNKNOWN, "vit.embeddings.position_embeddings": UNKNOWN},
    "convnext": {"convnext.encoder.stages.?.layers.0.layer_scale_parameter": UNKNOWN},
    "resnet": {},
    "swin": {"swin.encoder.layers.?.blocks.?.attention.relative_position_bias.*": UNKNOWN},
    "whisper": {
        "model.encoder.embed_positions.weight": "frozen",
        "proj_out.weight": "tied to model.decoder.embed_tokens.weight",
    },
    "mamba": {
        "backbone.layers.?.mixer.A_log": UNKNOWN,
        "backbone.layers.?.mixer.D": UNKNOWN,
        "backbone.layers.?.mixer.dt_proj.bias": "kept: its values are the time steps of a state space model",
        "lm_head.weight": "tied to backbone.embeddings.weight",
    },
    "mixtral": {
        "model.layers.?.mlp.experts.gate_up_proj": UNKNOWN,
        "model.layers.?.mlp.experts.down_proj": UNKNOWN,
        "model.layers.?.mlp.gate.weight": UNKNOWN,
    },
}
"""Globs on the parameters that are not drawn, with the reason given; all others are."""

# Tables of words that are output layers too.
TIED_HEADS = {
    "gpt2": "lm_head.weight",
    "t5": "decoder.embed_tokens.weight",
    "whisper": "model.decoder.embed_tokens.weight",
    "mamba": "backbone.embeddings.weight",
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fresh(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def test_transformers_parameters_are_drawn_or_left_alone_with_a_reason(name: str) -> None:
    model = fresh(name)
    before = weights_of(model)
    report = initialize(model)
    report.check()
    every_name = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    assert [entry.name for entry in report.entries] == every_name
    expected = LEFT_ALONE[name]
    used = set()
    for entry in report.left_alone:
        pattern = next((pattern for pattern in expected if fnmatchcase(entry.name, pattern)), None)
        assert pattern, f"{entry.name} was left alone: {entry.reason}"
        assert entry.reason.startswith(expected[pattern])
        assert bool(entry.advice) == (entry.reason == UNKNOWN or expected[pattern] == OWN_SCALE)
        used.add(pattern)
    assert used == set(expected)
    kept = [entry.name for entry in report.left_alone if "tied" not in entry.reason]
    now = weights_of(model)
    assert_same({path: now[path] for path in kept}, {path: before[path] for path in kept})


def test_transformers_weights_suit_their_layers(name: str) -> None:
    """Held against the layers themselves, not against roles: He's std by the number of inputs, norms 1 and 0."""
    model = fresh(name)
    before = {path: module.weight.detach().clone() for path, module in model.named_modules() if is_table(module)}
    drawn = {entry.name: entry for entry in initialize(model).drawn}
    assert all(f"{path}.weight" in drawn or f"{path}.weight" in LEFT_ALONE[name] for path in before)
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(path, recurse=False):
            if attribute in drawn:
                scale = expected_scale(name, module, attribute, before.get(path, parameter.detach()))
                check_values(attribute, parameter.detach(), *scale)


def is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def expected_scale(name: str, module: nn.Module, path: str, before: Tensor) -> tuple[float, float]:
    """Mean and std, from the author's values of the parameter."""
    parameter = before
    if path.endswith(".bias"):
        return 0.0, 0.0
    if is_table(module) or path == TIED_HEADS.get(name):
        rows = before[before.abs().amax(1) > 0]  # without padding
        std = rows.square().mean().sqrt().item()
        is_at_torchs_own = path == TIED_HEADS.get(name) and abs(std - 1) < 5 / math.sqrt(2 * rows.numel())
        return 0.0, WIDTH**-0.5 if is_at_torchs_own else std
    if "Norm" in type(module).__name__:
        return 1.0, 0.0
    fan_in = len(parameter) if isinstance(module, Conv1D) else parameter[0].numel()
    return 0.0, math.sqrt(2 / fan_in)


def check_values(path: str, values: Tensor, mean: float, std: float) -> None:
    """The std of n normal values has a relative error of 1/√(2n), their mean one of std/√n: allow 5."""
    count = values.numel()
    assert abs(values.mean().item() - mean) <= 5 * std / math.sqrt(count), path
    assert abs(values.std(correction=0).item() - std) <= 5 * std / math.sqrt(2 * count), path


def test_transformers_norms_are_known(name: str) -> None:
    model = fresh(name)
    types = {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__}
    assert types
    assert types <= {entry.module_type for entry in initialize(model).drawn if entry.decided_by == "norm"}


def test_transformers_train_after_initialize(name: str) -> None:
    model = fresh(name)
    initialize(model)
    first = step_of(model)
    assert math.isfinite(first)
    for path, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), path
    for _ in range(4):
        last = step_of(model)
    assert last < first  # the same batch again and again


def step_of(model: nn.Module) -> float:
    """The loss before one step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)  # dropout
    optimizer.zero_grad()
    loss: Tensor = model(**batch_for(model)).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def test_transformers_signs_of_training(name: str) -> None:
    for seed in range(3):
        model = fresh(name, seed)
        assert signs(model) == []
        step_of(model)
        assert signs(model)
    initialize(model)
    model.zero_grad()
    assert not [sign for sign in signs(model) if "num_batches_tracked" not in sign]


def test_transformers_conv1d_is_a_linear_stored_the_other_way_round() -> None:
    model = fresh("gpt2")
    report = initialize(model)
    fans = report["transformer.h.0.mlp.c_fc.weight"].fans
    assert (fans.fan_in, fans.fan_out) == (WIDTH, 4 * WIDTH)


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model reads the brightness of the first pixels as words."""
    words = (pixels[:, :8] + 1).abs().mul(9).clamp(0, 59).long()
    logits: Tensor = model(input_ids=words).logits
    return logits[:, :10] if logits.ndim == 2 else logits[:, -1, :10]


@pytest.mark.parametrize(("name", "auto"), [("bert", BertForSequenceClassification), ("llama", AutoModelForCausalLM)])
def test_transformers_from_pretrained_is_refused_and_the_rule_keeps_it(
    name: str, auto: type[PreTrainedModel], tmp_path: Path
) -> None:
    trained = fresh(name)
    step_of(trained)
    trained.save_pretrained(tmp_path)
    model = Pretrained(lambda: auto.from_pretrained(tmp_path).train(), new_head=True, call=logits_of)
    before = weights_of(model)
    assert_same(
        {path.removeprefix("network."): w for path, w in before.items() if path.startswith("network.")},
        weights_of(trained),
    )
    with pytest.raises(ValueError, match=r"signs of training(.|\n)*[nN]orm(.|\n)*is not constant") as error:
        weights_at_start(model, InitCallback(seed=3))
    assert_same(weights_of(model), before)
    assert "rules=[Rule('network.*', 'keep')]" in str(error.value)
    start = weights_at_start(model, InitCallback(seed=3, rules=[Rule("network.*", "keep")]))
    loaded = {path for path in before if path.startswith("network.")}
    assert_same({path: start[path] for path in loaded}, {path: before[path] for path in loaded})
    assert_differ({"head": start["head.weight"]}, {"head": before["head.weight"]})
