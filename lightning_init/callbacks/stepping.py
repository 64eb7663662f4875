"""In which batches optimizers step: learned from those in which they did, so that these can be the logged ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

_MOST_BATCHES = 4
"""How many batches, for each optimizer, are logged at most while one is waited for that steps irregularly."""


class LoggedSteps:
    """Decides which steps are logged: the first, and then those that Lightning logs at, if an optimizer steps in them.

    Whoever accumulates gradients by hand, skips steps, or lets optimizers take turns, steps in some batches only. A
    step that is due is then the next one of these, for every optimizer.

    Args:
        interval: n. Lightning logs at steps n - 1, 2n - 1, and so on.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._is_owed = True  # the first step of every fit
        self._before_first: int | None = None
        self._last_step: dict[int, int] = {}
        self._gap: dict[int, int] = {}
        self._awaited: set[int] = set()
        self._batches_left = 0

    def owe_next(self) -> None:
        """Log the next step, whatever its number."""
        self._is_owed = True

    def is_logged(self, step: int, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the step that begins now is logged.

        Args:
            step: its number.
            optimizers: all of the Trainer's.
        """
        if self._before_first is None:
            self._before_first = step - 1
        is_due = (step + 1) % self.interval == 0
        if is_due or self._is_owed:
            self._awaited = set(map(id, optimizers))
            self._batches_left = _MOST_BATCHES * len(optimizers)
        next_steps = [self._next_step(optimizer) for optimizer in self._awaited if optimizer in self._last_step]
        steps_now = self._batches_left > 0 and any(number <= step for number in next_steps)
        can_wait = any(step < number < step + self.interval for number in next_steps)
        is_logged = self._is_owed or steps_now or (is_due and not can_wait)
        if is_logged:
            self._is_owed = False
            self._batches_left -= 1
        return is_logged

    def stepped(self, optimizer: Optimizer, step: int, *, logged: bool) -> None:
        """Called when an optimizer steps, in every batch."""
        before = self._last_step.get(id(optimizer), self._before_first)
        if before is not None and step > before:
            self._gap[id(optimizer)] = step - before
        self._last_step[id(optimizer)] = step
        if logged:
            self._awaited.discard(id(optimizer))

    def has_stepped(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether any of these has stepped so far."""
        return any(id(optimizer) in self._last_step for optimizer in optimizers)

    def _next_step(self, optimizer: int) -> int:
        return self._last_step[optimizer] + self._gap.get(optimizer, 1)
