"""Statistics that need the optimizer's step, or that are no scalar, in real fits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from lightning_init.monitor.histograms import EDGES
from tests.support.faults import AFTER_STEP, broken
from tests.support.models import DigitsMLP, digits, mlp
from tests.support.oracle import BatchModule, MemoryLogger, cross_entropy, share_left_by_clipping
from tests.support.trainers import make_trainer

PIXELS, CLASSES = (tensor[:64] for tensor in digits())
STEP_STATS: Any = ["gradient_norm", "gradient_norm_clipped", "weight_norm", "update_ratio"]
OF_PARAMETERS: Any = ["gradient_histogram", "weight_histogram", "parameter_gradient_norm", "parameter_norm"]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm())


def expected_step(network: nn.Module, clip: float, rate: float) -> dict[str, float]:
    """One step of SGD with its gradients clipped by norm, in float64."""
    cross_entropy(network, (PIXELS[:32].double(), CLASSES[:32])).backward()
    layers = {f"network.{name}": list(m.parameters()) for name, m in network.named_children() if list(m.parameters())}
    layers["total"] = list(network.parameters())
    gradients = {name: norm([p.grad for p in own if p.grad is not None]) for name, own in layers.items()}
    share = share_left_by_clipping(gradients["total"], clip)
    tags = {}
    for name, own in layers.items():
        tags[f"gradient_norm/{name}"] = gradients[name]
        tags[f"gradient_norm_clipped/{name}"] = gradients[name] * share
        tags[f"weight_norm/{name}"] = norm(own)
        tags[f"update_ratio/{name}"] = rate * gradients[name] * share / norm(own)
    return tags


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_statistics_before_and_after_the_optimizer_step(clip: float, accumulation: int) -> None:
    torch.manual_seed(0)
    network, memory = mlp(), MemoryLogger()
    expected = expected_step(copy.deepcopy(network).double(), clip, rate=0.1)
    size = 32 // accumulation
    batches = [(PIXELS[i * size :][:size], CLASSES[i * size :][:size]) for i in range(2 * accumulation)]
    make_trainer(
        max_epochs=1,
        logger=memory,
        callbacks=[ActivationVarianceMonitor(1, stats=STEP_STATS)],
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
    ).fit(BatchModule(network, batches))
    assert memory.steps[0].keys() == expected.keys()
    for tag, value in expected.items():
        # the update is the difference of two float32 weights, each rounded by 6e-8 of a weight near .1
        assert memory.steps[0][tag] == pytest.approx(value, rel=2e-4 if "update" in tag else 1e-5), tag
    assert memory.steps[1]["weight_norm/total"] != memory.steps[0]["weight_norm/total"]


def step_hooks(module: LightningModule) -> list[Any]:
    optimizers = module.optimizers(use_pl_optimizer=False)
    return [
        hook
        for optimizer in (optimizers if isinstance(optimizers, list) else [optimizers])
        for hook in optimizer._optimizer_step_post_hooks.values()
    ]


def test_optimizer_hooks_are_removed() -> None:
    class Spy(Callback):
        seen: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            self.seen.append(len(step_hooks(module)))

    spy, module = Spy(), DigitsMLP()
    monitor = ActivationVarianceMonitor(2, stats=STEP_STATS)
    make_trainer(max_steps=3, logger=MemoryLogger(), callbacks=[monitor, spy]).fit(module)
    assert spy.seen == [0, 0, 0]
    assert monitor.latest["update_ratio/total"] > 0


def test_fault_after_the_step_is_warned_about_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AFTER_STEP.target, broken)
    module = DigitsMLP()
    trainer = make_trainer(
        max_steps=3, logger=MemoryLogger(), callbacks=[ActivationVarianceMonitor(1, stats=STEP_STATS)]
    )
    with pytest.warns(UserWarning, match=f"{AFTER_STEP.where}: RuntimeError: bad luck"):
        trainer.fit(module)
    assert trainer.global_step == 3


def test_histograms_reach_tensorboard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, logger = mlp(), TensorBoardLogger(tmp_path)
    with torch.no_grad():
        values = {f"network.{i}": network[: i + 1](PIXELS).double() for i in range(len(network))}
    monitor = ActivationVarianceMonitor(1, stats=["histogram"])
    make_trainer(max_epochs=1, logger=logger, callbacks=[monitor]).fit(BatchModule(network, [(PIXELS, CLASSES)]))
    assert monitor.latest == {}
    accumulator = EventAccumulator(logger.log_dir).Reload()
    for layer, output in values.items():
        (event,) = accumulator.Histograms(f"histogram/{layer}")
        histogram = event.histogram_value
        assert histogram.num == sum(histogram.bucket) == output.numel()
        assert histogram.sum == pytest.approx(output.sum().item(), rel=1e-5, abs=1e-5)
        assert histogram.sum_squares == pytest.approx(output.square().sum().item(), rel=1e-5)
        assert (histogram.min, histogram.max) == pytest.approx((float(output.min()), float(output.max())), rel=1e-6)
        for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True):
            assert limit in EDGES
            below = max((edge for edge in EDGES if edge < limit), default=-torch.inf)
            assert count == pytest.approx(int(((output > below) & (output <= limit)).sum()), abs=1)


@pytest.mark.filterwarnings("ignore:ActivationVarianceMonitor writes histogram to TensorBoard only")
def test_histogram_of_what_is_not_finite_counts_it_apart(tmp_path: Path) -> None:
    class Holds(BatchModule):
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            self.scale(torch.tensor([[0.1, torch.nan, 5000.0, torch.inf]]))
            return super().training_step(batch, batch_index)

    logger, memory = TensorBoardLogger(tmp_path), MemoryLogger()
    module = Holds(mlp(), [(PIXELS, CLASSES)])
    module.scale = nn.RMSNorm(4)
    module.scale.forward = lambda x: x * module.scale.weight
    monitor = ActivationVarianceMonitor(1, layers=["scale"], stats=["histogram"])
    make_trainer(max_epochs=1, logger=[logger, memory], callbacks=[monitor]).fit(module)
    histogram = EventAccumulator(logger.log_dir).Reload().Histograms("histogram/scale")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == pytest.approx((0.1, 5000.0, 2))
    assert memory.steps == {0: {"histogram_nan/scale": 1.0, "histogram_infinite/scale": 1.0}}


def test_loggers_without_histograms_are_told_so_once() -> None:
    memory = MemoryLogger()
    callbacks = [ActivationVarianceMonitor(1, stats=["histogram"])]
    with pytest.warns(UserWarning, match="writes histogram to TensorBoard only") as caught:
        make_trainer(max_epochs=1, logger=memory, callbacks=callbacks).fit(BatchModule(mlp(), [(PIXELS, CLASSES)] * 3))
    assert sum("TensorBoard only" in str(w.message) for w in caught) == 1
    assert memory.steps == {}


def test_histograms_and_norms_of_parameters_are_those_of_the_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, logger = mlp(), TensorBoardLogger(tmp_path)
    slow = copy.deepcopy(network)
    cross_entropy(slow, (PIXELS, CLASSES)).backward()
    monitor = ActivationVarianceMonitor(1, stats=OF_PARAMETERS)
    trainer = make_trainer(max_epochs=1, logger=logger, callbacks=[monitor], gradient_clip_val=1e-3)
    trainer.fit(BatchModule(network, [(PIXELS, CLASSES)]))
    accumulator = EventAccumulator(logger.log_dir).Reload()
    for name, layer in slow.named_children():
        if own := list(layer.parameters()):
            for stat, tensors in (("weight", own), ("gradient", [p.grad for p in own])):
                values = torch.cat([tensor.detach().double().flatten() for tensor in tensors if tensor is not None])
                (event,) = accumulator.Histograms(f"{stat}_histogram/network.{name}")
                histogram = event.histogram_value
                assert histogram.num == len(values)
                assert (histogram.min, histogram.max) == pytest.approx(
                    (float(values.min()), float(values.max())), rel=1e-4
                )
                assert histogram.sum_squares == pytest.approx(float(values.square().sum()), rel=1e-5)
    for name, parameter in slow.named_parameters():
        assert parameter.grad is not None
        assert monitor.latest[f"parameter_norm/network.{name}"] == pytest.approx(norm([parameter]), rel=1e-5)
        assert monitor.latest[f"parameter_gradient_norm/network.{name}"] == pytest.approx(
            norm([parameter.grad]), rel=1e-5
        )


@pytest.mark.filterwarnings("ignore:ActivationVarianceMonitor writes .* to TensorBoard only")
def test_training_with_every_statistic_is_bit_identical() -> None:
    weights = []
    for stats in (
        None,
        ["default", *STEP_STATS, *OF_PARAMETERS, "histogram", "kurtosis", "activation_max", "saturation"],
    ):
        torch.manual_seed(0)
        module = DigitsMLP(activation=nn.Tanh)
        callbacks: Any = [ActivationVarianceMonitor(1, stats=stats)] if stats else []
        make_trainer(max_epochs=1, logger=MemoryLogger(), callbacks=callbacks, gradient_clip_val=0.1).fit(module)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
