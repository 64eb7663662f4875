"""The monitor as a Lightning callback: when to listen, when to exchange, where to write."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_init.callbacks import _lightning
from lightning_init.callbacks.session import FitSession
from lightning_init.checks import check_list
from lightning_init.introspect.layers import find_layers, select_layers
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import LayerStats, StatName, chosen_stats
from lightning_init.show.loggers import Board

P = ParamSpec("P")


def _harmless(
    method: Callable[Concatenate[ActivationVarianceMonitor, FitSession, P], None],
) -> Callable[Concatenate[ActivationVarianceMonitor, P], None]:
    """Hand the run to ``method``; training goes on whatever happens in there.

    A failure is only noted: the next exchange tells every rank, and all switch off together.
    """

    @wraps(method)
    def guarded(self: ActivationVarianceMonitor, *args: P.args, **kwargs: P.kwargs) -> None:
        run = self._run
        if run is None or run.recorder.disabled_reason:
            return
        try:
            method(self, run, *args, **kwargs)
        except Warning:
            raise  # of our own, by somebody who made warnings errors
        except Exception as error:
            run.recorder.fail(method.__name__, error)
            run.stop_listening()

    return cast("Callable[Concatenate[ActivationVarianceMonitor, P], None]", guarded)


class ActivationVarianceMonitor(Callback):
    """Logs, layer by layer, whether the signal and its gradient stay healthy while a model trains.

    On the first step and every n-th after it, hooks measure each layer's output and the gradient that comes back;
    the numbers of all ranks and micro-batches are added up and written to every logger of the Trainer:

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
    ``histogram``              of the output, in TensorBoard: 64 bins, powers of two of either sign
    ========================== ================================================================================

    Training is bit-identical with and without it; under ``torch.compile`` logged steps run eagerly and may differ
    by rounding. If the monitor itself fails, it says so once and switches off on all ranks. Aggregates such as
    ``gradient_norm/total`` are in ``trainer.callback_metrics``, for ``EarlyStopping`` and ``ModelCheckpoint``.

    Args:
        every_n_steps: steps from one logged step to the next, counting from step 0; None: the Trainer's
            ``log_every_n_steps``.
        layers: globs on layer names; None: every layer. A layer is a module that owns parameters or an activation.
        stats: the statistics; None: the first table. "default" may be a member, so that others can be added.

    Raises:
        ValueError: ``every_n_steps`` is not a whole number above 0, a statistic does not exist; at the start of
            ``fit``, a glob that matches no layer.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        layers: list[str] | None = None,
        stats: list[StatName] | None = None,
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
        self._latest: dict[str, float] = {}
        self._run: FitSession | None = None

    @property
    def latest(self) -> dict[str, float]:
        """The last logged step's numbers by tag, the same on every rank."""
        return dict(self._latest)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers. Wrong globs stop here; nothing is attached before a logged step begins."""
        self._end_run()
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
            self._run = FitSession(Recorder([], self.stats, device), interval)
            self._run.recorder.fail("finding the layers", error)
        else:
            self._run = FitSession(Recorder(select_layers(layers, self.layers), self.stats, device), interval)

    @_harmless
    def on_train_batch_start(
        self, run: FitSession, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to listen if this micro-batch belongs to a logged step."""
        run.stop_listening()
        step = _lightning.step_number(trainer)
        if step % run.interval:
            run.step = None
            return
        run.gradients_taken, begins = False, step != run.step
        run.step = step  # before anything can fail: a rank that fails still comes to the exchange
        if begins:
            run.recorder.start()
        if run.recorder.local_error is None:
            run.listen(pl_module)

    @_harmless
    def on_before_backward(self, run: FitSession, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """From the loss on, gradients count. The forward pass is over, unless the user decides when."""
        run.backward_announced = True
        if run.listening:
            run.forward_open = not pl_module.automatic_optimization
            scale = _lightning.loss_scale(trainer)
            share = 1.0 / _lightning.data_parallel_size(trainer)
            run.recorder.collector.gradient_factor = share if scale is None else share / scale

    @_harmless
    def on_after_backward(self, run: FitSession, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients of other backward passes are not the loss's."""
        run.recorder.collector.gradient_factor = None

    @_harmless
    def on_before_optimizer_step(
        self, run: FitSession, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are accumulated, averaged and unscaled now, and not yet clipped."""
        if run.step is None or run.gradients_taken:
            return
        run.gradients_taken = pl_module.automatic_optimization  # LBFGS evaluates again: its first evaluation counts
        run.listening = not run.gradients_taken
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def unscaling() -> float | Tensor:
            scale = _lightning.loss_scale(trainer) if _lightning.unscales_in_step(optimizer) else None
            return 1.0 if scale is None else 1.0 / scale

        if run.recorder.norms.needs_post_step:
            run.after_optimizer_step(optimizer, lambda: run.recorder.after_step(parameters))
        run.recorder.before_step(parameters, unscaling)

    @_harmless
    def on_train_batch_end(
        self, run: FitSession, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening; after the last micro-batch of a logged step, exchange and write."""
        run.stop_listening()
        step = _lightning.step_number(trainer)
        if step != run.step or not _lightning.step_ends_with_this_batch(trainer):
            return
        run.step = None
        if run.recorder.collector.unannounced_gradients and not run.backward_announced:
            run.warn_once(
                "backward",
                "sees no gradients, because loss.backward() is called directly: call self.manual_backward(loss).",
            )
        try:
            if (stats := run.recorder.exchange()) is not None:
                self._publish(run, trainer, stats, step)
        except Exception as error:
            run.recorder.fail("writing", error)
        # what failed behind the collective is said now, though the other ranks hear of it only at the next one
        run.report(run.recorder.disabled_reason or run.recorder.local_error)

    @_harmless
    def on_train_epoch_end(self, run: FitSession, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also an epoch that ended in the middle of a batch leaves nothing behind."""
        run.stop_listening()

    @_harmless
    def on_train_end(self, run: FitSession, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was left to say, if no further exchange came."""
        run.report(run.recorder.local_error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing stays behind, also where a run ended before it began."""
        self._end_run()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing stays behind: after an exception, no teardown comes."""
        self._end_run()

    def __getstate__(self) -> dict[str, Any]:
        """Without the run in progress, whose hooks and weak references belong to this process."""
        return {**self.__dict__, "_run": None}

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.stop_listening()
        self._run = None

    def _publish(self, run: FitSession, trainer: Trainer, stats: LayerStats, step: int) -> None:
        tags = stats.tags
        if _lightning.loss_scale(trainer) is not None and not _gradients_are_finite(tags):
            run.warn_once(
                "overflow",
                f"leaves out the gradient statistics of step {step} and others like it: the loss scale overflowed, "
                "as it does while it adapts, and the optimizer skips the step.",
            )
            tags = {tag: value for tag, value in tags.items() if not tag.startswith("gradient_")}
        self._latest = tags
        aggregates = _aggregates(tags, stats)
        tensors = torch.tensor(list(aggregates.values()), device=trainer.strategy.root_device)
        trainer.callback_metrics.update(zip(aggregates, tensors.unbind(), strict=True))
        if trainer.is_global_zero:
            if run.board is None:
                run.board = self._new_board(run, trainer)
            run.board.write(tags, step, stats.histograms)

    def _new_board(self, run: FitSession, trainer: Trainer) -> Board:
        if silent := run.recorder.silent_layers:
            run.warn_once(
                "silent",
                "saw no output of these layers in the first logged step (not called, or sparse, nested, complex, or "
                f"under torch.func): {_listed(silent)}.",
            )
        if partial := run.recorder.collector.partial:
            run.warn_once("partial", f"leaves out partial sums, which no rank holds whole: {_listed(list(partial))}.")
        board = Board(trainer.loggers)
        board.write_layout(self.stats)
        return board


def _aggregates(tags: dict[str, float], stats: LayerStats) -> dict[str, float]:
    """What callbacks such as EarlyStopping can watch: the total norm, and each statistic's extremes over layers."""
    total = "gradient_norm/total"
    found = {total: tags[total]} if total in tags else {}
    for stat in ("activation_variance", "signal_variance", "gradient_variance", "dead_units"):
        row = stats.values.get(stat)
        if row and f"{stat}/{next(iter(row))}" in tags:
            found[f"{stat}/min"], found[f"{stat}/max"] = min(row.values()), max(row.values())
    return found


def _gradients_are_finite(tags: dict[str, float]) -> bool:
    return all(math.isfinite(value) for tag, value in tags.items() if tag.startswith("gradient_"))


def _listed(names: list[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(map(repr, names[:limit])) + (f" and {rest} more" if rest > 0 else "")
