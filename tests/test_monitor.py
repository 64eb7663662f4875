"""The callback in real fits of one process."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.models import DigitsConvNet, DigitsLSTM, DigitsMLP, DigitsTransformer, digits, mlp
from tests.oracle import Batch, BatchModule, MemoryLogger, assert_tags_close, cross_entropy, expected_tags
from tests.trainers import make_trainer


def batches(count: int, size: int = 16) -> list[Batch]:
    pixels, classes = digits()
    return [(pixels[i * size : (i + 1) * size], classes[i * size : (i + 1) * size]) for i in range(count)]


def fit(
    module: LightningModule,
    monitor: ActivationVarianceMonitor | None,
    *callbacks: Callback,
    max_epochs: int = 1,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """What the loggers got, by step."""
    memory = MemoryLogger()
    every = [*([monitor] if monitor else []), *callbacks]
    trainer = make_trainer(max_epochs=max_epochs, logger=memory, callbacks=every, **options)
    trainer.fit(module)
    return {
        step: watched
        for step, tags in memory.steps.items()
        if (watched := {tag: value for tag, value in tags.items() if "/" in tag})
    }


def hooks_of(module: nn.Module) -> list[Any]:
    return [hook for m in module.modules() for hook in m._forward_hooks.values()]


# Construction and fit start


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "5"])
def test_an_interval_is_a_whole_number_above_zero(interval: Any) -> None:
    with pytest.raises(
        ValueError, match="every_n_steps must be a whole number above 0, or None .* got " + repr(interval)
    ):
        ActivationVarianceMonitor(interval)


def test_an_unknown_statistic() -> None:
    with pytest.raises(ValueError, match=r"'activation_varience'; allowed: .*; did you mean 'activation_variance'"):
        ActivationVarianceMonitor(stats=["activation_varience"])  # type: ignore[list-item]


def test_a_glob_that_matches_no_layer_stops_the_fit() -> None:
    module = DigitsMLP()
    with pytest.raises(ValueError, match=r"layers: 'netwrk\.\*' matches no layer.*network\.0"):
        fit(module, ActivationVarianceMonitor(layers=["netwrk.*"]))
    assert hooks_of(module) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"logger": False}, "the Trainer has no logger"), ({"fast_dev_run": True}, "of fast_dev_run")],
)
def test_without_a_logger_training_goes_on(options: dict[str, Any], reason: str) -> None:
    monitor = ActivationVarianceMonitor(1)
    trainer = make_trainer(max_steps=2, callbacks=[monitor], **options)
    with pytest.warns(UserWarning, match=f"only fills its .latest, because {reason}"):
        trainer.fit(DigitsMLP())
    assert monitor.latest["gradient_norm/total"] > 0


def test_an_interval_of_the_trainers_that_logs_nothing() -> None:
    monitor = ActivationVarianceMonitor()
    with pytest.warns(UserWarning, match="is off, because the Trainer's log_every_n_steps is 0"):
        assert fit(DigitsMLP(), monitor, max_steps=2, log_every_n_steps=0) == {}
    assert monitor.latest == {}


# What is logged, and when


def test_the_numbers_are_the_oracles_and_the_first_step_is_logged() -> None:
    torch.manual_seed(0)
    network = mlp(32, 3)
    slow = copy.deepcopy(network).double()
    steps = fit(BatchModule(network, batches(4)), monitor := ActivationVarianceMonitor(2))
    assert sorted(steps) == [0, 2]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(4)):
        expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, rectifiers=["1", "3", "5"])
        if step in steps:
            assert_tags_close(steps[step], expected)
        optimizer.step()
    assert monitor.latest == steps[2]


@pytest.mark.parametrize(
    ("every", "options", "logged"),
    [
        (3, {}, [0, 3, 6]),
        (None, {"log_every_n_steps": 4}, [0, 4]),
        (None, {}, [0]),
        (2, {"accumulate_grad_batches": 3}, [0, 2]),  # 8 batches: steps of 3, 3 and 2
        (3, {"max_epochs": 2, "limit_train_batches": 4}, [0, 3, 6]),
    ],
)
def test_every_nth_step(every: int | None, options: dict[str, Any], logged: list[int]) -> None:
    assert sorted(fit(DigitsMLP(), ActivationVarianceMonitor(every), **options)) == logged


def test_layers_and_stats_can_be_chosen() -> None:
    monitor = ActivationVarianceMonitor(layers=["*.1", "network.2"], stats=["dead_units", "activation_variance"])
    (tags,) = fit(DigitsMLP(), monitor, max_steps=1).values()
    layers = ("network.1", "network.2")
    assert list(tags) == ["dead_units/network.1", *(f"activation_variance/{layer}" for layer in layers)]


def test_loggers_on_disk(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    monitor = ActivationVarianceMonitor(2)
    make_trainer(max_steps=3, logger=loggers, callbacks=[monitor]).fit(DigitsMLP())
    accumulator = EventAccumulator(loggers[0].log_dir).Reload()
    for tag, value in monitor.latest.items():
        assert [event.step for event in accumulator.Scalars(tag)] == [0, 2]
        assert accumulator.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)
    assert "custom_scalars__config__" in accumulator.Tags()["tensors"]
    rows = list(csv.DictReader((tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    written = [row for row in rows if row["activation_variance/network.0"]]
    assert [row["step"] for row in written] == ["0", "2"]
    assert float(written[-1]["gradient_norm/total"]) == monitor.latest["gradient_norm/total"]


def test_callbacks_can_watch_the_aggregates(tmp_path: Path) -> None:
    """EarlyStopping and ModelCheckpoint find them, and they are what the tags say."""
    monitor = ActivationVarianceMonitor(1)
    stopping = EarlyStopping("gradient_norm/total", stopping_threshold=1e9, check_on_train_epoch_end=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="activation_variance/min", save_on_train_epoch_end=True)
    trainer = make_trainer(
        max_epochs=3, logger=MemoryLogger(), callbacks=[monitor, stopping, checkpoint], enable_checkpointing=True
    )
    trainer.fit(DigitsMLP(num_samples=64))
    assert trainer.current_epoch == 1  # the threshold is met at once
    variances = [v for tag, v in monitor.latest.items() if tag.startswith("activation_variance/")]
    assert trainer.callback_metrics["activation_variance/max"].item() == pytest.approx(max(variances))
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.item() == pytest.approx(min(variances))
    assert trainer.callback_metrics["gradient_norm/total"].item() == pytest.approx(
        monitor.latest["gradient_norm/total"]
    )


def test_layers_nobody_calls_are_named_once() -> None:
    class Idle(DigitsMLP):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.spare = nn.Linear(2, 2), nn.Tanh()

    with pytest.warns(UserWarning, match="found layers that nobody called") as caught:
        fit(Idle(), ActivationVarianceMonitor(1), max_steps=3)
    (warning,) = [w for w in caught if "nobody called" in str(w.message)]
    assert str(warning.message).endswith("in the first logged step: 'idle', 'spare'.")


# Whose passes count


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
def test_only_the_training_step_counts(first: bool) -> None:
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

    def losses(self, real: Tensor, noise: Tensor) -> Iterator[Tensor]:
        judge = self.discriminator
        fake = self.generator(noise)
        yield judge(fake.detach()).square().mean() + (1 - judge(real)).square().mean()
        yield (1 - judge(fake)).square().mean()

    def training_step(self, batch: Batch, batch_index: int) -> None:
        noise = torch.linspace(-1, 1, len(batch[0]) * 4).view(-1, 4)
        for loss, optimizer in zip(self.losses(batch[0], noise), self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward() if self.direct else self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        networks = (self.discriminator, self.generator)
        return [torch.optim.SGD(network.parameters(), lr=0.0) for network in networks]

    train_dataloader = BatchModule.train_dataloader


def gan_norms(module: GAN, batch: Batch) -> dict[str, float]:
    """Each network's own optimizer's step, in float64."""
    noise = torch.linspace(-1, 1, len(batch[0]) * 4, dtype=torch.float64).view(-1, 4)
    losses = module.losses(batch[0].double(), noise)
    squares = {}
    for loss, network in zip(losses, (module.discriminator, module.generator), strict=True):
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        squares |= {p: float(g.square().sum()) for p, g in zip(network.parameters(), gradients, strict=True)}
    names = {name: m for name, m in module.named_modules() if list(m.parameters(recurse=False))}
    norms = {name: sum(squares[p] for p in m.parameters()) ** 0.5 for name, m in names.items()}
    return {f"gradient_norm/{n}": v for n, v in {**norms, "total": sum(squares.values()) ** 0.5}.items()}


def test_several_optimizers_by_hand() -> None:
    torch.manual_seed(0)
    module = GAN()
    module.batches = batches(2)  # type: ignore[assignment]
    slow = copy.deepcopy(module).double()
    slow.batches = None  # type: ignore[assignment]
    steps = fit(module, ActivationVarianceMonitor(1))
    assert sorted(steps) == [0, 1]
    expected = gan_norms(slow, batches(2)[1])
    assert_tags_close({tag: v for tag, v in steps[1].items() if tag.startswith("gradient_norm/")}, expected)
    with torch.no_grad():
        x, noise = batches(2)[1][0].double(), torch.linspace(-1, 1, 64, dtype=torch.float64).view(-1, 4)
        fake = slow.generator(noise)
        judged = [slow.discriminator[0](t) for t in (fake, x, fake)]
    variance = torch.cat(judged).var(correction=0).item()
    assert steps[1]["activation_variance/discriminator.0"] == pytest.approx(variance, rel=1e-5)


def test_a_backward_lightning_does_not_know_of() -> None:
    module = GAN(direct=True)
    module.batches = batches(2)  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="sees no gradients, because loss.backward.. is called directly") as caught:
        steps = fit(module, ActivationVarianceMonitor(1))
    assert len([w for w in caught if "sees no gradients" in str(w.message)]) == 1
    assert not any(tag.startswith("gradient_variance") for tag in steps[1])
    assert "activation_variance/generator" in steps[1]


def test_lbfgs_evaluates_often_and_the_first_evaluation_counts() -> None:
    class Newton(BatchModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    torch.manual_seed(0)
    network = mlp()
    (x, y), slow = batches(1)[0], copy.deepcopy(network).double()
    steps = fit(Newton(network, batches(1)), ActivationVarianceMonitor(1))
    expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, rectifiers=["1", "3"])
    assert_tags_close(steps[0], expected)


# Precision


def scaler_plugin(scale: float = 2.0**16) -> MixedPrecision:
    """float16's gradient scaler around a step in float32: what CUDA does, as far as a CPU can."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign,assignment]
    return plugin


class Fused(BatchModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("kind", [BatchModule, Fused])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_scale_is_taken_out(kind: type[BatchModule], accumulation: int) -> None:
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
def test_an_overflow_is_said_once_and_skipped(kind: type[BatchModule]) -> None:
    plugin = scaler_plugin(2.0**120)
    module = kind(mlp(), batches(3), lambda network, batch: 1e6 * cross_entropy(network, batch))
    with pytest.warns(UserWarning, match="leaves out the gradient statistics of step 0") as caught:
        steps = fit(module, ActivationVarianceMonitor(1), plugins=[plugin])
    assert len([w for w in caught if "leaves out" in str(w.message)]) == 1
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2.0**120
    assert not any(tag.startswith("gradient_") for tag in steps[0])
    assert steps[0]["activation_variance/network.0"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_activations_are_measured_as_they_are(precision: Any) -> None:
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


# Neutral


def no_change_module(kind: str) -> LightningModule:
    seed_everything(7, verbose=False)
    if kind == "conv":
        return DigitsConvNet(num_samples=96)
    if kind == "lstm":
        return DigitsLSTM(num_samples=96, bidirectional=True)
    return DigitsTransformer(num_samples=96, dropout=0.1)


class Trace(Callback):
    """Everything that could differ: losses, gradients, weights, batches, random state."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        state = {**module.state_dict()}
        self.seen += [outputs["loss"], batch[0], torch.get_rng_state(), *(t.clone() for t in state.values())]


@pytest.mark.parametrize("kind", ["conv", "lstm", "transformer"])
def test_training_is_bit_identical(kind: str) -> None:
    traces = []
    for monitor in (None, ActivationVarianceMonitor(1), ActivationVarianceMonitor(2)):
        trace = Trace()
        fit(no_change_module(kind), monitor, trace, max_epochs=2)
        traces.append(trace.seen)
    for other in traces[1:]:
        assert len(other) == len(traces[0])
        assert all(torch.equal(a, b) for a, b in zip(traces[0], other, strict=True))


def raise_runtime_error(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("bad luck")


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("lightning_init.callbacks.monitor.find_layers", "finding the layers"),
        ("lightning_init.monitor.tap.Tap.attach", "on_train_batch_start"),
        ("lightning_init.monitor.tap.observe", "hook on layer 'network.0'"),
        ("lightning_init.callbacks.loop.loss_scale", "on_before_backward"),
        ("lightning_init.monitor.norms.sum_of_squares", "on_before_optimizer_step"),
        ("lightning_init.monitor.layout.Layout.pack", "packing"),
        ("lightning_init.monitor.recorder.Reading", "reading"),
        ("lightning_init.monitor.board.Board.write", "writing"),
    ],
)
def test_a_fault_is_said_once_and_training_ends_as_without(
    monkeypatch: pytest.MonkeyPatch, target: str, where: str
) -> None:
    plain, broken = Trace(), Trace()
    fit(no_change_module("lstm"), None, plain)
    module, monitor = no_change_module("lstm"), ActivationVarianceMonitor(1)
    monkeypatch.setattr(target, raise_runtime_error)
    where = where.replace("network.0", "network.lstm")
    with pytest.warns(
        UserWarning, match=f"switched off; training goes on. .*{where}: RuntimeError: bad luck"
    ) as caught:
        fit(module, monitor, broken)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, broken.seen, strict=True))
    assert hooks_of(module) == []


# Lifecycle


class At(Callback):
    """Calls a function at one event."""

    def __init__(self, event: str, action: Callable[[LightningModule], Any]) -> None:
        setattr(self, event, lambda trainer, module, *args: action(module))


def interrupt(module: LightningModule) -> None:
    raise KeyboardInterrupt


def terminate(module: LightningModule) -> None:
    signal.raise_signal(signal.SIGTERM)


def failing_step(module: LightningModule) -> None:
    def step(*args: Any) -> None:
        module.network(digits()[0][:4])  # type: ignore[operator]
        raise RuntimeError("bad luck")

    module.training_step = step


@pytest.mark.parametrize(
    ("event", "action"),
    [
        ("on_fit_start", raise_runtime_error),
        ("on_fit_start", failing_step),
        ("on_train_batch_start", raise_runtime_error),
        ("on_before_backward", raise_runtime_error),
        ("on_before_optimizer_step", interrupt),
        ("on_train_batch_end", raise_runtime_error),
        ("on_train_batch_start", terminate),
        ("on_train_end", raise_runtime_error),
    ],
)
@pytest.mark.parametrize("neighbour_first", [True, False])
def test_no_hook_survives(event: str, action: Callable[[LightningModule], Any], neighbour_first: bool) -> None:
    module, monitor, neighbour = DigitsMLP(), ActivationVarianceMonitor(1), At(event, action)
    callbacks = [neighbour, monitor] if neighbour_first else [monitor, neighbour]
    trainer = make_trainer(max_epochs=1, logger=MemoryLogger(), callbacks=callbacks)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module)
    assert hooks_of(module) == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_no_hook_outside_of_logged_batches() -> None:
    module, between = DigitsMLP(), []
    spy = At("on_train_batch_start", lambda m: between.append(len(hooks_of(m))))
    fit(module, ActivationVarianceMonitor(3), spy)
    assert between == [5, 0, 0, 5, 0, 0, 5, 0]
    assert hooks_of(module) == []


def test_an_epoch_that_ends_in_the_middle_of_a_batch() -> None:
    class Leaving(DigitsMLP):
        def on_train_batch_start(self, batch: Any, batch_index: int) -> int | None:
            return -1 if batch_index == 2 else None

    between: list[int] = []
    module = Leaving()
    spy = At("on_train_epoch_start", lambda m: between.append(len(hooks_of(m))))
    steps = fit(module, ActivationVarianceMonitor(1), spy, max_epochs=2)
    assert sorted(steps) == [0, 1, 2, 3]
    assert between == [0, 0]


def test_the_model_is_saved_and_copied_with_the_monitor_on() -> None:
    saved: list[nn.Module] = []

    def save(module: LightningModule) -> None:
        assert hooks_of(module)
        buffer = io.BytesIO()
        torch.save(module.network, buffer)
        saved.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
        saved.append(copy.deepcopy(module.network))  # type: ignore[arg-type]
        saved.append(pickle.loads(pickle.dumps(module.network)))

    module = DigitsMLP()
    before = copy.deepcopy(module.network)
    fit(module, ActivationVarianceMonitor(1), At("on_train_batch_start", save), max_steps=1)
    x = torch.randn(3, 64)
    assert len(saved) == 3
    assert all(torch.equal(twin(x), before(x)) for twin in saved)


def test_the_callback_pickles_and_copies_also_during_a_fit() -> None:
    twins: list[ActivationVarianceMonitor] = []
    monitor = ActivationVarianceMonitor(2, layers=["network.*"], stats=["default"])

    def twin(module: LightningModule) -> None:
        twins.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    fit(DigitsMLP(), monitor, At("on_before_backward", twin), max_steps=1)
    for other in twins:
        assert (other.every_n_steps, other.layers, other.stats) == (2, ["network.*"], monitor.stats)
        fit(DigitsMLP(), other, max_steps=1)
        assert set(other.latest) == set(monitor.latest)


def test_resuming_continues_the_interval_and_fitting_again_starts_it(tmp_path: Path) -> None:
    module = DigitsMLP()
    trainer = make_trainer(max_steps=4, logger=MemoryLogger(), callbacks=[ActivationVarianceMonitor(3)])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    memory, monitor = MemoryLogger(), ActivationVarianceMonitor(3)
    trainer = make_trainer(max_steps=8, logger=memory, callbacks=[monitor])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        trainer.fit(module, ckpt_path=tmp_path / "four.ckpt")
    assert [step for step, tags in memory.steps.items() if "gradient_norm/total" in tags] == [6]
    assert sorted(fit(module, monitor)) == [0, 3, 6]


# torch.compile


def counted(graphs: list[Any]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


class Chain(nn.Sequential):
    """``compile`` in place ignores forward methods that torch wrote."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def compiled_module(part: str, graphs: list[Any]) -> LightningModule:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = BatchModule(Chain(*mlp()), batches(6))
    compile_ = partial(torch.compile, backend=counted(graphs))
    if part == "submodule":
        module.network = compile_(module.network)
        return module
    if part == "in place":
        module.network.compile(backend=counted(graphs))
        return module
    return compile_(module)  # type: ignore[no-any-return,call-overload]


@pytest.mark.parametrize("part", ["module", "submodule", "in place"])
def test_compiled_models_run_the_same_graphs(part: str) -> None:
    """Two of six steps are logged; the others run the one graph they would run without a monitor."""
    torch.manual_seed(0)
    slow = mlp().double()
    graphs: list[Any] = []
    plain_graphs: list[Any] = []
    fit(compiled_module(part, plain_graphs), None)
    steps = fit(compiled_module(part, graphs), ActivationVarianceMonitor(3))
    assert len(graphs) == len(plain_graphs) == 1
    assert [len(list(graph.graph.nodes)) for graph in graphs] == [len(list(g.graph.nodes)) for g in plain_graphs]
    assert sorted(steps) == [0, 3]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(4)):
        expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, rectifiers=["1", "3"])
        if step in steps:
            assert_tags_close(steps[step], expected, relative=2e-5)  # the compiled steps before it round differently
        optimizer.step()


# What the lecture says


def first_step(initialise: Callable[[Tensor], Any], depth: int = 20, width: int = 256) -> dict[str, float]:
    """Statistics of the first step of a deep ReLU network without biases on N(0, 1) inputs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, width, bias=False))
    for _ in range(depth):
        network.extend([nn.ReLU(), nn.Linear(width, width, bias=False)])
    for layer in network:
        if isinstance(layer, nn.Linear):
            initialise(layer.weight)
    module = BatchModule(network, [(torch.randn(256, width), torch.arange(256) % width)])
    return fit(module, ActivationVarianceMonitor(1))[0]


def linear_variances(tags: dict[str, float], depth: int = 20) -> list[float]:
    return [tags[f"activation_variance/network.{2 * i}"] for i in range(depth + 1)]


def test_zeros_learn_nothing() -> None:
    tags = first_step(nn.init.zeros_)
    assert set(linear_variances(tags)) == {0.0}
    assert tags["gradient_norm/total"] == 0.0
    assert all(tags[f"dead_units/network.{2 * i + 1}"] == 1.0 for i in range(20))


def test_standard_normal_explodes_by_the_width_in_every_layer() -> None:
    """Variance d after the first layer; E[relu(z)²] is half of it, so d/2 for every further ReLU layer."""
    variances = linear_variances(first_step(nn.init.normal_, depth=5), depth=5)
    assert variances[0] == pytest.approx(256, rel=0.05)
    for before, after in itertools.pairwise(variances):
        assert after / before == pytest.approx(128, rel=0.3)


def test_he_keeps_the_variance_and_xavier_loses_half_a_layer() -> None:
    he = linear_variances(first_step(partial(nn.init.kaiming_normal_, nonlinearity="relu")))
    xavier = linear_variances(first_step(nn.init.xavier_normal_))
    # the log variance of each layer has standard deviation √(5/256) or so: 0.14 a layer, 0.63 after twenty
    assert all(0.15 < variance / 2 < 6 for variance in he)
    assert 0.15 < xavier[-1] * 2**20 < 6
