"""InitCallback in one process: when it has to initialise, and when it has to leave the weights alone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_init import InitCallback
from tests.support.lifecycle import (
    EVERYWHERE,
    EXPECTED_WARNINGS,
    FINDERS,
    NOT_SHARDED,
    ONE_DEVICE,
    Case,
)
from tests.support.lifecycle.setting import Setting, initialized, new_callback, small_conv_net
from tests.support.models import Digits
from tests.support.modules import Pretrained, loaded
from tests.support.namespaces import Namespace, in_both_namespaces, lightning, module_class
from tests.support.trainers import make_trainer
from tests.support.weights import assert_same, weights_of

pytestmark = [pytest.mark.filterwarnings(line) for line in EXPECTED_WARNINGS]


@pytest.mark.parametrize("case", [*EVERYWHERE, *FINDERS, *NOT_SHARDED, *ONE_DEVICE], ids=lambda case: case.__name__)
@in_both_namespaces
def test_init_callback_on_one_device(case: Case, namespace: Namespace, tmp_path: Path) -> None:
    case(Setting("single", tmp_path, namespace))


@in_both_namespaces
def test_state_of_the_callback_is_primitive(namespace: Namespace, tmp_path: Path) -> None:
    """Lightning 2.6 loads checkpoints with weights_only=True: all but primitives and tensors fails."""
    path, _ = Setting("single", tmp_path, namespace).trained(new_callback())
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("InitCallback"))
    assert state


def test_callback_pickles_and_copies_after_a_fit(tmp_path: Path) -> None:
    """Spawned processes get a pickled callback; its memory of the module must not stop them."""
    setting, callback = Setting("single", tmp_path), new_callback()
    setting.trainer(callback).fit(setting.model())
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        model = setting.model()
        setting.trainer(other).fit(model)
        assert_same(model.starts[0], initialized())


def test_pretrained_weights_loaded_in_init_are_refused(tmp_path: Path) -> None:
    setting = Setting("single", tmp_path)
    trained = setting.model(small_conv_net)
    trainer = setting.trainer()
    trainer.fit(trained)
    trainer.save_checkpoint(tmp_path / "pretrained.ckpt")
    state = torch.load(tmp_path / "pretrained.ckpt", weights_only=True)["state_dict"]
    model = Pretrained(lambda: loaded(small_conv_net(), {n.removeprefix("network."): w for n, w in state.items()}))
    with pytest.raises(ValueError, match=r"num_batches_tracked(.|\n)*keep"):
        setting.trainer(new_callback()).fit(model)
    assert_same(weights_of(model), weights_of(trained))


@in_both_namespaces
def test_fast_dev_run_initialises(namespace: Namespace) -> None:
    model: LightningModule = module_class(Digits, namespace)(small_conv_net)
    make_trainer(namespace, fast_dev_run=True, callbacks=[new_callback()]).fit(model)
    assert model.network[-1].bias.abs().max() < 0.01  # 0 and one step of AdamW


def test_seed_of_seed_everything_decides_each_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One callback object in a loop over seeds must not repeat the first run."""
    setting, callback = Setting("single", tmp_path), InitCallback("he_normal")
    for seed in ("5", "6"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        model = setting.model()
        setting.trainer(callback).fit(model)
        assert callback.report is not None
        assert callback.report.seed == int(seed)
        assert callback.state_dict() == {"seed": int(seed)}
    monkeypatch.delenv("PL_GLOBAL_SEED")
    setting.trainer(callback).fit(setting.model())
    assert callback.report.seed == 6  # drawn or read once, then kept


@in_both_namespaces
def test_report_is_text_in_tensorboard(namespace: Namespace, tmp_path: Path) -> None:
    loggers = lightning(namespace).loggers
    logger, callback = loggers.TensorBoardLogger(tmp_path), new_callback()
    setting = Setting("single", tmp_path, namespace)
    setting.trainer(callback, logger=[loggers.CSVLogger(tmp_path), logger]).fit(setting.model())
    (event,) = EventAccumulator(logger.log_dir).Reload().Tensors("initialization/text_summary")
    assert callback.report is not None
    assert event.tensor_proto.string_val[0].decode() == callback.report.to_markdown()


@in_both_namespaces
def test_deepspeed_is_refused(namespace: Namespace) -> None:
    trainer, model = make_trainer(namespace), module_class(Digits, namespace)(small_conv_net)
    # Made without __init__, which asks for a package and a GPU: refusing needs neither.
    strategy = lightning(namespace).strategies.DeepSpeedStrategy
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        new_callback().setup(trainer, model, "fit")


def test_report_on_a_terminal_without_its_characters_does_not_end_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    setting, callback = Setting("single", tmp_path), new_callback()
    setting.trainer(callback).fit(setting.model())
    assert callback.report is not None
    assert callback.report.title.encode() in raw.getvalue()
