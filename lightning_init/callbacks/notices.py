"""What the monitor tells its user: what it cannot see, why, and what to do; each once a fit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_init.callbacks import _lightning
from lightning_init.callbacks.session import FitSession
from lightning_init.checks import listed
from lightning_init.monitor.coverage import MOST_NAMES
from lightning_init.monitor.statistics import STATISTICS, LayerStats
from lightning_init.show.loggers import StatisticsWriter

_PATIENCE = 3
"""Logged steps in which something stays empty before it is said."""

_LONGEST_ACCUMULATION = 128
"""Batches within which nobody can be sure that no optimizer steps: gradients may be accumulated by hand."""


def warn_of_watchers(trainer: Trainer, stats: Sequence[str], interval: int) -> None:
    """Say what other callbacks wait for in vain, or will see the same number of several times."""
    for callback in _lightning.callbacks_of(trainer):
        watched = getattr(callback, "monitor", None)
        stat = watched.partition("/")[0] if isinstance(watched, str) else ""
        if stat not in STATISTICS:
            continue
        name = type(callback).__name__
        if stat not in stats:
            rank_zero_warn(f"{name} watches {watched!r}, but ActivationVarianceMonitor's stats are without {stat!r}.")
        elif hasattr(callback, "patience") and interval > _lightning.steps_per_epoch(trainer):
            rank_zero_warn(
                f"{name} looks at {watched!r} once an epoch, but ActivationVarianceMonitor logs every {interval} "
                "steps: its patience counts the same number again. Set every_n_steps to an epoch's steps or less."
            )


def tell_of_eager_modules(session: FitSession, module: LightningModule) -> None:
    """Say which compiled modules run eagerly in logged steps, and how they would not."""
    eager = set(session.recorder.eager_modules)
    if eager and "eager" not in session.warned:
        session.warned.add("eager")
        names = [name or "the whole model" for name, inner in module.named_modules() if inner in eager]
        rank_zero_info(
            "ActivationVarianceMonitor runs these compiled modules eagerly in logged steps, which takes their eager "
            f"memory and time: {listed(names, MOST_NAMES)}. "
            "One of whose layers none is chosen by `layers` stays compiled."
        )


def tell_of_layers(session: FitSession) -> None:
    """Say, after the first logged step, how many layers were seen, and name those that were not."""
    rank_zero_info(f"ActivationVarianceMonitor: {session.recorder.coverage}.")
    if silent := session.recorder.silent_layers:
        session.warn_once(
            "silent",
            "saw no output of these layers in the first logged step (not called, called by a function under "
            f"torch.compile or torch.func, or sparse, nested or complex): {_quoted(silent)}.",
        )
    if partial := session.recorder.partial_layers:
        session.warn_once("partial", f"leaves out partial sums, which no rank holds whole: {_quoted(partial)}.")


def warn_of_layers_left_out(session: FitSession) -> None:
    """Name the layers whose hooks have failed, while the others go on."""
    left_out = {} if session.recorder.disabled_reason else session.recorder.left_out
    for layer, why in left_out.items():
        session.warn_once(f"layer {layer}", f"leaves out {layer!r}, which cannot be measured; all others go on. {why}")


def warn_of_histograms(session: FitSession, writer: StatisticsWriter, stats: Sequence[str]) -> None:
    """Say which loggers get no histograms."""
    histograms = [stat for stat in stats if STATISTICS[stat].shown_as == "histogram"]
    if histograms and writer.others:
        session.warn_once(
            "histograms",
            f"writes {', '.join(histograms)} to TensorBoard only; "
            f"{', '.join(type(logger).__name__ for logger in writer.others)} gets all else.",
        )


def warn_of_failed_loggers(session: FitSession) -> None:
    """Name the loggers that have failed twice, while the others go on."""
    failures = session.writer.failures() if session.writer is not None else {}
    for name, error in failures.items():
        session.warn_once(
            f"logger {name}",
            f"writes nothing more to {name}, which failed twice; the other loggers go on. "
            f"{type(error).__name__}: {error}",
        )


def count_lost_gradients(session: FitSession) -> None:
    """Called at the end of a logged step: says at once if Lightning has not announced a single backward pass."""
    lost = session.recorder.lost_gradients
    session.steps_with_lost_gradients += bool(lost)
    if lost and not session.backward_announced:
        session.warn_once(
            "backward",
            "sees no gradients, because loss.backward() is called directly: call self.manual_backward(loss).",
        )


def explain_lost_gradients(session: FitSession) -> None:
    """Name the layers whose gradients have come without an announcement in several logged steps."""
    lost = session.recorder.lost_gradients
    if lost and session.steps_with_lost_gradients >= _PATIENCE:
        session.warn_once(
            "backward",
            f"has seen no gradient of {_quoted(lost)}: where one is computed by loss.backward() instead of "
            "self.manual_backward(loss), or by torch.autograd.grad, no hook tells that it is the loss's.",
        )


def count_empty_norms(session: FitSession, trainer: Trainer, stats: LayerStats, step: int) -> None:
    """Called at the end of a logged step: says it when several had a backward pass, and none a gradient's norm."""
    if stats.values.get("gradient_norm", True):
        session.norms_may_be_empty = True
    session.steps_with_backward += session.backward_in_step
    if step >= _LONGEST_ACCUMULATION:
        explain_empty_norms(session, trainer)


def explain_empty_norms(session: FitSession, trainer: Trainer) -> None:
    """Say why several logged steps had a backward pass, and none a single gradient's norm."""
    if session.norms_may_be_empty or session.steps_with_backward < _PATIENCE:
        return
    if session.logged_steps.has_stepped(trainer.optimizers):
        why = "the optimizer's parameters have no gradient when it steps"
    else:
        why = (
            "no optimizer has stepped where Lightning sees it. Call step() of what self.optimizers() returns: not "
            "of an optimizer of your own, nor with use_pl_optimizer=False, nor inside of the backward pass"
        )
    session.warn_once("norms", f"has no gradient_norm, although gradients were computed: {why}.")


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names], MOST_NAMES)
