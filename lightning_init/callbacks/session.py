"""What the monitor keeps during one ``fit``: its recorder, its writer, and how far the present step has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_init.callbacks._lightning import in_training_step, in_validation_step
from lightning_init.callbacks.stepping import LoggedSteps
from lightning_init.monitor.recorder import Recorder
from lightning_init.show.loggers import StatisticsWriter


@dataclass
class FitSession:
    """One ``fit``, from ``on_fit_start`` to its end.

    Attributes:
        recorder: records and exchanges the statistics.
        logged_steps: which steps are logged.
        validation: records and exchanges the statistics of validations; None if they were not asked for.
        writer: writes to the Trainer's loggers; made when there is something to write.
        step: the logged step whose micro-batches are being recorded; None between logged steps.
        gradients_taken: whether this step's parameter gradients have been recorded for the last time.
        recording: whether hooks are on the model and gradients are still to be recorded.
        forward_open: whether outputs of ``training_step`` are still to be recorded.
        backward_announced: whether Lightning has run a backward pass in this fit.
        backward_in_step: whether it has in the present logged step.
        steps_with_backward: how many logged steps had a backward pass.
        norms_may_be_empty: whether some had norms of gradients, or none were asked for.
        steps_with_lost_gradients: how many had gradients that came without an announcement.
        warned: topics that a warning was given about.
        step_handles: hooks on optimizers that have not stepped yet.
    """

    recorder: Recorder
    logged_steps: LoggedSteps
    validation: Recorder | None = None
    writer: StatisticsWriter | None = None
    step: int | None = None
    gradients_taken: bool = False
    recording: bool = False
    forward_open: bool = False
    backward_announced: bool = False
    backward_in_step: bool = False
    steps_with_backward: int = 0
    norms_may_be_empty: bool = False
    steps_with_lost_gradients: int = 0
    warned: set[str] = field(default_factory=set)
    step_handles: dict[Optimizer, RemovableHandle] = field(default_factory=dict)

    def start_recording(self, module: LightningModule) -> None:
        """Record what ``module`` computes in its training step, until ``stop_recording``."""
        self.recording = self.forward_open = True
        self.recorder.attach(lambda: self.forward_open and in_training_step(module))

    def start_validation(self, module: LightningModule) -> None:
        """Record what ``module`` computes in its validation steps, until ``stop_recording``."""
        assert self.validation is not None
        self.validation.start_step()
        self.validation.attach(lambda: in_validation_step(module))

    def call_after_step(self, optimizer: Optimizer, action: Callable[[], None]) -> None:
        """Call ``action`` once, when ``optimizer`` has stepped; by then, gradients are clipped."""

        def after(*args: Any) -> None:
            try:
                action()
            except Exception as error:
                self.recorder.fail("after the optimizer's step", error)
            self.step_handles.pop(optimizer).remove()

        if not hasattr(optimizer, "register_step_post_hook"):
            self.warn_once(
                f"optimizer {type(optimizer).__name__}",
                f"cannot see the steps of {type(optimizer).__name__}, which takes no hooks: update_ratio and "
                "gradient_norm_clipped are without its parameters.",
            )
        elif optimizer not in self.step_handles:
            self.step_handles[optimizer] = optimizer.register_step_post_hook(after)

    def stop_recording(self) -> None:
        """Leave no hook on the model or its optimizers, and let compiled code run compiled."""
        self.recording = False
        while self.step_handles:
            self.step_handles.popitem()[1].remove()  # the optimizer did not step: the loss scale overflowed
        self.recorder.detach()
        if self.validation is not None:
            self.validation.detach()

    def warn_once(self, topic: str, message: str) -> None:
        """Warn on rank zero, unless there was a warning about ``topic`` before."""
        if topic not in self.warned:
            self.warned.add(topic)
            rank_zero_warn(f"ActivationVarianceMonitor {message}")

    def warn_of_fault(self, fault: str | None) -> None:
        """Say what has failed, if anything has."""
        if fault:
            self.warn_once("fault", f"has failed and is switched off; training goes on. {fault}")
