"""Signs of training in a model that is about to be initialised."""

from __future__ import annotations

from torch import nn

from lightning_init import Rule
from lightning_init.initialization.rules import Request
from lightning_init.initialization.survey import survey, with_empty_memory_marked
from lightning_init.initialization.training_signs import signs_of_training


def signs(model: nn.Module, *rules: Rule) -> list[str]:
    """What the signs say, in the order they are found."""
    request = Request.of("he_normal", rules)
    return [sign.message for sign in signs_of_training(with_empty_memory_marked(survey(model, request)), model)]
