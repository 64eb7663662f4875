"""Does ``InitCallback`` ever make a model worse than its author left it? Trains a zoo of small models, with and without.

Every model is trained as its author drew it and, from the same seeds and on the same batches in the same order, as
``InitCallback`` draws it. What counts is the mean training loss over the last tenth of the steps; beside it, in
brackets, stands the loss on a fifth of the data that was held out. A scheme is *worse* or *better* where the means over
the seeds differ by more than three standard errors of their difference, and by more than 2 % of the author's loss and a
thousandth of the loss before training. *Refused* is a fit that the callback would not begin, with its reason below.

``python -m benchmarks.never_worse --out docs/never_worse.md`` takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import io
import logging
import math
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.zoo.case import Batch, Case
from benchmarks.zoo.cases import CASES
from lightning_init import InitCallback

OWN = "own"
"""The arm without the callback."""

SIGNIFICANT = 3
"""Standard errors of a difference that chance does not explain."""

NOTEWORTHY = 0.02
"""Share of the author's loss below which a difference does not matter, however certain it is."""

RESOLVED = 1e-3
"""Share of the loss before training below which two losses are both nothing."""


class Job(NamedTuple):
    """One training: a model of the zoo, its author's weights or a scheme's, a seed, and how many steps."""

    case: str
    arm: str
    seed: int
    steps: int


@dataclass
class Outcome:
    """What came of a training.

    Attributes:
        first: loss of the first step.
        last: mean loss over the last tenth of the steps.
        held_out: loss on what was held out; NaN where it did not get there.
        refusal: why the callback would not begin.
        failure: what else went wrong.
    """

    first: float = math.nan
    last: float = math.nan
    held_out: float = math.nan
    refusal: str = ""
    failure: str = ""


class Lesson(LightningModule):
    """A model of the zoo with its loss and its optimizer; keeps the loss of every step."""

    def __init__(self, network: nn.Module, case: Case) -> None:
        super().__init__()
        self.network = network
        self.case = case
        self.losses: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.case.loss(self.network, batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.case.optimizer(trained, lr=self.case.learning_rate)


class Batches:
    """The same batches in the same order for every arm; the last fifth of the data is not among them."""

    def __init__(self, case: Case, steps: int, seed: int) -> None:
        self.data = case.data()
        self.num_seen = len(self.data[0]) * 4 // 5
        generator = torch.Generator().manual_seed(seed)
        self.chosen = torch.randint(self.num_seen, (steps, case.batch_size), generator=generator)

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Batch]:
        return (tuple(tensor[row] for tensor in self.data) for row in self.chosen)

    def held_out(self) -> Batch:
        """At most 512 samples that training never sees."""
        return tuple(tensor[self.num_seen :][:512] for tensor in self.data)


def train(job: Job) -> Outcome:
    """One training in a real Trainer; what is wrong with it is part of the outcome."""
    case = next(case for case in CASES if case.name == job.case)
    torch.manual_seed(job.seed)
    lesson = Lesson(case.build(), case)
    batches = Batches(case, job.steps, job.seed)
    callback = None if job.arm == OWN else InitCallback(job.arm, seed=job.seed)
    torch.manual_seed(job.seed)  # noise that a loss adds is the same for every arm
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the callback's report
            trainer_for(callback).fit(lesson, batches)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        is_refused = callback is not None and callback.report is None and isinstance(error, (TypeError, ValueError))
        return Outcome(refusal=reason) if is_refused else Outcome(failure=reason)
    losses = [float(loss) for loss in lesson.losses]
    last = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    failure = "" if math.isfinite(last) else f"the loss is {last}"
    return Outcome(losses[0], last, held_out_loss(lesson, batches), failure=failure)


def trainer_for(callback: InitCallback | None) -> Trainer:
    """One epoch of whatever there is, on the CPU, and nothing else."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def held_out_loss(lesson: Lesson, batches: Batches) -> float:
    """After training, in evaluation mode. With gradients, for losses that are made of them."""
    lesson.eval()
    torch.manual_seed(0)
    return float(lesson.case.loss(lesson.network, batches.held_out()).detach())


@dataclass
class Arm:
    """All trainings of a model from one kind of first weights, a seed each."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Of the last losses."""
        return statistics.fmean(outcome.last for outcome in self.outcomes)

    @property
    def variance(self) -> float:
        """Of the last losses between seeds."""
        return statistics.variance(outcome.last for outcome in self.outcomes) if len(self.outcomes) > 1 else 0.0

    @property
    def text(self) -> str:
        """For the table."""
        if any(outcome.failure or outcome.refusal for outcome in self.outcomes):
            return "–"
        held_out = statistics.fmean(outcome.held_out for outcome in self.outcomes)
        return f"{self.mean:.3g} ({held_out:.3g})"


def verdict(own: Arm, other: Arm) -> str:
    """``worse``, ``same`` or ``better`` than the author's own; ``refused`` or ``failed`` if any seed was.

    >>> def arm(*losses): return Arm([Outcome(first=2.3, last=loss) for loss in losses])
    >>> verdict(arm(0.50, 0.52, 0.48), arm(0.60, 0.62, 0.61))
    'worse'
    >>> verdict(arm(0.50, 0.52, 0.48), arm(0.54, 0.46, 0.50))
    'same'
    >>> verdict(arm(0.001, 0.001, 0.001), arm(0.003, 0.003, 0.003))  # both learned it
    'same'
    """
    outcomes = [*own.outcomes, *other.outcomes]
    if any(outcome.failure for outcome in outcomes):
        return "failed"
    if any(outcome.refusal for outcome in outcomes):
        return "refused"
    error = math.sqrt((own.variance + other.variance) / len(own.outcomes))
    before = statistics.fmean(abs(outcome.first) for outcome in own.outcomes)
    limit = max(SIGNIFICANT * error, NOTEWORTHY * abs(own.mean), RESOLVED * before)
    difference = other.mean - own.mean
    return "same" if abs(difference) <= limit else "worse" if difference > 0 else "better"


Results = dict[str, dict[str, Arm]]
"""By model and arm."""


def train_all(jobs: Sequence[Job], workers: int) -> Results:
    """Every job, on so many processes of one thread each; in this one if that is one."""
    results: Results = defaultdict(lambda: defaultdict(Arm))
    for job, outcome in zip(jobs, _outcomes(jobs, workers), strict=True):
        results[job.case][job.arm].outcomes.append(outcome)
    return results


def _outcomes(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        prepare()
        yield from map(train, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, prepare) as pool:
        yield from pool.imap(train, jobs)


def prepare() -> None:
    """One thread, so that two trainings don't disturb each other and sums are the same everywhere; no chatter."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")


def as_markdown(cases: Iterable[Case], schemes: Sequence[str], results: Results) -> str:
    """The table, a line that sums it up for each scheme, and why anything was refused or failed."""
    lines = [
        f"| model | what its author did | {OWN} | {' | '.join(schemes)} |",
        "|---|---|" + "---:|" * (1 + len(schemes)),
    ]
    verdicts: dict[str, list[str]] = {scheme: [] for scheme in schemes}
    notes = []
    for case in cases:
        arms = results[case.name]
        cells = [arms[OWN].text]
        for scheme in schemes:
            word = verdict(arms[OWN], arms[scheme])
            verdicts[scheme].append(word)
            cells.append(f"{arms[scheme].text} {word if word in ('same', 'better') else f'**{word}**'}")
        lines.append(f"| {case.name} | {case.kind} | {' | '.join(cells)} |")
        notes += [f"- {case.name}, {arm}: {text}" for arm, text in _troubles(arms)]
    for scheme, words in verdicts.items():
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("better", "same", "worse", "refused", "failed"))
        lines += ["", f"`{scheme}`: {counts}; of {len(words)} models."]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _troubles(arms: dict[str, Arm]) -> list[tuple[str, str]]:
    """What was refused and what failed, by arm, in one line each."""
    return [
        (arm, " ".join((outcome.refusal or outcome.failure).split())[:400])
        for arm, held in arms.items()
        for outcome in held.outcomes[:1]
        if outcome.refusal or outcome.failure
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train them all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="a glob on their names")
    parser.add_argument("--schemes", nargs="+", default=["he_normal", "torch_default"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, a training in each")
    parser.add_argument("--out", type=Path, help="write the page there too")
    asked = parser.parse_args(arguments)
    cases = [case for case in CASES if fnmatch.fnmatchcase(case.name, asked.models)]
    if not cases:
        parser.error(f"no model is called {asked.models!r}; there are: {', '.join(case.name for case in CASES)}")
    jobs = [
        Job(case.name, arm, seed, max(2, round(case.steps * asked.steps_scale)))
        for case in cases
        for seed in range(asked.seeds)
        for arm in (OWN, *asked.schemes)
    ]
    start = time.perf_counter()
    table = as_markdown(cases, asked.schemes, train_all(jobs, asked.workers))
    print(table)
    seconds = time.perf_counter() - start
    print(f"\n{len(jobs)} trainings in {seconds:.0f} s")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(f"{page_head(asked.seeds, len(jobs), seconds)}\n\n{table}\n")


def page_head(seeds: int, trainings: int, seconds: float) -> str:
    """What the table shows, when and where it was measured."""
    return f"# Never worse than its author left it\n\n{__doc__}\n" + (
        f"{datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores, torch {torch.__version__.split('+')[0]}, "
        f"{seeds} seeds, {trainings} trainings in {seconds / 60:.0f} minutes."
    )


if __name__ == "__main__":
    main()
