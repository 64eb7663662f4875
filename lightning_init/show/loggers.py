"""Where a logged step's numbers go: one TensorBoard event, or any other logger's ``log_metrics``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from lightning_init.monitor.parameter_norms import KINDS_OF
from lightning_init.monitor.statistics import EDGES, Histogram
from lightning_init.show.event_file import use_compiled_checksums


class Board:
    """Writes to loggers. Knows none of them by name: an ``experiment`` that is a SummaryWriter is TensorBoard.

    Args:
        loggers: objects with ``log_metrics(metrics, step)``, as Lightning's are. On one rank only.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        loggers = list(loggers)
        experiments = [getattr(logger, "experiment", None) for logger in loggers]
        self.writers = [experiment for experiment in experiments if isinstance(experiment, SummaryWriter)]
        self.others = [
            logger
            for logger, experiment in zip(loggers, experiments, strict=True)
            if not isinstance(experiment, SummaryWriter)
        ]
        self._scalars = Summary()
        self._scalar_of: dict[str, Summary.Value] = {}

    def write_layout(self, stats: Sequence[str]) -> None:
        """Once a run: the "Custom scalars" tab gets one chart per statistic with every layer in it.

        A total norm has its own: it would press the layers' lines to the ground.
        """
        layout = {_title(stat): {"all layers": ["Multiline", [f"^{stat}/(?!total$)"]]} for stat in stats}
        layout.pop(_title("histogram"), None)
        for stat in KINDS_OF.keys() & set(stats):
            layout[_title(stat)]["total"] = ["Multiline", [f"^{stat}/total$"]]
        for writer in self.writers:
            writer.add_custom_scalars(layout)

    def write(self, tags: Mapping[str, float], step: int, histograms: Mapping[str, Histogram] | None = None) -> None:
        """All scalars of a step; in TensorBoard as one event: one each would cost a hundred times as much.

        Histograms go to TensorBoard only.
        """
        if not tags and not histograms:
            return
        if self.writers:
            summary = self._scalars_of(tags)
            if histograms:
                values = [Summary.Value(tag=f"histogram/{name}", histo=_proto(h)) for name, h in histograms.items()]
                summary = Summary(value=[*summary.value, *values])
            for writer in self.writers:
                file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
                use_compiled_checksums(file_writer)
                file_writer.add_summary(summary, step)
        for logger in self.others:
            logger.log_metrics(dict(tags), step=step)

    def _scalars_of(self, tags: Mapping[str, float]) -> Summary:
        """The scalars as TensorBoard has them; where the tags are the last step's, so are the messages."""
        if self._scalar_of.keys() != tags.keys():
            self._scalars = Summary()
            self._scalar_of = {tag: self._scalars.value.add(tag=tag) for tag in tags}
        for tag, value in tags.items():
            self._scalar_of[tag].simple_value = value
        return self._scalars


def _proto(histogram: Histogram) -> HistogramProto:
    """TensorBoard's form: bins with their right edges, from the first to the last that has elements."""
    edges = (*EDGES, 2 * EDGES[-1])  # the last bin has no end; TensorBoard wants one
    filled = [i for i, count in enumerate(histogram.counts) if count] or [0]
    first, last = filled[0], filled[-1] + 1
    return HistogramProto(
        min=edges[first - 1] if first else 2 * edges[0],
        max=edges[last - 1],
        num=histogram.n,
        sum=histogram.n * histogram.mean,
        sum_squares=histogram.n * histogram.rms**2,
        bucket_limit=edges[first:last],
        bucket=histogram.counts[first:last],
    )


def _title(stat: str) -> str:
    return stat.replace("_", " ").capitalize()
