"""Learning-rate and batch-size finders: they, and the training after them, start from the same weights."""

from __future__ import annotations

from tests.support.lifecycle.setting import Recording, Setting, assert_kept, initialized, new_callback
from tests.support.weights import assert_same, weights_of


def tuner_lr_find(setting: Setting) -> None:
    model, trainer = setting.model(), setting.trainer(new_callback())
    setting.lightning.tuner.Tuner(trainer).lr_find(model, num_training=3, update_attr=False)
    trainer.fit(model)
    assert_started_initialized(model, 2)


def learning_rate_finder_before(setting: Setting) -> None:
    finder = setting.lightning.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    model = setting.model()
    setting.trainer(finder, new_callback()).fit(model)
    assert_started_initialized(model, 2)


def learning_rate_finder_after(setting: Setting) -> None:
    finder = setting.lightning.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    model = setting.model()
    setting.trainer(new_callback(), finder).fit(model)
    assert_started_initialized(model, 2)


def tuner_scale_batch_size(setting: Setting) -> None:
    model, trainer = setting.model(), setting.trainer(new_callback())
    setting.lightning.tuner.Tuner(trainer).scale_batch_size(model, steps_per_trial=1, max_trials=1)
    trainer.fit(model)
    assert_started_initialized(model, 2)


def batch_size_finder(setting: Setting) -> None:
    finder = setting.lightning.callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=1)
    model = setting.model()
    setting.trainer(finder, new_callback()).fit(model)
    assert_started_initialized(model, 2)


def second_fit_after_a_finder(setting: Setting) -> None:
    model, trainer = setting.model(), setting.trainer(new_callback())
    setting.lightning.tuner.Tuner(trainer).lr_find(model, num_training=3, update_attr=False)
    trainer.fit(model)
    trained = weights_of(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert_kept(model.starts[-1], trained)


def resume_with_a_finder(setting: Setting) -> None:
    """The finder and the training after it start from the checkpoint."""
    path, trained = setting.trained(new_callback())
    model = setting.model()
    finder = setting.lightning.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    setting.trainer(new_callback(), finder, max_epochs=2).fit(model, ckpt_path=path)
    assert_kept(model.starts[-1], trained)


def assert_started_initialized(model: Recording, times: int) -> None:
    assert len(model.starts) == times, f"training started {len(model.starts)} times"
    for start in model.starts:
        assert_same(start, initialized())
