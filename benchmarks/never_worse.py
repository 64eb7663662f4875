"""Does ``InitCallback`` ever make a model worse than its author left it? A zoo of models, trained with it and without.

Every model is trained as its author drew it and, from the same seeds and on the same batches in the same order, as
``InitCallback`` draws it. What counts is the mean training loss over the last tenth of the steps; beside it, in
brackets, stands the loss on a fifth of the data that was held out. A scheme is *worse* or *better* where the means over
the seeds differ by more than three standard errors of their difference, and by more than 2 % of the author's loss and a
thousandth of the loss before training. *Refused* is a fit that the callback would not begin, with its reason below.

``python -m benchmarks.never_worse --out docs/never_worse.md`` takes about twenty minutes on two cores.
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
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo.case import Batch, Case
from benchmarks.zoo.cases import CASES
from lightning_init import InitCallback

OWN = "own"
"""The arm without the callback."""

SIGNIFICANT = 3
"""Standard errors of a difference that chance does not explain."""

NOTEWORTHY = 0.02
"""Share of the author's loss below which a difference does not matter, however certain it is."""

SEEN = 80
"""Per cent of the data that training sees."""

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


def batches_for(case: Case, steps: int, seed: int) -> DataLoader[Batch]:
    """The same batches in the same order for every arm, from a loader that the callback can look into."""
    seen = len(case.data()[0]) * SEEN // 100
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(seen, (steps, case.batch_size), generator=generator)
    return DataLoader(TensorDataset(*case.data()), batch_size=None, sampler=list(chosen))


def held_out_batches(case: Case) -> list[Batch]:
    """Batches of the samples that training never sees, of 512 samples at most or else one."""
    unseen = [tensor[len(tensor) * SEEN // 100 :][: max(case.batch_size, 512)] for tensor in case.data()]
    batches = list(zip(*(tensor.split(case.batch_size) for tensor in unseen), strict=True))
    return batches[: max(1, len(unseen[0]) // case.batch_size)]  # what is left over is no whole batch


def train(job: Job) -> Outcome:
    """One training in a real Trainer; what is wrong with it is part of the outcome."""
    case = next(case for case in CASES if case.name == job.case)
    torch.manual_seed(job.seed)
    lesson = Lesson(case.build(), case)
    callback = None if job.arm == OWN else InitCallback(job.arm, seed=job.seed)
    torch.manual_seed(job.seed)  # noise that a loss adds is the same for every arm
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the callback's report
            trainer_for(callback).fit(lesson, batches_for(case, job.steps, job.seed))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        is_refused = callback is not None and callback.report is None and isinstance(error, (TypeError, ValueError))
        return Outcome(refusal=reason) if is_refused else Outcome(failure=reason)
    losses = [float(loss) for loss in lesson.losses]
    last = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    failure = "" if math.isfinite(last) else f"the loss is {last}"
    return Outcome(losses[0], last, held_out_loss(lesson), failure=failure)


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


def held_out_loss(lesson: Lesson) -> float:
    """After training, in evaluation mode. With gradients, for losses that are made of them."""
    lesson.eval()
    torch.manual_seed(0)
    losses = [float(lesson.case.loss(lesson.network, batch).detach()) for batch in held_out_batches(lesson.case)]
    return statistics.fmean(losses)


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
    def troubles(self) -> list[str]:
        """What was refused or failed, and why, in a line each."""
        said = [outcome.refusal or outcome.failure for outcome in self.outcomes]
        return [" ".join(text.split())[:400] for text in said if text]

    @property
    def text(self) -> str:
        """For the table."""
        if self.troubles:
            return "–"
        held_out = statistics.fmean(outcome.held_out for outcome in self.outcomes)
        return f"{self.mean:.3g} ({held_out:.3g})"


def verdict(own: Arm, other: Arm) -> str:
    """``worse``, ``same`` or ``better`` than the author's own; ``refused`` or ``failed`` if any seed was."""
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


@dataclass
class Page:
    """The table, a row for each model as soon as it is trained, and what is said below it."""

    schemes: Sequence[str]
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The first two lines of the table."""
        columns = ["model", "what its author did", OWN, *self.schemes]
        return f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}"

    def row(self, case: Case, arms: Mapping[str, Arm]) -> str:
        """A line of the table; what it says is counted."""
        cells = [arms[OWN].text]
        for scheme in self.schemes:
            word = verdict(arms[OWN], arms[scheme])
            self.verdicts.setdefault(scheme, []).append(word)
            cells.append(f"{arms[scheme].text} {word if word in ('same', 'better') else f'**{word}**'}")
        for name, arm in arms.items():
            self.troubles += [f"- {case.name}, {name}: {trouble}" for trouble in arm.troubles[:1]]
        return f"| {case.name} | {case.kind} | {' | '.join(cells)} |"

    @property
    def foot(self) -> str:
        """How often each verdict was given, and why a training did not come about."""
        lines = []
        for scheme, words in self.verdicts.items():
            counts = [f"{words.count(word)} {word}" for word in ("better", "same", "worse", "refused", "failed")]
            lines += ["", f"`{scheme}`: {', '.join(counts)}; of {len(words)} models."]
        return "\n".join([*lines, *([""] if self.troubles else []), *self.troubles])


def outcomes_of(jobs: Sequence[Job], workers: int) -> Generator[Outcome, None, None]:
    """What comes of every job in turn, on so many processes of one thread each; in this one if that is one."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train them all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="a glob on their names")
    parser.add_argument("--schemes", nargs="+", default=["auto", "he_normal", "torch_default"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, a training in each")
    parser.add_argument("--out", type=Path, help="write the page there too")
    asked = parser.parse_args(arguments)
    cases = [case for case in CASES if fnmatch.fnmatchcase(case.name, asked.models)]
    if not cases:
        parser.error(f"no model is called {asked.models!r}; there are: {', '.join(case.name for case in CASES)}")
    arms = (OWN, *asked.schemes)
    jobs = [
        Job(case.name, arm, seed, max(2, round(case.steps * asked.steps_scale)))
        for case in cases
        for arm in arms
        for seed in range(asked.seeds)
    ]
    start = time.perf_counter()
    page = Page(asked.schemes)
    lines = [page.head]
    print(page.head, flush=True)
    with contextlib.closing(outcomes_of(jobs, asked.workers)) as outcomes:
        for case in cases:
            trained = {arm: Arm([next(outcomes) for _ in range(asked.seeds)]) for arm in arms}
            lines.append(page.row(case, trained))
            print(lines[-1], flush=True)
    seconds = time.perf_counter() - start
    print(f"{page.foot}\n\n{len(jobs)} trainings in {seconds:.0f} s")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text("\n".join([page_head(asked.seeds, len(jobs), seconds), "", *lines, page.foot, ""]))


def page_head(seeds: int, trainings: int, seconds: float) -> str:
    """What the table shows, when and where it was measured."""
    machine = f"{os.cpu_count()} {platform.machine()} cores, torch {torch.__version__.partition('+')[0]}"
    measured = f"{seeds} seeds, {trainings} trainings in {seconds / 60:.0f} minutes"
    return f"# Never worse than its author left it\n\n{__doc__}\n{datetime.date.today()}, {machine}, {measured}."


if __name__ == "__main__":
    main()
