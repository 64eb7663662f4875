"""The straight line on plain modules: new weights, the report, torch's own defaults; and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_init import Constant, Normal, Rule, SchemeName, initialize, plan
from lightning_init.distributed.ranks import is_distributed
from lightning_init.initialization.streams import Key, draw_all
from tests.support.models import AllKinds, mlp
from tests.support.weights import assert_differ, assert_same, weights_of


def test_initialize_in_one_line() -> None:
    model = AllKinds()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    report = initialize(model)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert [entry.name for entry in report.entries] == [step.name for step in plan(model)]
    report.check()


def test_seed_decides() -> None:
    one, again, other = (mlp() for _ in range(3))
    initialize(one, seed=2)
    initialize(again, seed=2)
    initialize(other, seed=2 + 2**32)
    assert_same(weights_of(again), weights_of(one))
    assert_differ(weights_of(other), weights_of(one))


def test_present_weights_do_not_matter() -> None:
    once, twice = mlp(), mlp()
    initialize(once, seed=2)
    initialize(twice, "orthogonal", seed=1)
    initialize(twice, seed=2)
    assert_same(weights_of(twice), weights_of(once))


def test_weight_is_what_its_key_draws() -> None:
    """Nothing but seed, name and slice: the same layer has the same weights in any other model."""
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.LSTM(3, 5)})
    initialize(model, Normal(0.5), seed=9)
    assert torch.equal(model["a"].weight, draw_all(Normal(0.5), Key(9, "a.weight"), 24).view(4, 6))
    forget = draw_all(Normal(0.5), Key(9, "b.weight_hh_l0", "f"), 25).view(5, 5)
    assert torch.equal(model["b"].weight_hh_l0[5:10], forget)


def test_layers_of_equal_shape_are_different() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    initialize(model)
    assert len({tuple(layer.weight.flatten().tolist()) for layer in model}) == 3


def test_global_generators_are_neither_used_nor_changed() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]

    model, before = AllKinds(), states()
    for scheme in ("he_normal", "orthogonal", "sparse", "torch_default"):
        initialize(model, scheme)
    assert states() == before


def test_gradients_modes_and_tensor_versions_after_initialize() -> None:
    model = mlp()
    model(torch.ones(2, 64)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    with torch.no_grad():
        initialize(model)
    with torch.inference_mode(False):
        initialize(model)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    loss = model(torch.ones(2, 64)).sum()
    initialize(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd was told
        loss.backward()


@pytest.mark.parametrize("seed", [1.0, "1", True])
def test_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(TypeError, match=r"^seed must be an integer, got"):
        initialize(nn.Linear(2, 2), seed=seed)


def test_seed_that_is_not_given_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """seed_everything's, else that of torch.manual_seed; the generator's state is not changed by asking."""

    def drawn(seed: int | None = None) -> tuple[int, torch.Tensor]:
        layer = nn.Linear(8, 8)
        before = torch.get_rng_state()
        report = initialize(layer, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return report.seed, layer.weight.detach()

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(5)
    first, second = drawn(), drawn()
    assert first[0] == second[0] == 5
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[1], drawn(5)[1])
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")  # as seed_everything leaves it
    assert drawn()[0] == 6
    torch.seed()
    monkeypatch.delenv("PL_GLOBAL_SEED")
    one = drawn()[0]
    torch.seed()
    assert drawn()[0] != one


def test_parameters_on_meta_are_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    before = model[0].weight.clone()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        initialize(model)
    assert str(caught.value) == (
        "2 parameters are on the meta device and hold no memory (the first: '1.weight'): "
        "call model.to_empty(device=...) first, then initialise"
    )
    assert torch.equal(model[0].weight, before)
    assert len(plan(model)) == 4  # planning needs no memory


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: initialize(model, "he_norml"),
        lambda model: initialize(model, rules=[Rule("nothing.*", "zeros")]),
        lambda model: initialize(model, rules=[Rule("0.bias", "orthogonal")]),
        lambda model: initialize(model, activation="rellu"),
        lambda model: initialize(model, bias=math.nan),
    ],
)
def test_request_that_cannot_be_met_writes_nothing(ask: Callable[[nn.Module], object]) -> None:
    model = mlp()
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"he_normal|matches none|only weights have fans|relu|finite"):
        ask(model)
    assert_same(weights_of(model), before)


def test_plan_and_initialize_agree() -> None:
    model = AllKinds()
    rules = [Rule("lstm.*", "keep"), Rule("wide.0.weight", Constant(0.25)), Rule("transformer.*", "xavier_uniform")]
    for step, entry in zip(plan(model, rules=rules), initialize(model, rules=rules).entries, strict=True):
        assert (entry.name, entry.decided_by, entry.scheme, entry.reason) == (
            step.name,
            step.decided_by,
            step.scheme,
            step.reason,
        )


TORCH: Mapping[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(50, 80),
    "Conv1d": lambda: nn.Conv1d(6, 30, 5),
    "Conv2d grouped": lambda: nn.Conv2d(8, 60, 3, groups=4),
    "Conv3d": lambda: nn.Conv3d(4, 20, 2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(20, 30, 3),
    "ConvTranspose2d grouped": lambda: nn.ConvTranspose2d(24, 40, 3, stride=2, groups=4),
    "Bilinear": lambda: nn.Bilinear(7, 9, 30),
    "Embedding": lambda: nn.Embedding(60, 20, padding_idx=3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(60, 20, padding_idx=3),
    "RNN": lambda: nn.RNN(7, 20, num_layers=2),
    "LSTM": lambda: nn.LSTM(7, 12, num_layers=2, bidirectional=True, proj_size=5),
    "GRU": lambda: nn.GRU(7, 12, bidirectional=True),
    "LSTMCell": lambda: nn.LSTMCell(7, 12),
    "MultiheadAttention": lambda: nn.MultiheadAttention(24, 4, add_bias_kv=True),
    "MultiheadAttention apart": lambda: nn.MultiheadAttention(24, 4, kdim=10, vdim=14),
    "BatchNorm2d": lambda: nn.BatchNorm2d(5),
    "LayerNorm": lambda: nn.LayerNorm(5),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "RMSNorm": lambda: nn.RMSNorm(5),
    "PReLU": lambda: nn.PReLU(3, init=0.1),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(12, 3, 20),
}


def torchs(make: Callable[[], nn.Module], repeats: int) -> dict[str, Tensor]:
    return pooled([make() for _ in range(repeats)])


def ours(make: Callable[[], nn.Module], repeats: int) -> dict[str, Tensor]:
    models = [make() for _ in range(repeats)]
    for seed, model in enumerate(models):
        initialize(model, "torch_default", seed=seed).check()
    return pooled(models)


def pooled(models: list[nn.Module]) -> dict[str, Tensor]:
    """All values of each parameter, over all models, in one row."""
    columns = [dict(model.named_parameters()) for model in models]
    return {name: torch.cat([column[name].detach().flatten() for column in columns]).double() for name in columns[0]}


@pytest.mark.parametrize("module", TORCH)
def test_torch_default_is_what_torch_draws(module: str) -> None:
    """Every parameter, biases included, by a Kolmogorov–Smirnov test of two samples; constants to the bit."""
    torch.manual_seed(0)
    mine, theirs = ours(TORCH[module], 12), torchs(TORCH[module], 12)
    assert set(mine) == set(theirs)
    for name, expected in theirs.items():
        if expected.unique().numel() == 1:
            assert torch.equal(mine[name], expected), name
        else:
            assert stats.ks_2samp(mine[name].numpy(), expected.numpy()).pvalue > 1e-6, name
            assert mine[name].abs().max() < 1.2 * expected.abs().max(), name
            assert (mine[name] == 0).sum() == (expected == 0).sum(), name  # padding rows


def test_torch_default_scaled_by_a_tenth_fails_the_comparison() -> None:
    torch.manual_seed(0)
    for module in ("Linear", "Conv2d grouped", "ConvTranspose2d grouped"):
        weights = {name: values for name, values in torchs(TORCH[module], 12).items() if values.numel() > 10_000}
        assert weights, module
        again = torchs(TORCH[module], 12)
        for name, values in weights.items():
            assert stats.ks_2samp(1.1 * values.numpy(), again[name].numpy()).pvalue < 1e-6, (module, name)


def test_he_normal_keeps_the_variance_through_twenty_relu_layers() -> None:
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    ends = {}
    for scheme in ("he_normal", "torch_default", "standard_normal", "xavier_normal", "zeros"):
        net = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(256, 256, bias=False), nn.ReLU())))
        initialize(net, scheme, seed=3)
        with torch.no_grad():
            ends[scheme] = net(x).double().square().mean().item()
    assert 0.2 < ends["he_normal"] < 4  # 1 on average; the chance of 20 finite layers lets it wander
    assert math.log2(ends["xavier_normal"]) == pytest.approx(-20, abs=2)  # half per layer
    assert math.log(ends["torch_default"], 6) == pytest.approx(-20, abs=2)  # a sixth per layer
    assert math.log(ends["standard_normal"], 128) == pytest.approx(20, abs=1)  # d/2 per layer
    assert ends["zeros"] == 0


def test_process_without_a_group_is_not_distributed() -> None:
    assert not is_distributed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["orthogonal", "sparse", "zero_init", "he_normal_truncated", "he_uniform"])
def test_default_dtype_and_device_change_no_weight(dtype: torch.dtype, scheme: SchemeName) -> None:
    plain, other = (nn.Linear(24, 40, device="cpu", dtype=torch.float32) for _ in range(2))
    plain_half, other_half = (nn.Linear(24, 40, dtype=torch.bfloat16) for _ in range(2))
    initialize(plain, scheme)
    initialize(plain_half, scheme)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            initialize(other, scheme)
            initialize(other_half, scheme)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain.weight, other.weight)
    assert torch.equal(plain_half.weight, other_half.weight)


def test_orthogonal_keeps_the_variance_through_a_strided_transposed_convolution() -> None:
    """Only 1/∏s of the kernel's taps meet in one output, so the matrix alone would lose a factor of 4 here."""
    layer = nn.ConvTranspose2d(32, 16, 4, stride=2, bias=False)
    report = initialize(layer, "orthogonal", seed=1)
    report.check()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        output = layer(torch.randn(64, 32, 8, 8))[:, :, 3:-3, 3:-3]  # [batch, channels, interior]
    assert abs(output.var().item() - 1) < 0.05  # 64 independent images: a relative standard error below 1 %
