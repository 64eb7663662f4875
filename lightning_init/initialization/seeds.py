"""The seed of a run, where none was given: the user's own, however it was set, and the same on all ranks."""

from __future__ import annotations

import os

import torch

from lightning_init.distributed.ranks import all_gather_object


def agreed_seed(remembered: int | None = None) -> int:
    """That of ``seed_everything``, else ``remembered``, else that of ``torch.manual_seed``: rank 0's.

    Where nobody has set a seed, PyTorch has drawn one for its default generator, which differs from run to run. The
    generator's state is neither used nor changed. All ranks have to call this, also where only some were seeded.

    Args:
        remembered: of the run that is continued.

    Raises:
        ValueError: the environment variable ``PL_GLOBAL_SEED``, in which ``seed_everything`` leaves its seed, is no
            integer.
    """
    return int(all_gather_object(_own_seed(remembered))[0])


def _own_seed(remembered: int | None) -> int:
    """This rank's."""
    everything = os.environ.get("PL_GLOBAL_SEED")
    if everything:
        try:
            return int(everything)
        except ValueError:
            message = f"the environment variable PL_GLOBAL_SEED is {everything!r}, and not an integer"
            raise ValueError(message) from None
    # 31 bits, so that the seed PyTorch draws for itself can be read and typed; nobody sets a larger one.
    return torch.default_generator.initial_seed() % 2**31 if remembered is None else remembered
