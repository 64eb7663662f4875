"""LightningCLI with this package's two callbacks as blocks of the YAML and as flags: the ``lightning-init`` command."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from lightning_init.callbacks.init import InitCallback
from lightning_init.callbacks.monitor import ActivationVarianceMonitor
from lightning_init.cli.errors import explain
from lightning_init.initialization.rules import Rule
from lightning_init.schemes.scheme import Scheme

BLOCKS: dict[str, type[Callback]] = {"init": InitCallback, "monitor": ActivationVarianceMonitor}
"""The keys that this CLI adds to ``trainer``, ``model`` and ``data``, and the callback that each one makes."""


class InitArgumentParser(LightningArgumentParser):
    """A parser that reports a wrong argument in one line: what was given, what is allowed, what was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line on stderr and exit with status 2.

        The parsers of nested values raise instead: jsonargparse tries with them which of several types fits.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        program = self.prog.replace(" [options]", "")
        self.exit(2, f"{program}: error: {explain(message, self.known_keys())}\n")
        raise SystemExit(2)  # pragma: no cover - exit() does not return; mypy cannot know

    def known_keys(self) -> list[str]:
        """Every dotted key of this parser and its subcommands, such as ``trainer.max_epochs``."""
        keys = [action.dest for action in self._actions if action.option_strings]
        for action in self._actions:
            for parser in action.choices.values() if isinstance(action.choices, dict) else ():
                keys += parser.known_keys()
        return [key for key in dict.fromkeys(keys) if not key.endswith("help")]


class InitCLI(LightningCLI):
    """:class:`~lightning.pytorch.cli.LightningCLI` with an ``init`` and a ``monitor`` block.

    Each block lists the arguments of its callback; without the block, or where it is ``null``, there is no callback.
    The same as flags: ``--init.scheme he_normal``, ``--monitor.every_n_steps 10``; ``--init`` or ``--monitor`` alone
    makes the callback with its defaults. A block replaces a callback of its class in ``trainer.callbacks`` and in
    ``trainer_defaults``, so that the command line can change what a file or a script has set.

    Source: the flags follow https://lightning.ai/docs/pytorch/stable/cli/lightning_cli_expert.html.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take LightningCLI's arguments; two defaults differ: the parser, and that a saved config is overwritten."""
        kwargs.setdefault("parser_class", InitArgumentParser)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})  # so that the same command works twice
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the two blocks: as arguments of an optional type, because a group of arguments would always be made."""
        for key, callback_class in BLOCKS.items():
            parser.add_argument(
                f"--{key}",
                type=callback_class | None,
                default=None,
                nargs="?",
                const={},
                help=f"{callback_class.__name__}: its arguments as --{key}.NAME VALUE; off when not given",
            )

    def before_instantiate_classes(self) -> None:
        """Make an error of one of this package's constructors one line instead of a traceback."""
        for made_from_config in (*BLOCKS.values(), Rule, Scheme):
            self.parser.add_instantiator(self._construct, made_from_config, subclasses=True)
        super().before_instantiate_classes()

    def _construct(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return class_type(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self._parser(self.subcommand).error(f"{class_type.__name__}: {error}", error)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; what this package itself refuses, such as a rule that matches nothing, is one line."""
        try:
            super()._run_subcommand(subcommand)
        except (TypeError, ValueError) as error:
            if not _is_raised_by_this_package(error):
                raise
            self._parser(subcommand).error(" ".join(str(error).split()), error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer with the callbacks of the blocks, in place of others of the same class."""
        blocks = {key: self._get(self.config_init, key) for key in BLOCKS}
        made = [callback for callback in blocks.values() if callback is not None]
        trainer = self._get(self.config_init, "trainer", default={})
        listed = as_list(kwargs.pop("callbacks", trainer.get("callbacks")))
        for key, callback in blocks.items():
            if type(callback) in map(type, listed):
                rank_zero_warn(f"`{key}` takes the place of the {type(callback).__name__} in trainer.callbacks")
        listed = without(listed, made) + made
        # Lightning appends these itself: two stateful callbacks of one class would raise there.
        defaults = as_list(self.trainer_defaults.get("callbacks"))
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": without(defaults, listed)}
        return super().instantiate_trainer(callbacks=listed, **kwargs)


def _is_raised_by_this_package(error: BaseException) -> bool:
    """Whether it was raised here, and not by a model's code that was called from here."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("lightning_init.")


def without(callbacks: list[Callback], others: list[Callback]) -> list[Callback]:
    """``callbacks`` without those of this package's two classes of which ``others`` has one as well."""
    taken = {type(other) for other in others} & set(BLOCKS.values())
    return [callback for callback in callbacks if type(callback) not in taken]


def as_list(callbacks: Callback | list[Callback] | None) -> list[Callback]:
    """A new list of what Lightning accepts as ``callbacks``: None, one callback or a list of them."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list) else [callbacks]


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-init fit | validate | test | predict``; models and data are given by their ``class_path``.

    The working directory is added to ``sys.path``, as ``python -m`` does, so that classes in its files can be given
    too: a console script has only its own directory there. Processes that Lightning starts for DDP call this as well.
    """
    sys.path.insert(0, os.getcwd())
    InitCLI(args=args)
