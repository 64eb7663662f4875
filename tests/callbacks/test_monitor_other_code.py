"""The monitor among other people's code: watchers, loggers, other monitors, copies, exports, odd layers."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.masked import masked_tensor

from lightning_init import ActivationVarianceMonitor, observe
from tests.support.models import DigitsMLP, DigitsModule
from tests.support.monitored_fits import At, fit
from tests.support.oracle import MemoryLogger
from tests.support.trainers import make_trainer


def test_stance_of_the_compiler_is_the_users_alone() -> None:
    """Neither two monitors nor a user's own stance, taken in whatever order, leave it other than it was."""

    def stance() -> str:
        return str(torch._dynamo.eval_frame._stance.stance)

    seen: list[str] = []
    monitors = [ActivationVarianceMonitor(2, layers=[layer]) for layer in ("network.0", "network.2")]
    fit(DigitsMLP(), *monitors, At("on_train_batch_end", lambda module: seen.append(stance())))
    assert seen == ["default"] * 8
    model = nn.Sequential(nn.Linear(2, 2))
    with observe(model):
        held = torch.compiler.set_stance("eager_on_recompile")
        assert stance() == "eager_on_recompile"
    assert stance() == "eager_on_recompile"
    held.__exit__(None, None, None)
    assert stance() == "default"


@pytest.mark.filterwarnings("ignore:EarlyStopping looks at")
def test_watcher_goes_on_after_a_resume_and_in_a_second_fit(tmp_path: Any) -> None:
    def trainer(steps: int) -> Any:
        watching = [ActivationVarianceMonitor(50), EarlyStopping("gradient_norm/total", patience=100)]
        return make_trainer(max_epochs=steps, logger=MemoryLogger(), callbacks=watching)

    first = trainer(2)
    first.fit(DigitsMLP())
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = trainer(4)
    resumed.fit(DigitsMLP(), ckpt_path=tmp_path / "two.ckpt")
    assert resumed.current_epoch == 4
    first.fit_loop.max_epochs = 4
    first.fit(DigitsMLP())
    assert first.current_epoch == 4


def test_watcher_of_what_is_not_measured_is_told_so() -> None:
    watcher = EarlyStopping("dead_units/max", patience=1)
    said = "watches 'dead_units/max', but ActivationVarianceMonitor's stats are without"
    with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match="dead_units/max"):  # EarlyStopping's
        fit(DigitsMLP(), ActivationVarianceMonitor(1, stats=["gradient_norm"]), watcher, max_steps=1)


def test_patience_that_would_count_one_number_again_is_said() -> None:
    with pytest.warns(UserWarning, match="patience counts the same number again"):
        fit(DigitsMLP(), ActivationVarianceMonitor(50), EarlyStopping("gradient_norm/total"), max_steps=1)


@pytest.mark.parametrize("first", [True, False])
def test_extremes_over_layers_are_nan_where_any_layer_is(first: bool) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            bad, good = (self.a, self.b) if first else (self.b, self.a)
            output: Tensor = good(x) + torch.nan_to_num(bad(x * math.nan))
            return output

    trainer = make_trainer(max_steps=1, logger=MemoryLogger(), callbacks=[ActivationVarianceMonitor(1)])
    trainer.fit(DigitsModule(Broken))
    assert math.isnan(trainer.callback_metrics["activation_variance/min"])
    assert math.isnan(trainer.callback_metrics["activation_variance/max"])


class Flaky(MemoryLogger):
    """Fails so many times in a row, from the second step on."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step and self.left:
            self.left -= 1
            raise ConnectionError("503 Service Unavailable")
        super().log_metrics(metrics, step)


def steps_with_numbers(logger: MemoryLogger) -> int:
    return sum("gradient_norm/total" in tags for tags in logger.steps.values())


def test_logger_that_fails_once_gets_everything() -> None:
    good, flaky = MemoryLogger(), Flaky(1)
    make_trainer(max_steps=4, logger=[flaky, good], callbacks=[ActivationVarianceMonitor(1)]).fit(DigitsMLP())
    assert (steps_with_numbers(good), steps_with_numbers(flaky)) == (4, 4)


def test_logger_that_keeps_failing_is_dropped_by_name() -> None:
    good, flaky = MemoryLogger(), Flaky(2)
    trainer = make_trainer(max_steps=4, logger=[flaky, good], callbacks=[ActivationVarianceMonitor(1)])
    with pytest.warns(UserWarning, match="writes nothing more to Flaky, which failed twice; the other loggers go on"):
        trainer.fit(DigitsMLP())
    assert (steps_with_numbers(good), steps_with_numbers(flaky)) == (4, 1)


def test_models_copied_and_scripted_in_a_logged_step_know_nothing_of_it() -> None:
    made: list[Any] = []

    def make(module: LightningModule) -> None:
        made.append(copy.deepcopy(module.network))
        made.append(torch.jit.script(module.network))
        made.append(torch.jit.trace(module.network, torch.zeros(2, 64)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        steps = fit(DigitsMLP(), ActivationVarianceMonitor(1), At("on_train_batch_start", make), max_steps=1)
        made.append(torch.jit.script(made[0]))
    assert "activation_variance/network.0" in steps[0]
    assert not any(module._forward_hooks for module in made[0].modules())
    assert all(isinstance(output, Tensor) for output in (model(torch.zeros(2, 64)) for model in made))


class Padded(nn.Module):
    """A transformer's layer whose fast path asks whether anything inside has hooks: padding is answered otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels.view(-1, 8, 8)
        with torch.no_grad():
            self.body.eval()
            teacher = self.body(rows, src_key_padding_mask=rows.sum(-1) == 0)
            self.body.train()
        output: Tensor = self.head(self.body(rows).mean(1) + teacher.mean(1))
        return output


def test_code_that_asks_for_hooks_gets_the_answer_that_it_would_get() -> None:
    torch.manual_seed(0)
    plain = DigitsModule(Padded)
    watched = copy.deepcopy(plain)
    make_trainer(max_steps=3).fit(plain)
    fit(watched, ActivationVarianceMonitor(1), max_steps=3)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


class Masking(nn.Module):
    """Returns a kind of tensor that refuses most operations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        masked: Tensor = masked_tensor(x.detach() * 1, x > 0)
        return masked


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mask, self.head = nn.Linear(64, 16), Masking(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.mask(x)
        output: Tensor = self.head(x)
        return output


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.filterwarnings("ignore:squeeze is not implemented:UserWarning")
def test_layer_that_cannot_be_measured_is_named_and_the_others_go_on() -> None:
    with pytest.warns(UserWarning, match="leaves out 'network.mask', which cannot be measured; all others go on"):
        steps = fit(DigitsModule(WithMask), ActivationVarianceMonitor(1), max_steps=3)
    assert all("activation_variance/network.head" in tags for tags in steps.values())
    assert not any("network.mask" in tag for tags in steps.values() for tag in tags if "activation" in tag)


class Teaching(nn.Module):
    """A part of it is run in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = self.teacher(x)
        output: Tensor = self.student(x) + target.clone()
        return output


def test_outputs_of_inference_mode_are_measured() -> None:
    steps = fit(DigitsModule(Teaching), ActivationVarianceMonitor(1), max_steps=2)
    assert {"activation_variance/network.teacher", "activation_variance/network.student"} <= steps[0].keys()


def test_variance_of_one_number_is_absent() -> None:
    """A batch of one sample has no variance over samples, and a loss with parameters is one number."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(8))

        def forward(self, h: Tensor) -> Tensor:
            return (h - self.centre).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), Loss())
    with observe(net) as watching:
        net(torch.randn(1, 4)).backward()
    values = watching.compute().values
    assert values["signal_variance"] == {}
    assert list(values["activation_variance"]) == ["0"]
    with observe(net) as watching:
        net(torch.randn(2, 4)).backward()
    assert list(watching.compute().values["signal_variance"]) == ["0"]
