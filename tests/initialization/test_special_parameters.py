"""One fit of a model in which hardly a weight is a plain one: nothing is lost, and every part is in the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_init import InitCallback, InitReport, Normal, Rule, initialize
from tests.support.models import CLASSES, DigitsModule, digits
from tests.support.trainers import make_trainer

WIDTH, ROWS = 32, 8


class Doubled(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Squared(nn.Module):
    """Cannot be undone."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.square()


def parametrized(assignment: nn.Module) -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", assignment)
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.*", FutureWarning)
        norm: nn.Module = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
        return norm


def pruned() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    prune.random_unstructured(layer, "weight", 0.25)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(WIDTH, WIDTH),
    "doubled": lambda: parametrized(Doubled()),
    "squared": lambda: parametrized(Squared()),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "old_weight_norm": old_weight_norm,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "pruned": pruned,
}


class Special(nn.Module):
    """Reads the rows of an image as words with a padding row; the head's weight is the table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH, padding_idx=0)
        self.layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, pixels: Tensor) -> Tensor:
        words = self.words(((pixels[:, ::ROWS] + 1) * 6).clamp(0, 19).long())
        for layer in self.layers.values():
            words = words + torch.tanh(layer(words))
        logits: Tensor = self.head(self.encoder(words).mean(1))[:, -CLASSES:]
        return logits


class LooksAtStart(Callback):
    """Keeps the weights as forward passes use them when training starts."""

    used: dict[str, Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.network
        assert isinstance(network, Special)
        network.eval()
        network(digits()[0][:4])  # hooks compute by now what they compute
        self.used = {name: layer.weight.detach().clone() for name, layer in network.layers.items()}
        self.used["words"] = network.words.weight.detach().clone()
        self.used["head"] = network.head.weight.detach().clone()
        for i, layer in enumerate(network.encoder.layers):
            self.used[f"encoder {i}"] = layer.linear1.weight.detach().clone()
        network.train()


class Fitted:
    """The model before and after one epoch with the callback, the report, and the weights at the start."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = DigitsModule(Special, num_samples=64)
        self.names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        network: Any = self.model.network
        self.fresh = {name: layer.weight.detach().clone() for name, layer in network.layers.items()}
        self.mask = network.layers.pruned.weight_mask.clone()
        callback, look = InitCallback("lecun_normal", seed=5), LooksAtStart()
        make_trainer(callbacks=[callback, look], max_epochs=1, limit_val_batches=0).fit(self.model)
        assert callback.report is not None
        self.report: InitReport = callback.report
        self.used = look.used

    def asked(self, name: str) -> Tensor:
        """What the scheme draws for a layer of this name and shape without anything special."""
        plain = nn.ModuleDict({"layers": nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH)})})
        initialize(nn.ModuleDict({"network": plain}), "lecun_normal", seed=5)
        return plain["layers"][name].weight.detach()


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        return Fitted()


def test_report_has_every_original_of_every_weight_once(fitted: Fitted) -> None:
    assert [entry.name for entry in fitted.report.entries] == fitted.names
    fitted.report.check()


def test_reason_of_special_parameters_left_alone(fitted: Fitted) -> None:
    reasons = {entry.name.removeprefix("network."): entry.reason for entry in fitted.report.left_alone}
    assert reasons == {
        "layers.squared.parametrizations.weight.original": "parametrized: Squared has no right_inverse",
        "layers.weight_norm.parametrizations.weight.original1": (
            "written together with network.layers.weight_norm.parametrizations.weight.original0"
        ),
        "layers.old_weight_norm.weight_v": "written together with network.layers.old_weight_norm.weight_g",
        "words.weight": "tied to network.head.weight",
    }


@pytest.mark.parametrize("name", ["plain", "doubled", "weight_norm", "old_weight_norm"])
def test_forward_passes_use_exactly_what_was_drawn(fitted: Fitted, name: str) -> None:
    torch.testing.assert_close(fitted.used[name], fitted.asked(name))


def test_pruned_elements_stay_pruned(fitted: Fitted) -> None:
    assert torch.equal(fitted.used["pruned"], fitted.asked("pruned") * fitted.mask)
    assert (fitted.mask == 0).sum() == WIDTH * WIDTH // 4


@pytest.mark.parametrize("name", ["spectral_norm", "old_spectral_norm"])
def test_spectral_norms_know_the_new_weights_before_the_first_step(fitted: Fitted, name: str) -> None:
    """In eval mode: fifteen iterations know the largest singular value to a few percent, stale vectors not at all."""
    asked = fitted.asked(name)
    used = fitted.used[name]
    scale = (used * asked).sum() / asked.square().sum()
    torch.testing.assert_close(used, scale * asked)
    assert torch.linalg.matrix_norm(used, 2) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["pruned", "old_spectral_norm", "old_weight_norm"])
def test_hook_computed_attributes_are_updated_at_once(name: str) -> None:
    layer: Any = LAYERS[name]()
    initialize(layer)
    now = layer.weight.detach().clone()
    layer.eval()
    layer(torch.ones(1, WIDTH))
    torch.testing.assert_close(now, layer.weight.detach())


def test_training_modes_are_kept() -> None:
    layer: Any = LAYERS["spectral_norm"]().eval()
    initialize(layer)
    assert not any(module.training for module in layer.modules())


def test_orthogonal_parametrization_gets_another_orthogonal_weight(fitted: Fitted) -> None:
    used = fitted.used["orthogonal"]
    torch.testing.assert_close(used @ used.T, torch.eye(WIDTH), rtol=0, atol=1e-5)
    assert (used - fitted.fresh["orthogonal"]).abs().max() > 0.1


def test_unwritable_parameters_keep_their_values(fitted: Fitted) -> None:
    assert torch.equal(fitted.used["squared"], fitted.fresh["squared"])


def test_tied_table_is_drawn_once_for_the_head_with_its_padding_row_zero(fitted: Fitted) -> None:
    words = fitted.used["words"]
    assert torch.equal(words, fitted.used["head"])
    assert (words[0] == 0).all()
    std = words[1:].std().item()
    assert std == pytest.approx(WIDTH**-0.5, rel=5 / (2 * 19 * WIDTH) ** 0.5)
    assert fitted.report["network.head.weight"].decided_by == "tied head"


def test_copied_layers_get_different_weights(fitted: Fitted) -> None:
    first, second, third = (fitted.used[f"encoder {i}"] for i in range(3))
    for one, other in ((first, second), (second, third), (first, third)):
        assert (one != other).all()


def test_special_parameters_are_trained_by_the_optimizer(fitted: Fitted) -> None:
    """All of them have moved since the start, so the optimizer held the very tensors that were written."""
    network: Any = fitted.model.network
    for name, layer in network.layers.items():
        assert not torch.equal(layer.weight.detach(), fitted.used[name]), name


class LazyNet(nn.Module):
    """Its first layer has no shape before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(16)
        self.norm = nn.LazyBatchNorm1d()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.first(pixels))))
        return logits


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameters_are_named_until_a_batch_gave_them_a_shape() -> None:
    model = LazyNet()
    report = initialize(model)
    waiting = {entry.name for entry in report.left_alone}
    assert waiting == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
    for entry in report.left_alone:
        assert entry.reason == "uninitialised: a lazy module gets its shape from its first batch; run one before fit"
    assert "uninitialised" in str(report).replace("\n", " ")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_model_that_has_seen_a_batch_is_fresh() -> None:
    """Batch norm has counted the batch; that is no training."""
    model = DigitsModule(LazyNet, num_samples=64)
    model(digits()[0][:8])
    callback = InitCallback(seed=5)
    make_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(model)
    assert callback.report is not None
    assert not callback.report.left_alone
    assert callback.report["network.first.weight"].fans == (64, 16)


def test_parameter_of_inference_mode_is_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"^'0\.weight' was made in inference mode, so nothing can train it"):
        initialize(model)


def test_sparse_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse())
    report = initialize(model)
    assert report["0.weight"].reason == "sparse (torch.sparse_coo)"
    assert report["1.weight"].left is None


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))


def test_strict_refuses_what_is_unknown() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Unknown())
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"^strict: 1 parameters are of module types that are not known: 1\.matrix"):
        initialize(model, strict=True)
    assert torch.equal(model[0].weight, before)
    initialize(model, strict=True, rules=[Rule("1.matrix", "keep")])
    initialize(model, strict=True, rules=[Rule("1.matrix", Normal(0.1))])
    initialize(model[:1], strict=True)


def test_plain_trainer_of_a_model_on_meta_says_what_to_do() -> None:
    with torch.device("meta"):
        module = DigitsModule(lambda: nn.Linear(64, CLASSES))
    with pytest.raises(ValueError, match=r"^the model is on the meta device, and the Trainer gives it no memory"):
        make_trainer(callbacks=[InitCallback()], max_steps=1).fit(module)
