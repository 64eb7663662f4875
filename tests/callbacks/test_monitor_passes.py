"""Whose forward and backward passes count, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.support.models import mlp
from tests.support.monitored_fits import batches, fit
from tests.support.oracle import (
    Batch,
    BatchModule,
    MemoryLogger,
    Watched,
    assert_tags_close,
    cross_entropy,
    expected_tags,
)
from tests.support.trainers import make_trainer


class Intruder(Callback):
    """Runs the model whenever it can."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_train_batch") or name in ("on_before_zero_grad", "on_after_backward"):
            return self.run
        return super().__getattribute__(name)

    def run(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        loss = module(torch.ones(5, 64) * 100).square().sum()
        torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("first", [True, False])
def test_passes_outside_of_the_training_step_are_not_recorded(first: bool) -> None:
    """Sanity check, validation, summary and neighbours run the same modules, before and between."""
    torch.manual_seed(0)
    module = BatchModule(mlp(), batches(2))
    twin = copy.deepcopy(module)
    alone = fit(twin, ActivationVarianceMonitor(1))

    class Validating(BatchModule):
        example_input_array = torch.ones(3, 64) * 100

        def validation_step(self, batch: Batch, batch_index: int) -> None:
            self(batch[0] * 100)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.network(x)
            return out

        val_dataloader = BatchModule.train_dataloader

    busy = Validating(module.network, batches(2))
    monitor, intruder = ActivationVarianceMonitor(1), Intruder()
    callbacks = [intruder, monitor] if not first else [monitor, intruder]
    memory = MemoryLogger()
    make_trainer(
        max_epochs=1,
        logger=memory,
        callbacks=[*callbacks, ModelSummary()],
        num_sanity_val_steps=2,
        val_check_interval=1,
    ).fit(busy)
    for step, tags in alone.items():
        assert {tag: memory.steps[step][tag] for tag in tags} == tags


def noise_for(real: Tensor) -> Tensor:
    """As many samples as ``real`` has, the same every time."""
    return torch.linspace(-1, 1, len(real) * 4, dtype=real.dtype).view(-1, 4)


class GAN(LightningModule):
    """Two optimizers, two losses, one discriminator called four times a batch."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = (
            nn.Linear(4, 64),
            nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)),
        )
        self.direct = direct

    def losses(self, real: Tensor) -> Iterator[Tensor]:
        judge = self.discriminator
        fake = self.generator(noise_for(real))
        yield judge(fake.detach()).square().mean() + (1 - judge(real)).square().mean()
        yield (1 - judge(fake)).square().mean()

    def training_step(self, batch: Batch, batch_index: int) -> None:
        for loss, optimizer in zip(self.losses(batch[0]), self.optimizers(), strict=True):
            optimizer.zero_grad()
            loss.backward() if self.direct else self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        networks = (self.discriminator, self.generator)
        return [torch.optim.SGD(network.parameters(), lr=0.0) for network in networks]

    train_dataloader = BatchModule.train_dataloader


def gan_norms(module: GAN, batch: Batch) -> dict[str, float]:
    """Each network's own optimizer's step, in float64."""
    losses = module.losses(batch[0].double())
    squares = {}
    for loss, network in zip(losses, (module.discriminator, module.generator), strict=True):
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        squares |= {p: float(g.square().sum()) for p, g in zip(network.parameters(), gradients, strict=True)}
    names = {name: m for name, m in module.named_modules() if list(m.parameters(recurse=False))}
    norms = {name: sum(squares[p] for p in m.parameters()) ** 0.5 for name, m in names.items()}
    return {f"gradient_norm/{n}": v for n, v in {**norms, "total": sum(squares.values()) ** 0.5}.items()}


def gan_gradient_variances(module: GAN, batch: Batch) -> dict[str, float]:
    """Over both losses' backward passes, the second of which goes through the discriminator too."""
    watched = Watched(module, ["generator", "discriminator.0", "discriminator.1", "discriminator.2"])
    for loss in module.losses(batch[0].double()):
        loss.backward()
    assert [len(gradients) for gradients in watched.gradients.values()] == [1, 3, 3, 3]
    return {name: torch.cat(g).var(correction=0).item() for name, g in watched.gradients.items()}


def test_manual_optimization_with_several_optimizers() -> None:
    torch.manual_seed(0)
    module = GAN()
    module.batches = batches(2)
    slow = copy.deepcopy(module).double()
    slow.batches = None
    steps = fit(module, ActivationVarianceMonitor(1))
    assert sorted(steps) == [0, 1]
    expected = gan_norms(slow, batches(2)[1])
    assert_tags_close({tag: v for tag, v in steps[1].items() if tag.startswith("gradient_norm/")}, expected)
    with torch.no_grad():
        x = batches(2)[1][0].double()
        fake = slow.generator(noise_for(x))
        judged = [slow.discriminator[0](t) for t in (fake, x, fake)]
    variance = torch.cat(judged).var(correction=0).item()
    assert steps[1]["activation_variance/discriminator.0"] == pytest.approx(variance, rel=1e-5)
    for name, variance in gan_gradient_variances(slow, batches(2)[1]).items():
        assert steps[1][f"gradient_variance/{name}"] == pytest.approx(variance, rel=1e-5), name


def test_gradients_of_other_backward_passes_are_not_recorded() -> None:
    """What ``torch.autograd.grad`` sends back through the same modules behind the last loss is no part of them."""

    class Curious(GAN):
        def training_step(self, batch: Batch, batch_index: int) -> None:
            super().training_step(batch, batch_index)
            torch.autograd.grad(100 * self.discriminator(batch[0]).sum(), list(self.discriminator.parameters()))

    torch.manual_seed(0)
    module = Curious()
    slow = copy.deepcopy(module).double()
    module.batches = batches(2)
    steps = fit(module, ActivationVarianceMonitor(1))
    for name, variance in gan_gradient_variances(slow, batches(2)[1]).items():
        assert steps[1][f"gradient_variance/{name}"] == pytest.approx(variance, rel=1e-5), name


def test_backward_unknown_to_lightning_is_warned_about() -> None:
    module = GAN(direct=True)
    module.batches = batches(2)
    with pytest.warns(UserWarning, match="sees no gradients, because loss.backward.. is called directly") as caught:
        steps = fit(module, ActivationVarianceMonitor(1))
    assert len([w for w in caught if "sees no gradients" in str(w.message)]) == 1
    assert not any(tag.startswith("gradient_variance") for tag in steps[1])
    assert "activation_variance/generator" in steps[1]


def test_lbfgs_records_the_first_evaluation_of_a_step() -> None:
    class Newton(BatchModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    torch.manual_seed(0)
    network = mlp()
    (x, y), slow = batches(1)[0], copy.deepcopy(network).double()
    steps = fit(Newton(network, batches(1)), ActivationVarianceMonitor(1))
    expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, rectifiers=["1", "3"])
    assert_tags_close(steps[0], expected)


def scaler_plugin(scale: float = 2.0**16) -> MixedPrecision:
    """float16's gradient scaler around a step in float32: what CUDA does, as far as a CPU can."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[return-value]
    return plugin


class Fused(BatchModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("kind", [BatchModule, Fused])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_scale_is_divided_out(kind: type[BatchModule], accumulation: int) -> None:
    torch.manual_seed(0)
    network = mlp()
    slow = copy.deepcopy(network).double()
    steps = fit(
        kind(network, batches(2)),
        ActivationVarianceMonitor(1),
        plugins=[scaler_plugin()],
        accumulate_grad_batches=accumulation,
    )
    first = [(x.double(), y) for x, y in batches(accumulation)]
    expected = expected_tags(slow, [first], accumulation=accumulation, rectifiers=["1", "3"])
    assert_tags_close(steps[0], expected)


@pytest.mark.parametrize("kind", [BatchModule, Fused])
def test_overflow_is_warned_about_once_and_skipped(kind: type[BatchModule]) -> None:
    plugin = scaler_plugin(2.0**120)
    module = kind(mlp(), batches(3), lambda network, batch: 1e6 * cross_entropy(network, batch))
    with pytest.warns(UserWarning, match="leaves out the gradient statistics of step 0") as caught:
        steps = fit(module, ActivationVarianceMonitor(1), plugins=[plugin])
    assert len([w for w in caught if "leaves out" in str(w.message)]) == 1
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2.0**120
    assert not any(tag.startswith("gradient_") for tag in steps[0])
    assert steps[0]["activation_variance/network.0"] > 0


@pytest.mark.filterwarnings("ignore:ActivationVarianceMonitor leaves out the gradient statistics")
@pytest.mark.filterwarnings("ignore:EarlyStopping looks at")
def test_watcher_outlives_a_loss_scale_that_overflows_all_along() -> None:
    module = BatchModule(mlp(), batches(4), lambda network, batch: 1e6 * cross_entropy(network, batch))
    watching = EarlyStopping("gradient_norm/total", patience=100, check_on_train_epoch_end=True)
    trainer = make_trainer(
        max_epochs=2,
        logger=MemoryLogger(),
        plugins=[scaler_plugin(2.0**127)],
        callbacks=[ActivationVarianceMonitor(50), watching],
    )
    trainer.fit(module)
    assert trainer.current_epoch == 2
    assert trainer.callback_metrics["gradient_norm/total"].isfinite()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_activations_are_measured_in_float64(precision: Any) -> None:
    """The oracle keeps the very outputs of the same run: only the arithmetic on them is compared."""
    torch.manual_seed(0)
    network = mlp()
    kept: dict[str, Tensor] = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda m, args, out, name=name: kept.update({name: out.detach().clone()}))
    steps = fit(BatchModule(network, batches(1)), ActivationVarianceMonitor(1), precision=precision)
    assert kept["0"].dtype == torch.bfloat16
    for name, output in kept.items():
        expected = output.double().var(correction=0).item()
        assert steps[0][f"activation_variance/network.{name}"] == pytest.approx(expected, rel=1e-12)
