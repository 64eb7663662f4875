"""Reading back what the monitor wrote: the scalars in a run's TensorBoard event files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass(frozen=True)
class Run:
    """The scalars of one run: ``scalars[tag][step]``."""

    directory: Path
    scalars: dict[str, dict[int, float]]

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Read every event file under ``directory``."""
        directory = Path(directory)
        if not any(directory.glob("events.out.tfevents.*")):
            raise FileNotFoundError(f"no TensorBoard event file in {directory}; train first: make demo")
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
        return cls(directory, {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]})

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint Lightning saved for this run."""
        return max(self.directory.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)

    def layers(self, stat: str) -> list[str]:
        """The layers that have this statistic, in the order they ran."""
        return [tag.partition("/")[2] for tag in self.scalars if tag.startswith(f"{stat}/") and tag != f"{stat}/total"]

    def series(self, stat: str, layer: str) -> dict[int, float]:
        return self.scalars[f"{stat}/{layer}"]
