"""The ``init`` and ``monitor`` blocks, the flags, and errors of one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_init import SCHEMES, ActivationVarianceMonitor, InitCallback, InitCLI
from lightning_init.cli.init_cli import main
from tests.support.models import DigitsMLP

QUIET = {
    "accelerator": "cpu",
    "max_steps": 1,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# Lightning 2.6 calls what jsonargparse 4 has renamed; main() lets jsonargparse say so, tests would fail on it.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
IN_LIST = {"class_path": "lightning_init.InitCallback", "init_args": {"scheme": "lecun_normal"}}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it sees arguments on the command line beside those it is given."""
    monkeypatch.setattr(sys, "argv", ["lightning-init"])


def arguments(*flags: str, **blocks: Any) -> list[str]:
    """``fit`` with a YAML of these blocks, and these flags after it."""
    config = {
        "seed_everything": 1,
        "model": {"class_path": "tests.support.models.DigitsMLP"},
        "trainer": QUIET,
        **blocks,
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config=run.yaml", *flags]


def fit(*flags: str, **blocks: Any) -> InitCLI:
    """One step of training from these blocks and flags."""
    return InitCLI(args=arguments(*flags, **blocks), save_config_callback=None)


def scheme_of(cli: InitCLI) -> str | None:
    """What the one InitCallback's report says it drew; None without a callback."""
    found = [callback for callback in cli.trainer.callbacks if isinstance(callback, InitCallback)]
    assert len(found) <= 1
    if not found:
        return None
    assert found[0].report is not None
    return found[0].report.scheme


def interval_of(cli: InitCLI) -> int | None:
    """The one monitor's ``every_n_steps``; None without a monitor."""
    found = [callback for callback in cli.trainer.callbacks if isinstance(callback, ActivationVarianceMonitor)]
    assert len(found) <= 1
    return found[0].every_n_steps if found else None


with_monitor = pytest.mark.filterwarnings("ignore:ActivationVarianceMonitor.*logger:UserWarning")


def test_callback_is_absent_without_its_block() -> None:
    cli = fit()
    assert scheme_of(cli) is None
    assert interval_of(cli) is None


@with_monitor
@pytest.mark.parametrize(
    ("flags", "blocks", "scheme", "interval"),
    [
        ([], {"init": {"scheme": "xavier_normal"}, "monitor": {"every_n_steps": 3}}, "xavier_normal", 3),
        (["--init.scheme=xavier_normal", "--monitor.every_n_steps=3"], {}, "xavier_normal", 3),
        (["--init.scheme", "zeros"], {"init": {"scheme": "ones"}, "monitor": {"every_n_steps": 2}}, "zeros", 2),
        (["--monitor=null"], {"init": {"scheme": "ones"}, "monitor": {"every_n_steps": 2}}, "ones", None),
        (["--init=null", "--monitor.every_n_steps=5"], {"init": {"scheme": "ones"}}, None, 5),
        ([], {"init": None, "monitor": {"every_n_steps": 7}}, None, 7),
    ],
)
def test_blocks_and_flags(flags: list[str], blocks: dict[str, Any], scheme: str | None, interval: int | None) -> None:
    cli = fit(*flags, **blocks)
    assert scheme_of(cli) == scheme
    assert interval_of(cli) == interval


@with_monitor
def test_flags_without_a_value_stand_for_the_defaults() -> None:
    cli = fit("--init", "--monitor")
    assert scheme_of(cli) == "auto"
    assert any(isinstance(callback, ActivationVarianceMonitor) for callback in cli.trainer.callbacks)


def test_init_block_initialises_the_model() -> None:
    cli = fit("--init.scheme=zeros", "--init.rules=[{pattern: '*.4.weight', scheme: ones}]", "--model.learning_rate=0")
    weights = {name: p.detach() for name, p in cli.model.named_parameters() if name.endswith("weight")}
    assert weights.pop("network.4.weight").eq(1).all()
    assert all(weight.eq(0).all() for weight in weights.values())


def test_rules_and_scheme_classes_in_yaml() -> None:
    narrow = {"class_path": "lightning_init.Normal", "init_args": {"std": 1e-3}}
    cli = fit(init={"scheme": narrow, "rules": [{"pattern": "network.0.*", "scheme": "keep"}]})
    [callback] = [callback for callback in cli.trainer.callbacks if isinstance(callback, InitCallback)]
    assert callback.report is not None
    assert {entry.name for entry in callback.report.left_alone} == {"network.0.weight", "network.0.bias"}
    assert {entry.target_std for entry in callback.report.drawn if entry.name.endswith("weight")} == {1e-3}


def test_callback_in_the_list_is_used() -> None:
    assert scheme_of(fit(trainer={**QUIET, "callbacks": [IN_LIST]})) == "lecun_normal"
    assert scheme_of(fit(trainer={**QUIET, "callbacks": IN_LIST})) == "lecun_normal"


def test_block_replaces_the_callback_in_the_list() -> None:
    with pytest.warns(UserWarning, match="`init` takes the place of the InitCallback in trainer.callbacks"):
        cli = fit("--init.scheme=ones", trainer={**QUIET, "callbacks": [IN_LIST]})
    assert scheme_of(cli) == "ones"


@pytest.mark.parametrize(
    ("blocks", "scheme"),
    [
        ({}, "zeros"),
        ({"trainer": {**QUIET, "callbacks": [IN_LIST]}}, "lecun_normal"),
        ({"init": {"scheme": "ones"}}, "ones"),
    ],
)
def test_default_of_the_script_is_overridden(blocks: dict[str, Any], scheme: str) -> None:
    defaults = {"callbacks": [InitCallback("zeros")]}
    cli = InitCLI(args=arguments(**blocks), save_config_callback=None, trainer_defaults=defaults)
    assert scheme_of(cli) == scheme
    assert len(defaults["callbacks"]) == 1  # the script's own dictionary is left as it was


def test_config_saved_by_a_run_starts_the_same_run() -> None:
    trainer = {**QUIET, "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "first"}}}
    first = InitCLI(args=arguments(init={"scheme": "xavier_normal"}, monitor={}, trainer=trainer))
    [saved] = Path("first").rglob("config.yaml")
    again = InitCLI(args=["fit", f"--config={saved}", "--trainer.logger.save_dir=second"])
    assert scheme_of(again) == "xavier_normal"
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


ALL_SCHEMES = ", ".join(SCHEMES)
WRONG = [
    (
        ["--init.scheme=he_nrmal"],
        {},
        f"init.scheme: 'he_nrmal' is not one of {ALL_SCHEMES}; did you mean 'he_normal'?",
    ),
    ([], {"init": {"when": "never"}}, "init.when: 'never' is not one of fresh, always"),
    (
        ["--init.shceme=zeros"],
        {},
        "init: InitCallback has no argument 'shceme', only scheme, rules, activation, bias, seed, when, trained, head, "
        "strict, calibrate; did you mean 'scheme'?",
    ),
    (
        [],
        {"init": {"rules": [{"patern": "*", "scheme": "keep"}]}},
        "init.rules: Rule has no argument 'patern', only pattern, scheme, gain; did you mean 'pattern'?",
    ),
    (
        [],
        {"init": {"scheme": {"class_path": "lightning_init.Normal", "init_args": {"sdt": 1}}}},
        "init.scheme: Normal has no argument 'sdt', only std, mean; did you mean 'std'?",
    ),
    (
        [],
        {"init": {"scheme": {"class_path": "lightning_init.Normal", "init_args": {"std": -1}}}},
        "Normal: Normal(std) must be a finite number above 0, got -1.0",
    ),
    (["--monitor.every_n_steps=often"], {}, "monitor.every_n_steps: 'often' is not of type int or null"),
    (
        ["--monitor.every_n_steps=-1"],
        {},
        "ActivationVarianceMonitor: every_n_steps must be a whole number above 0, "
        "or None for the Trainer's log_every_n_steps; got -1",
    ),
    (["--monitr.every_n_steps=1"], {}, "unknown option 'monitr.every_n_steps'; did you mean 'monitor'?"),
    ([], {"intt": {"scheme": "zeros"}}, "unknown option 'intt.scheme'; did you mean 'init'?"),
    (
        [],
        {"trainer": {**QUIET, "max_epoch": 1}},
        "unknown option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
    ),
    (["--trainer.init.scheme=zeros"], {}, "unknown option 'trainer.init.scheme'; did you mean 'init.scheme'?"),
    (
        ["--init.rules=[[head.weight, zeros]]"],
        {},
        "init.rules: a rule is {pattern: head.weight, scheme: zeros}, got ['head.weight', 'zeros']",
    ),
    (["--trainer.max_epochs=ten"], {}, "trainer.max_epochs: 'ten' is not of type int or null"),
    (
        [],
        {"trainer": {**QUIET, "callbacks": [{**IN_LIST, "init_args": {"scheme": "he"}}]}},
        f"trainer.callbacks.scheme: 'he' is not one of {ALL_SCHEMES}",
    ),
]


@pytest.mark.parametrize(("flags", "blocks", "line"), WRONG, ids=[line[:40] for _, _, line in WRONG])
def test_mistakes_are_explained_in_one_line(
    flags: list[str], blocks: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        fit(*flags, **blocks)
    assert exit_.value.code == 2
    [*_, last] = capsys.readouterr().err.splitlines()
    assert last.partition("error: ")[2] == line


WRONG_FOR_THE_MODEL = [
    (
        {"init": {"rules": [{"pattern": "haed.weight", "scheme": "zeros"}]}},
        r"rule 'haed.weight' matches none of the model's \d+ parameters; nearest names: .*",
    ),
    (
        {"init": {"rules": [{"pattern": "*", "scheme": "keep"}, {"pattern": "*.bias", "scheme": "zeros"}]}},
        r"rule '\*.bias' never applies: rule '\*' stands before it .*",
    ),
]


@pytest.mark.parametrize(("blocks", "line"), WRONG_FOR_THE_MODEL, ids=["nothing", "never"])
def test_mistakes_that_only_the_model_shows_are_one_line(
    blocks: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        fit(**blocks)
    assert exit_.value.code == 2
    [*_, last] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, last.partition("error: ")[2])


def test_same_command_works_twice() -> None:
    trainer = {**QUIET, "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "version": ""}}}
    for _ in range(2):
        InitCLI(args=arguments(init={}, trainer=trainer))


class Refuses(DigitsMLP):
    def __init__(self) -> None:
        raise ValueError("a model's own reason")


def test_errors_of_the_users_own_code_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a model's own reason"):
        fit(model={"class_path": "tests.cli.test_init_cli.Refuses"})


def test_main_finds_classes_beside_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text("from tests.support.models import DigitsMLP\nclass Mine(DigitsMLP): ...\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(arguments("--trainer.fast_dev_run=true", model={"class_path": "mine.Mine"}))
    assert "mine" in sys.modules


@pytest.mark.processes
def test_module_is_run_like_the_command() -> None:
    """``python -m lightning_init.cli``: a fit, and an error in one line."""
    model = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    command = [sys.executable, "-m", "lightning_init.cli", *arguments("--init.scheme=xavier_normal", model=model)]
    fitted = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert fitted.returncode == 0, fitted.stderr
    assert "xavier_normal" in fitted.stdout + fitted.stderr
    refused = subprocess.run([*command, "--init.scheme=he_nrmal"], capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("did you mean 'he_normal'?")
