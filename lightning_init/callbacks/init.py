"""``InitCallback``: new weights at the start of the first fit, and at no other time."""

from __future__ import annotations

import os
import secrets
import weakref
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from lightning_init.callbacks import _lightning
from lightning_init.checks import check_choice
from lightning_init.distributed.ranks import all_gather_object
from lightning_init.initialization.initialize import carry_out
from lightning_init.initialization.plan import MODULE_TYPE_UNKNOWN, make_plan
from lightning_init.initialization.report import InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.training_signs import signs_of_training
from lightning_init.initialization.write import summon_fsdp1_parameters
from lightning_init.schemes.distributions import Scheme
from lightning_init.schemes.named import SchemeName

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
        seed: any integer; None: that of ``seed_everything``, else one drawn once and agreed by all ranks.
        when: ``"fresh"``, or ``"always"``: at every fit, whatever the weights are.

    Attributes:
        report: what was done to every parameter; None before it happened.

    Raises:
        ValueError: when made: an unknown scheme, activation or ``when``, a bias that is not finite. At fit start:
            a rule that matches no parameter, signs of training, a strategy that would lose the weights.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        scheme: SchemeName | Scheme = "he_normal",
        rules: list[Rule] | None = None,
        activation: str | None = None,
        bias: float | None = None,
        seed: int | None = None,
        when: When = "fresh",
    ) -> None:
        check_choice("when", when, get_args(When))
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise TypeError(f"seed is an integer or None, got {seed!r} of type {type(seed).__name__}")
        self.report: InitReport | None = None
        self._request = Request.of(scheme, rules, activation, bias)
        self._seed = seed
        self._last_seed: int | None = None
        self._when = when
        self._settled: weakref.ref[LightningModule] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that would lose the weights; go ahead of callbacks that train before fit."""
        if stage != "fit":
            return
        if _lightning.is_deepspeed(trainer):
            raise ValueError(
                "InitCallback does not work with DeepSpeed: it trains copies of the weights made before fit starts, "
                "so new ones would be lost. Call lightning_init.initialize(model) in the module's __init__ instead"
            )
        _lightning.move_ahead_of_finders(trainer, self)
        _lightning.start_meta_watch(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, compare between ranks, report; or do nothing where the weights are to stay."""
        end_meta_watch = _lightning.end_meta_watch(pl_module)
        if self._when == "fresh":
            if self._is_settled(pl_module) or _lightning.restores_weights_before_fit_start(trainer):
                self._settle(pl_module)
                return
            if not end_meta_watch:
                self._refuse_trained(pl_module)
        if end_meta_watch:
            self._refuse_unknown(pl_module)
        self._last_seed = self._agreed_seed(trainer)
        self.report = carry_out(pl_module, self._request, self._last_seed)
        self._settle(pl_module)
        _lightning.refresh_averages(trainer, pl_module)
        self._announce(trainer, self.report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module, also where fit never started."""
        _lightning.end_meta_watch(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which does not run then."""
        _lightning.end_meta_watch(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Weights that come from a checkpoint stay."""
        self._settle(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The seed, so that a resumed run knows what it started from. Plain numbers only."""
        return {"seed": self._seed if self._last_seed is None else self._last_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the run that is resumed; one that is given stays ahead of it."""
        self._last_seed = state_dict["seed"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the weak reference to the module, which cannot be pickled."""
        return self.__dict__ | {"_settled": None}

    def _is_settled(self, module: LightningModule) -> bool:
        return self._settled is not None and self._settled() is module

    def _settle(self, module: LightningModule) -> None:
        """Remember that this module has its weights; weakly, so that the module is not kept alive."""
        self._settled = weakref.ref(module)

    def _refuse_trained(self, module: LightningModule) -> None:
        """Raise on every rank if one of them finds signs of training in what it holds."""
        with summon_fsdp1_parameters(module):
            found = signs_of_training(make_plan(module, self._request), module)
        signs = list(dict.fromkeys(sign for rank in all_gather_object(found) for sign in rank))
        if not signs:
            return
        shown = "\n".join(f"  {sign}" for sign in signs[:5])
        more = f"\n  … and {len(signs) - 5} more" if len(signs) > 5 else ""
        raise ValueError(
            f"the model shows signs of training, and new weights would destroy them:\n{shown}{more}\n"
            f"To keep these weights: rules=[{_keep_rules(signs)}], or Rule('*', 'keep') if all others are "
            "trained too. To initialise all the same: when='always'."
        )

    def _refuse_unknown(self, module: LightningModule) -> None:
        """Raise where memory that never held a value would be trained."""
        unknown = [
            assignment for assignment in make_plan(module, self._request) if assignment.reason == MODULE_TYPE_UNKNOWN
        ]
        empty = [assignment for assignment in unknown if not hasattr(assignment.site.module, "reset_parameters")]
        if empty:
            raise ValueError(
                f"{empty[0].name!r} comes from the meta device and holds uninitialised memory: its module type is "
                f"not known and has no reset_parameters. Make it known: lightning_init.{empty[0].advice}, "
                f"or give it a rule: Rule({empty[0].name!r}, Normal(std))"
            )

    def _agreed_seed(self, trainer: Trainer) -> int:
        """The seed that was given, else seed_everything's, else a random one, the same on every rank."""
        if self._seed is not None:
            return self._seed
        drawn = secrets.randbits(31) if self._last_seed is None else self._last_seed
        own = int(os.environ.get("PL_GLOBAL_SEED") or drawn)
        return int(trainer.strategy.broadcast(own))  # by all ranks, also where only some called seed_everything

    def _announce(self, trainer: Trainer, report: InitReport) -> None:
        """Print the report on rank zero and log the whole table to TensorBoard."""
        if not trainer.is_global_zero:
            return
        try:
            Console().print(report)
        except UnicodeEncodeError:  # a terminal of another time; the other ranks would wait for this one
            print(str(report).encode("ascii", "replace").decode())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("initialization", report.to_markdown(), 0)


def _keep_rules(signs: list[str]) -> str:
    """Rules to paste, one for each of the model's own attributes with a sign of training anywhere inside.

    Not narrower: the layers beside the ones that show it were trained with them.
    """
    names = [sign.split(" ")[0] for sign in signs]
    patterns = dict.fromkeys(name.partition(".")[0] + ".*" if "." in name else "*" for name in names)
    return ", ".join(f"Rule({pattern!r}, 'keep')" for pattern in patterns)
