"""What the monitor knows during one ``fit``, and how it comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_init.callbacks._lightning import in_training_step
from lightning_init.monitor.collector import EagerMoment
from lightning_init.monitor.recorder import Recorder
from lightning_init.show.loggers import Board


@dataclass
class FitSession:
    """One ``fit``, from ``on_fit_start`` to its end.

    Attributes:
        step: the logged step whose micro-batches are being collected.
        stepped: whether this batch's gradients were taken, once and for all.
        listening: whether what happens now is measured.
        forward_open: whether a forward pass counts, were it the training step's.
        backward_announced: whether Lightning has run a backward pass.
        said: what was warned about.
        step_handles: hooks on optimizers that have not stepped yet.
    """

    recorder: Recorder
    interval: int
    board: Board | None = None
    eager: EagerMoment = field(default_factory=EagerMoment)
    step: int | None = None
    gradients_taken: bool = False
    listening: bool = False
    forward_open: bool = False
    backward_announced: bool = False
    warned: set[str] = field(default_factory=set)
    step_handles: dict[Optimizer, RemovableHandle] = field(default_factory=dict)

    def listen(self, module: LightningModule) -> None:
        """Put hooks on the module; compiled code runs as written, or they would not fire."""
        self.listening = self.forward_open = True
        self.eager.start()
        self.recorder.collector.attach(lambda: self.forward_open and in_training_step(module))

    def after_optimizer_step(self, optimizer: Optimizer, action: Callable[[], None]) -> None:
        """Call ``action`` once, when ``optimizer`` has stepped; gradients are clipped then."""

        def after(*args: Any) -> None:
            try:
                action()
            except Exception as error:
                self.recorder.fail("after the optimizer's step", error)
            self.step_handles.pop(optimizer).remove()

        if optimizer not in self.step_handles:
            self.step_handles[optimizer] = optimizer.register_step_post_hook(after)

    def stop_listening(self) -> None:
        """No hook on model or optimizers, and compiled code runs compiled."""
        self.listening = False
        while self.step_handles:
            self.step_handles.popitem()[1].remove()  # the optimizer did not step: the loss scale overflowed
        self.eager.stop()
        self.recorder.collector.detach()

    def warn_once(self, topic: str, message: str) -> None:
        """Warn on rank zero, unless the topic was warned about."""
        if topic not in self.warned:
            self.warned.add(topic)
            rank_zero_warn(f"ActivationVarianceMonitor {message}")

    def report(self, fault: str | None) -> None:
        """Say what has failed."""
        if fault:
            self.warn_once("fault", f"has failed and is switched off; training goes on. {fault}")
