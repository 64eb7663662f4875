"""The monitor as a Lightning callback: when to record, when ranks exchange, where statistics are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_init.callbacks import _lightning, notices
from lightning_init.callbacks.session import FitSession
from lightning_init.callbacks.stepping import LoggedSteps
from lightning_init.checks import check_list
from lightning_init.introspect.layers import Parts, find_layers, select_layers
from lightning_init.monitor.coverage import Coverage
from lightning_init.monitor.moments import Number
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import STATISTICS, LayerStats, StatName, chosen_stats
from lightning_init.show.loggers import StatisticsWriter

P = ParamSpec("P")

_LARGEST = torch.finfo(torch.float32).max
"""For callbacks that end training when what they watch is missing, or infinite."""


def _guarded(
    hook: Callable[Concatenate[ActivationVarianceMonitor, P], None],
) -> Callable[Concatenate[ActivationVarianceMonitor, P], None]:
    """Let ``hook`` fail without harm to training, and skip it where no fit is monitored; its signature stays.

    ``hook`` runs only while there is a session that ranks have not switched off. If it raises, the exception is noted
    with the recorder and recording stops: the next exchange tells every rank, and all switch off together. Warnings
    that a user has turned into errors are raised, because they are meant to be.
    """

    @wraps(hook)
    def guarded(self: ActivationVarianceMonitor, /, *args: P.args, **kwargs: P.kwargs) -> None:
        session = self._session
        if session is None or session.recorder.disabled_reason:
            return
        try:
            hook(self, *args, **kwargs)
        except Warning:
            raise
        except Exception as error:
            session.recorder.fail(hook.__name__, error)
            session.stop_recording()

    return guarded


class ActivationVarianceMonitor(Callback):
    """Logs, layer by layer, whether the signal and its gradient stay healthy while a model trains.

    On the first step of every fit and every n-th step of the training, hooks record each layer's output and the
    gradient that comes back; the numbers of all ranks and micro-batches are added up and written to every logger of the
    Trainer:

    ========================== ================================================================================
    ``activation_variance``    population variance of all elements of the output
    ``signal_variance``        mean over units of the variance over samples and positions: what depends on the
                               input. A bias can hide a dead signal from the first number, not from this one
    ``gradient_variance``      variance of d loss / d output, the loss being the mean over ranks and micro-batches
    ``gradient_norm``          L2 norm of the gradients of the layer's own parameters, averaged over ranks,
                               accumulated, unscaled, before clipping; ``gradient_norm/total`` of all
    ``dead_units``             share of a ReLU layer's units that were never positive in the step
    ========================== ================================================================================

    and, on request:

    ========================== ================================================================================
    ``activation_mean``        mean of all elements of the output; ``activation_rms`` root of their mean square
    ``activation_max``         their largest magnitude (one more collective)
    ``kurtosis``               E[(x - mean)⁴] / variance² of the output, 3 for a normal one (one more collective)
    ``saturation``             share of a sigmoid's or tanh's outputs within 1 % of its range from either end
    ``weight_norm``            L2 norm of the layer's own parameters before the step
    ``update_ratio``           L2 norm of what the step has added to them, divided by ``weight_norm``
                               (holds a copy of the parameters during a logged step)
    ``gradient_norm_clipped``  ``gradient_norm`` after clipping
    ``histogram``              of the output, in TensorBoard: 64 bins, powers of two of either sign; NaN and
                               infinite elements are counted apart, in ``histogram_nan`` and
                               ``histogram_infinite`` (one more collective)
    ``gradient_histogram``     the same of the layer's parameters' gradients; ``weight_histogram`` of the parameters
    ``parameter_gradient_norm``  ``gradient_norm`` of each parameter; ``parameter_norm`` of the parameter itself
    ``gradient_rms``           root of the mean square of d loss / d output
    ``near_zero``              share of outputs smaller than 1e-3 of their root mean square (of that number, the next
                               smaller of 1, 1.25, 1.5 and 1.75 times a power of two)
    ========================== ================================================================================

    Training is bit-identical with and without it; under ``torch.compile``, modules with monitored layers run eagerly in
    logged steps, which takes their eager memory and may differ by rounding. If the monitor itself fails, it says so
    once and switches off on all ranks. Aggregates such as ``gradient_norm/total`` are in ``trainer.callback_metrics``,
    for ``EarlyStopping`` and ``ModelCheckpoint``.

    Args:
        every_n_steps: steps from one logged step to the next, counting from step 0; None: the Trainer's
            ``log_every_n_steps``.
        layers: globs on layer names; None: every layer. A layer is a module that owns parameters or an activation.
        stats: the statistics; None: the first table. "default" may be a member, so that others can be added.
        validation: also log, at the end of each validation, those statistics that are of outputs, over all of its
            batches: as ``validation/activation_variance/<layer>`` and so on.

    Raises:
        ValueError: ``every_n_steps`` is not a whole number above 0, a statistic does not exist; at the start of
            ``fit``, a glob that matches no layer.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        layers: list[str] | None = None,
        stats: list[StatName] | None = None,
        validation: bool = False,
    ) -> None:
        if every_n_steps is not None and (
            not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1
        ):
            raise ValueError(
                f"every_n_steps must be a whole number above 0, or None for the Trainer's log_every_n_steps; "
                f"got {every_n_steps!r}"
            )
        check_list("layers", layers)
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.stats = chosen_stats(stats)
        self.validation = validation
        self._latest: dict[str, float] = {}
        self._coverage: Coverage | None = None
        self._session: FitSession | None = None

    @property
    def latest(self) -> dict[str, float]:
        """The last logged step's numbers by tag, the same on every rank."""
        return dict(self._latest)

    @property
    def coverage(self) -> Coverage | None:
        """What has been seen of the model's layers in the present or the last fit; None before the first."""
        return self._session.recorder.coverage if self._session is not None else self._coverage

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a fit begins: finds the layers. Globs that match none are errors here.

        Nothing is attached to the model before a logged step begins.
        """
        self._end_session()
        interval = _lightning.logging_interval(trainer) if self.every_n_steps is None else self.every_n_steps
        if interval == 0:
            rank_zero_warn("ActivationVarianceMonitor is off, because the Trainer's log_every_n_steps is 0.")
            return
        if reason := _lightning.why_nothing_is_written(trainer):
            rank_zero_warn(f"ActivationVarianceMonitor only fills its .latest, because {reason}.")
        device = trainer.strategy.root_device
        try:
            layers = find_layers(pl_module)
        except Exception as error:
            self._session = FitSession(Recorder([], self.stats, device), LoggedSteps(interval))
            self._session.recorder.fail("finding the layers", error)
        else:
            chosen = select_layers(layers, self.layers)
            recorder = Recorder(chosen, self.stats, device, layers, Parts(pl_module))
            self._session = FitSession(recorder, LoggedSteps(interval))
            of_outputs = [stat for stat in self.stats if STATISTICS[stat].source == "output"]
            if self.validation and of_outputs:
                self._session.validation = Recorder(chosen, of_outputs, device, layers, Parts(pl_module))

    @override
    @_guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the data are known: says what callbacks that watch the numbers will not see."""
        assert self._session is not None
        notices.warn_of_watchers(trainer, self.stats, self._session.logged_steps.interval)

    @override
    @_guarded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each micro-batch: starts recording if it belongs to a logged step."""
        session = self._session
        assert session is not None
        session.stop_recording()
        step = _lightning.step_number(trainer)
        is_first_batch = step != session.step
        if is_first_batch and not session.logged_steps.is_logged(step, trainer.optimizers):
            session.step = None
            return
        session.gradients_taken = False
        session.step = step  # before anything can fail: a rank that fails still comes to the exchange
        if is_first_batch:
            session.backward_in_step = False
            if session.recorder.keep_up_with(pl_module, self.layers):
                session.warn_once("changed", "goes on with the model's present layers and parameters, which are new.")
            session.recorder.start_step()
        if session.recorder.local_error is None:
            session.start_recording(pl_module)
            notices.tell_of_eager_modules(session, pl_module)

    @override
    @_guarded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called when ``loss`` is about to be differentiated: from here on, gradients are recorded.

        In automatic optimization the forward pass is over; in manual optimization another one may follow.
        """
        session = self._session
        assert session is not None
        session.backward_announced = session.backward_in_step = True
        if session.recording:
            session.forward_open = not pl_module.automatic_optimization
            scale = _lightning.loss_scale(trainer)
            share = 1.0 / _lightning.data_parallel_size(trainer)
            session.recorder.announce_backward(share if scale is None else share / scale)

    @override
    @_guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the loss was differentiated: gradients of other backward passes are not recorded."""
        session = self._session
        assert session is not None
        session.recorder.end_backward()
        if session.step is not None and not session.gradients_taken and _may_change_gradients(pl_module):
            scale = _lightning.loss_scale(trainer)
            session.recorder.after_backward(pl_module.parameters(), lambda: 1.0 if scale is None else 1.0 / scale)

    @override
    @_guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called when gradients are accumulated, averaged over ranks and unscaled, and not yet clipped: records them.

        Fused optimizers unscale inside their step, so that their gradients are unscaled here.
        """
        session = self._session
        assert session is not None
        session.logged_steps.stepped(optimizer, _lightning.step_number(trainer), logged=session.step is not None)
        if session.step is None or session.gradients_taken:
            return
        # LBFGS evaluates the loss several times in one step: the first evaluation is what is logged
        session.gradients_taken = pl_module.automatic_optimization
        session.recording = not session.gradients_taken
        recorder = session.recorder
        parameters = _stepped_by(optimizer, pl_module)
        if recorder.needs_post_step:
            session.call_after_step(optimizer, partial(recorder.after_optimizer_step, parameters))
        recorder.before_optimizer_step(parameters, partial(_unscaling_factor, trainer, optimizer))

    @override
    @_guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each micro-batch: stops recording; after the last one of a logged step, exchanges and writes."""
        session = self._session
        assert session is not None
        session.stop_recording()
        step = _lightning.step_number(trainer)
        if step != session.step or not _lightning.step_ends_with_this_batch(trainer):
            return
        session.step = None
        notices.count_lost_gradients(session)
        try:
            if (stats := session.recorder.exchange()) is not None:
                self._publish(session, trainer, stats, step)
                notices.count_empty_norms(session, trainer, stats, step)
        except Warning:  # which the user wants as an error
            raise
        except Exception as error:
            session.recorder.fail("writing", error)
        notices.warn_of_layers_left_out(session)
        # what failed after the collective is said now, though the other ranks learn of it only at the next one
        session.warn_of_fault(session.recorder.disabled_reason or session.recorder.local_error)

    @override
    @_guarded
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a validation within training: starts recording, if that was asked for."""
        session = self._session
        assert session is not None
        if session.validation is not None and not trainer.sanity_checking and not session.validation.disabled_reason:
            session.validation.keep_up_with(pl_module, self.layers)
            session.start_validation(pl_module)

    @override
    @_guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after a validation within training: exchanges and writes what was recorded."""
        session = self._session
        assert session is not None
        recorder = session.validation
        if recorder is None or trainer.sanity_checking or recorder.disabled_reason:
            return
        recorder.detach()
        stats = recorder.exchange()
        session.warn_of_fault(recorder.disabled_reason or recorder.local_error)
        if stats is not None and trainer.is_global_zero:
            if session.writer is None:
                session.writer = self._new_writer(session, trainer)
            tags = {f"validation/{tag}": value for tag, value in stats.tags.items()}
            histograms = {f"validation/{stat}": row for stat, row in stats.histograms.items()}
            session.writer.write(tags, _lightning.step_number(trainer), histograms)

    @override
    @_guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the end of an epoch, also of one that was left in the middle of a batch: stops recording."""
        session = self._session
        assert session is not None
        session.stop_recording()

    @override
    @_guarded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the end of training: says what has failed since the last exchange."""
        session = self._session
        assert session is not None
        session.warn_of_fault(session.recorder.local_error)
        notices.explain_empty_norms(session, trainer)
        notices.explain_lost_gradients(session)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit is over, even if it ended before training began: leaves nothing on the model."""
        self._end_session()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when an exception ends a fit, after which no teardown comes: leaves nothing on the model."""
        self._end_session()

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit in progress, whose hooks and weak references belong to this process."""
        return {**self.__dict__, "_session": None}

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.stop_recording()
            self._coverage = self._session.recorder.coverage
        self._session = None

    def _publish(self, session: FitSession, trainer: Trainer, stats: LayerStats, step: int) -> None:
        """Hand the statistics of a step to ``latest``, to other callbacks, and on rank zero to the loggers."""
        tags = stats.tags
        awaited: list[str] = []
        if _lightning.loss_scale(trainer) is not None and not _gradients_are_finite(tags):
            session.warn_once(
                "overflow",
                f"leaves out the gradient statistics of step {step} and others like it: the loss scale overflowed, "
                "as it does while it adapts, and the optimizer skips the step. Until there are some, callbacks that "
                "watch them see the largest finite number.",
            )
            session.logged_steps.owe_next()  # which has them
            awaited = [name for name in _aggregates(tags, stats) if name.startswith("gradient_")]
            tags = {tag: value for tag, value in tags.items() if not tag.startswith("gradient_")}
        self._latest = tags
        aggregates = _aggregates(tags, stats)
        aggregates |= {name: _LARGEST for name in awaited if name not in trainer.callback_metrics}
        tensors = torch.tensor(list(aggregates.values()), device=trainer.strategy.root_device)
        trainer.callback_metrics.update(zip(aggregates, tensors.unbind(), strict=True))
        if trainer.is_global_zero:
            if session.writer is None:
                session.writer = self._new_writer(session, trainer)
            session.writer.write(tags, step, stats.histograms)
            notices.warn_of_failed_loggers(session)

    def _new_writer(self, session: FitSession, trainer: Trainer) -> StatisticsWriter:
        """A writer to the Trainer's loggers; tells of layers and statistics that they will not get."""
        notices.tell_of_layers(session)
        writer = StatisticsWriter(trainer.loggers)
        notices.warn_of_histograms(session, writer, self.stats)
        writer.write_layout(self.stats)
        return writer


def _may_change_gradients(module: LightningModule) -> bool:
    """Whether the user's code runs between backward and ``on_before_optimizer_step``: it may clip gradients there."""
    return not module.automatic_optimization or _lightning.is_overridden("on_after_backward", module)


def _stepped_by(optimizer: Optimizer, module: LightningModule) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer changes; all of the module's if the optimizer has copies of its own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter.grad is not None for parameter in parameters):
        return parameters
    own = set(module.parameters())
    return parameters if any(parameter in own for parameter in parameters) else list(own)


def _unscaling_factor(trainer: Trainer, optimizer: Optimizer) -> Number:
    """What gradients have to be multiplied by before ``optimizer`` steps, so that they are those of the loss."""
    scale = _lightning.loss_scale(trainer) if _lightning.unscales_in_step(optimizer) else None
    return 1.0 if scale is None else 1.0 / scale


def _aggregates(tags: dict[str, float], stats: LayerStats) -> dict[str, float]:
    """Numbers for callbacks such as EarlyStopping: the total norm, and the extremes over layers of some statistics.

    What is missing in ``tags`` is left out.
    """
    total = "gradient_norm/total"
    found = {total: tags[total]} if total in tags else {}
    for stat in ("activation_variance", "signal_variance", "gradient_variance", "dead_units"):
        row = stats.values.get(stat)
        if row and f"{stat}/{next(iter(row))}" in tags:
            least, most = min(row.values()), max(row.values())
            nan = next((value for value in row.values() if math.isnan(value)), None)  # which no comparison finds
            found[f"{stat}/min"], found[f"{stat}/max"] = (least, most) if nan is None else (nan, nan)
    return found


def _gradients_are_finite(tags: dict[str, float]) -> bool:
    return all(math.isfinite(value) for tag, value in tags.items() if tag.startswith("gradient_"))
