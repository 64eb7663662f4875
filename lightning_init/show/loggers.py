"""Writes the statistics of a logged step: to TensorBoard as one event, to any other logger by ``log_metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from lightning_init.monitor.histograms import EDGES, Histogram
from lightning_init.monitor.statistics import STATISTICS
from lightning_init.show.event_file import use_compiled_checksums


def write_text(loggers: Iterable[Any], tag: str, text: str) -> None:
    """Write ``text``, which is Markdown, to TensorBoard's "Text" tab by each of the loggers that is TensorBoard's."""
    for logger in loggers:
        if (writer := _tensorboard_writer(logger)) is not None:
            writer.add_text(tag, text, 0)


def _names_its_own(logger: Any) -> bool:
    """Whether a TensorBoardLogger makes other tags or steps of what it is given, by a prefix or a method of its own."""
    kinds: list[Any] = [kind for kind in type(logger).__mro__ if kind.__name__ == "TensorBoardLogger"]
    if not kinds:
        return False
    return bool(getattr(logger, "_prefix", "")) or type(logger).log_metrics is not kinds[0].log_metrics


def _tensorboard_writer(logger: Any) -> SummaryWriter | None:
    """What a logger writes to TensorBoard by, whatever the logger's class; None if it is of another kind."""
    experiment = getattr(logger, "experiment", None)
    return experiment if isinstance(experiment, SummaryWriter) else None


class StatisticsWriter:
    """Writes statistics to loggers of whatever classes.

    Args:
        loggers: objects with ``log_metrics(metrics, step)``, as Lightning's are. On one rank only.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        of_loggers = [(logger, _tensorboard_writer(logger)) for logger in loggers]
        self.writers = [writer for _, writer in of_loggers if writer is not None]
        self.others = [logger for logger, writer in of_loggers if writer is None or _names_its_own(logger)]
        self._without_scalars = {id(writer) for logger, writer in of_loggers if writer and logger in self.others}
        self._failures: dict[str, Exception] = {}
        self._scalars = Summary()
        self._scalar_of: dict[str, Summary.Value] = {}

    def write_layout(self, stats: Sequence[str]) -> None:
        """Give TensorBoard's "Custom scalars" tab one chart per statistic, with a line for every layer. Once a fit.

        The total of norms has a chart of its own: it is so much larger that the layers' lines would look flat.
        """
        layout = {}
        for statistic in (STATISTICS[stat] for stat in stats):
            if statistic.shown_as == "scalar":
                charts = layout[statistic.title] = {"all layers": ["Multiline", [f"^{statistic.name}/(?!total$)"]]}
                if statistic.source == "parameters":
                    charts["total"] = ["Multiline", [f"^{statistic.name}/total$"]]
        for writer in self.writers:
            writer.add_custom_scalars(layout)

    def write(
        self, tags: Mapping[str, float], step: int, histograms: Mapping[str, Mapping[str, Histogram]] | None = None
    ) -> None:
        """Write all statistics of a step.

        TensorBoard gets all of them in one event; an event for each would cost a hundred times as much.

        Args:
            tags: numbers by name, ``statistic/layer``.
            step: number of the step.
            histograms: by statistic and layer. They go to TensorBoard only.
        """
        of_layers = [(f"{stat}/{name}", h) for stat, row in (histograms or {}).items() for name, h in row.items()]
        if self.writers and (tags or of_layers):
            summary, only_histograms = self._scalars_of(tags), Summary()
            if of_layers:
                values = [Summary.Value(tag=tag, histo=_proto(histogram)) for tag, histogram in of_layers]
                summary, only_histograms = Summary(value=[*summary.value, *values]), Summary(value=values)
            for writer in list(self.writers):
                of_writer = only_histograms if id(writer) in self._without_scalars else summary
                if of_writer.value:
                    self._attempt(writer, self.writers, partial(_add_summary, writer, of_writer, step))
        for logger in list(self.others) if tags else ():
            self._attempt(logger, self.others, partial(logger.log_metrics, dict(tags), step=step))

    def failures(self) -> dict[str, Exception]:
        """By name, the loggers that have failed since this was asked last; they get nothing any more."""
        failures, self._failures = self._failures, {}
        return failures

    def _attempt(self, logger: Any, among: list[Any], write: Callable[[], object]) -> None:
        """Write once more if it fails, then do without this logger: the others go on."""
        try:
            write()
        except Exception:
            try:
                write()
            except Exception as error:
                among.remove(logger)
                self._failures[type(logger).__name__] = error

    def _scalars_of(self, tags: Mapping[str, float]) -> Summary:
        """``tags`` as a TensorBoard message. If the tags are those of the last step, its message is filled again."""
        if self._scalar_of.keys() != tags.keys():
            self._scalars = Summary()
            self._scalar_of = {tag: self._scalars.value.add(tag=tag) for tag in tags}
        for tag, value in tags.items():
            self._scalar_of[tag].simple_value = value
        return self._scalars


def _add_summary(writer: Any, summary: Summary, step: int) -> None:
    file_writer = writer._get_file_writer()
    use_compiled_checksums(file_writer)
    file_writer.add_summary(summary, step)


def _proto(histogram: Histogram) -> HistogramProto:
    """``histogram`` as a TensorBoard message: bins with their right edges, from the first to the last with elements."""
    edges = (*EDGES, max(histogram.most, 2 * EDGES[-1]))  # the last bin has no right edge, but TensorBoard expects one
    filled = [i for i, count in enumerate(histogram.counts) if count] or [0]
    first, last = filled[0], filled[-1] + 1
    return HistogramProto(
        min=histogram.least if histogram.n else 0.0,
        max=histogram.most if histogram.n else 0.0,
        num=histogram.n,
        sum=histogram.sum,
        sum_squares=histogram.squares,
        bucket_limit=edges[first:last],
        bucket=histogram.counts[first:last],
    )
