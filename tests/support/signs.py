"""Signs of training in a model that is about to be initialised."""

from __future__ import annotations

from torch import nn

from lightning_init import Rule, plan
from lightning_init.initialization.draw import make_tasks
from lightning_init.initialization.training_signs import signs_of_training


def signs(model: nn.Module, *rules: Rule) -> list[str]:
    """What the signs say, in the order they are found."""
    return [sign.message for sign in signs_of_training(make_tasks(plan(model, rules=rules), 0), model)]
