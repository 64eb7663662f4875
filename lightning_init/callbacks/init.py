"""``InitCallback``: new weights at the start of the first fit, and at no other time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_init.callbacks import _lightning
from lightning_init.callbacks.look import look_at_first_batch
from lightning_init.callbacks.settled import settle, settle_restored, why_restored, why_settled
from lightning_init.checks import check_choice, check_integer
from lightning_init.initialization.calibration import Calibration
from lightning_init.initialization.guard import Trained
from lightning_init.initialization.initialize import carry_out
from lightning_init.initialization.report import InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.seeds import agreed_seed
from lightning_init.introspect.sites import ParameterSite, parameter_sites
from lightning_init.schemes.named import SchemeName
from lightning_init.schemes.scheme import Scheme
from lightning_init.show.loggers import write_text

When = Literal["fresh", "always"]


class InitCallback(Callback):
    """Initialise the model at the start of fit: the right weights, the same on any number of devices.

    With ``when="fresh"`` it draws once, at the first fit of a module that was not restored from a checkpoint:
    resuming, a second ``fit``, finders and averages keep their weights. A model that shows signs of training is
    refused. The report is printed on rank zero and logged to TensorBoard as text.

    Args:
        scheme: a name of ``SCHEMES`` or a scheme object.
        rules: ahead of the scheme; the first that matches a parameter wins.
        activation: the nonlinearity that feeds the layers ("relu", "gelu" …): its gain replaces the scheme's own.
        bias: one value for all biases; None: the scheme's own (0; PyTorch's for ``torch_default``; 1 for the
            LSTM's forget gate).
        seed: any integer; None: that of ``seed_everything``, else of ``torch.manual_seed``, else one drawn once; all
            ranks take rank 0's.
        when: ``"fresh"``: once for each module; ``"always"``: at every fit. Never over a restored checkpoint.
        trained: what to do where weights show signs of training: ``"refuse"``: an error that names them; ``"keep"``:
            those layers stay, and the rest, such as a new head, is drawn; ``"overwrite"``: everything is drawn.
        head: a scheme for the weights that give the model's outputs, such as ``"zeros"``; None: as for all others. One
            batch through the training step shows which they are, and leaves nothing behind.
        strict: an error, in place of a line in the report, if parameters are of a module type that is not known.
        calibrate: scale the weights on the first batch, in one more call of the training step, so that what comes out
            of every layer has its target variance: True, the one that fits the depth, or a :class:`Calibration`.

    Attributes:
        report: what was done to every parameter; None before it happened.

    Raises:
        ValueError: when made: an unknown scheme, activation or ``when``, a bias that is not finite. At fit start:
            a rule that matches no parameter, signs of training, a strategy that would lose the weights.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        scheme: SchemeName | Scheme = "auto",
        rules: list[Rule] | None = None,
        activation: str | None = None,
        bias: float | None = None,
        seed: int | None = None,
        when: When = "fresh",
        trained: Trained = "refuse",
        head: SchemeName | Scheme | None = None,
        strict: bool = False,
        calibrate: bool | Calibration = False,
    ) -> None:
        check_choice("when", when, get_args(When))
        check_choice("trained", trained, get_args(Trained))
        if seed is not None:
            check_integer("seed", seed)
        self._own_report: InitReport | None = None
        self._latest = _LatestReport()
        self._request = Request.of(scheme, rules, activation, bias, head, strict, calibrate)
        self._seed = None if seed is None else int(seed)
        self._last_seed: int | None = None
        self._when = when
        self._trained: Trained = trained
        self._is_decided = False
        self._has_seen_checkpoint = False

    @property
    def report(self) -> InitReport | None:
        """What was done to every parameter; where libraries copy their callbacks, what the latest copy did."""
        return self._own_report or self._latest.report

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that would lose the weights; go ahead of callbacks that train before fit."""
        if stage != "fit":
            return
        if _lightning.is_deepspeed(trainer):
            raise ValueError(
                "InitCallback does not work with DeepSpeed: it trains copies of the weights made before fit starts, "
                "so new ones would be lost. Call lightning_init.initialize(model) in the module's __init__ instead"
            )
        _lightning.refuse_to_stay_on_meta(trainer, pl_module)
        self._is_decided = self._has_seen_checkpoint = False
        _lightning.start_meta_watch(pl_module)
        _lightning.call_before_optimizers_are_made(pl_module, partial(self._initialize_once, trainer, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialise, unless that was done before the optimizers were made, as it is in every fit of a Trainer."""
        self._initialize_once(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Weights that come from a checkpoint stay; what it does not have is drawn, such as a new head."""
        self._has_seen_checkpoint = True
        settle_restored(pl_module, checkpoint.get("state_dict"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the weights are this fit's, wherever they came from."""
        settle(pl_module, self._arguments)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module, also where fit never started."""
        _lightning.end_watches(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which does not run then."""
        _lightning.end_watches(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The seed, so that a resumed run knows what it started from. Plain numbers only."""
        return {"seed": self._seed if self._last_seed is None else self._last_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the run that is resumed; one that is given stays ahead of it."""
        self._last_seed = state_dict["seed"]

    @property
    def _arguments(self) -> object:
        """What tells this callback from one that asks for other weights."""
        return self._request, self._seed

    def _initialize_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, compare between ranks, report; or do nothing where the weights are to stay."""
        if self._is_decided:
            return
        self._is_decided = True
        was_on_meta = _lightning.end_watches(pl_module)
        if _lightning.restores_weights_before_fit_start(trainer) and not self._has_seen_checkpoint:
            settle_restored(pl_module, None)  # Lightning shows callbacks no file without states of callbacks
        is_ours = partial(why_settled, arguments=self._arguments)
        stays: Callable[[ParameterSite], str] = is_ours if self._when == "fresh" else why_restored
        sites = list(parameter_sites(pl_module))
        if not all(map(stays, sites)):
            trained = self._trained
            if self._when == "always" and any(map(is_ours, sites)):
                trained = "overwrite"  # what a fit of ours has trained is to be drawn anew
            elif trained == "refuse" and any(map(why_restored, sites)):
                trained = "keep"  # a run that goes on has to be let go on
            self._initialize(trainer, pl_module, trained, was_on_meta, stays)
        settle(pl_module, self._arguments)

    def _initialize(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        trained: Trained,
        was_on_meta: bool,
        stays: Callable[[ParameterSite], str],
    ) -> None:
        seed = agreed_seed(self._last_seed) if self._seed is None else self._seed
        report = carry_out(
            pl_module,
            self._request,
            seed,
            trained=trained,
            from_meta=was_on_meta,
            why_settled=stays,
            holders=_lightning.holders_of_copies(trainer),
            look=partial(look_at_first_batch, trainer, pl_module),
        )
        self._own_report = self._latest.report = report
        self._last_seed = seed
        self._announce(trainer, report)

    def _announce(self, trainer: Trainer, report: InitReport) -> None:
        """Print the report on rank zero and log the whole table to TensorBoard."""
        if not trainer.is_global_zero:
            return
        try:
            Console().print(report)
        except UnicodeEncodeError:  # a terminal of another time; the other ranks would wait for this one
            print(str(report).encode("ascii", "replace").decode())
        write_text(trainer.loggers, "initialization", report.to_markdown())


class _LatestReport:
    """The latest report of a callback and all its copies: libraries that copy callbacks leave the user the original."""

    report: InitReport | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _LatestReport:
        return self
