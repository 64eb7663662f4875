"""Write drawn values into parameters: plain, sharded, non-contiguous, parametrized; always in place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_init.distributed.shards import local_shard_of
from lightning_init.initialization.draw import (
    DrawTask,
    Measured,
    block_jobs,
    draw_full,
    measure,
    stream_fingerprint,
)
from lightning_init.initialization.streams import one_thread_each, run_on_all_cores
from lightning_init.introspect.sites import ParameterSite, parametrizations_of, recomputing_hook_of, weight_norm_of

POWER_ITERATIONS = 15
"""As many as torch takes when a spectral norm is registered; training adds one at every step."""


def write_all(tasks: Sequence[DrawTask]) -> list[Measured]:
    """Draw and write every task on all cores; what was written of each, in the same order.

    Contiguous parameters are filled block by block in their own memory. Others (channels_last, structured,
    complex, parametrized) need one copy of the parameter for each thread that is at work.
    """
    measured = [Measured() for _ in tasks]
    direct = [(index, task) for index, task in enumerate(tasks) if not task.assignment.site.is_computed]
    jobs = [(index, job) for index, task in direct for job in _jobs(task)]
    results = run_on_all_cores([job for _, job in jobs])
    for (index, _), block in zip(jobs, results, strict=True):
        measured[index] += block
    # What goes through another computation comes one by one: on shards it may need all ranks, in one order.
    with one_thread_each():
        for index, task in enumerate(tasks):
            if task.assignment.site.is_computed:
                measured[index] += _write_through(task)
            elif task.assignment.site.storage == "recomputed":
                _recompute(task.assignment.site)
            _zero_padding_row(task)
            if task.shard.is_sharded:  # its bits differ from rank to rank: compare the start of its streams instead
                measured[index].checksum = sum(map(stream_fingerprint, task.chunks)) % 2**62
    for module in {id(task.assignment.site.module): task.assignment.site.module for task in tasks}.values():
        reset = getattr(module, "reset_running_stats", None)
        if callable(reset):  # statistics of a normalisation belong to the weights it had
            reset()
    return measured


def _jobs(task: DrawTask) -> Iterator[Callable[[], Measured]]:
    """The independent pieces of work that fill one parameter."""
    local = task.shard.local
    if all(chunk.is_elementwise for chunk in task.chunks) and local.is_contiguous() and not local.is_complex():
        flat = local.view(-1)
        for chunk in task.chunks:
            yield from block_jobs(chunk, task.shard, flat)
    else:
        yield functools.partial(_write_full, task)


def _write_full(task: DrawTask) -> Measured:
    """Draw all of a parameter, then keep what belongs here."""
    local = task.shard.local
    values = task.shard.take(draw_full(task, local.dtype))
    local.copy_(values.view(local.shape))
    return measure(values.to(local.dtype), task.chunks[0].initializer.target_mean)


@torch.no_grad()
def _write_through(task: DrawTask) -> Measured:
    """Write an attribute that is computed from other parameters, through the inverse of that computation.

    Measured is the attribute as the forward pass will read it.
    """
    site = task.assignment.site
    current = site.current
    values = draw_full(task, current.dtype).to(current.device, current.dtype)
    if site.storage == "weight_norm":
        _set_weight_norm(site, values)
    elif not _set_parametrized(site, values):
        return Measured(is_refused=True)
    _settle_spectral_norms(site)
    now = site.current
    now = now.full_tensor() if isinstance(now, DTensor) else now
    measured = measure(now, task.chunks[0].initializer.target_mean)
    measured.is_transformed = not torch.allclose(now, values, rtol=1e-3)
    return measured


def _set_parametrized(site: ParameterSite, values: Tensor) -> bool:
    """Send values through each right inverse, last parametrization first, and copy them in place.

    Returns:
        Whether that was possible: of a value that a parametrization never gives, such as a negative one of an
        exponential, the inverse is not finite. Nothing is written then.
    """
    steps = parametrizations_of(site)
    assert steps is not None
    inverse: Tensor | Sequence[Tensor] = values
    for step in reversed(list(steps)):
        inverse = step.right_inverse(inverse)  # type: ignore[operator]
    originals = [steps.original] if steps.is_tensor else [getattr(steps, f"original{i}") for i in range(steps.ntensors)]
    inverses = [inverse] if isinstance(inverse, Tensor) else list(inverse)
    if not all(bool(one.isfinite().all()) for one in inverses):
        return False
    for original, value in zip(originals, inverses, strict=True):
        _put(original, value)
    return True


def _settle_spectral_norms(site: ParameterSite) -> None:
    """Let spectral norms find the largest singular value of new weights, which they estimate while training only.

    An evaluation before the first step, such as the sanity check, would divide by the product with stale vectors.
    """
    steps = [step for step in parametrizations_of(site) or () if isinstance(step, _SpectralNorm)]
    modes = [step.training for step in steps]
    for step in steps:
        step.training = True
    for _ in range(POWER_ITERATIONS if steps else 0):
        getattr(site.module, site.attribute)  # reading is what iterates
    for step, mode in zip(steps, modes, strict=True):
        step.training = mode


@torch.no_grad()
def _recompute(site: ParameterSite) -> None:
    """What a hook computes from the parameter at every forward pass, so that it is right before the next one too."""
    hook = recomputing_hook_of(site.module, site.attribute)
    if isinstance(hook, SpectralNorm):
        for _ in range(POWER_ITERATIONS):  # as for the newer one
            hook.compute_weight(site.module, do_power_iteration=True)
    if hook is not None:
        hook(site.module, ())


def _set_weight_norm(site: ParameterSite, values: Tensor) -> None:
    """The older weight_norm by hooks: weight = g·v/|v|, so v is the weight and g its norm."""
    hook = weight_norm_of(site.module, site.attribute)
    assert hook is not None
    _put(getattr(site.module, f"{site.attribute}_v"), values)
    _put(getattr(site.module, f"{site.attribute}_g"), torch.norm_except_dim(values, 2, hook.dim))
    hook(site.module, ())  # so that the attribute is right before the next forward pass, too


def _put(parameter: Tensor, full_value: Tensor) -> None:
    """Copy into a parameter what is held here of a full value."""
    shard = local_shard_of(parameter)
    shard.local.copy_(shard.take(full_value).view(shard.local.shape))


def _zero_padding_row(task: DrawTask) -> None:
    """A lookup table's padding row is zero, as the module itself would have it."""
    row, shard = task.role.padding_index, task.shard
    # A weight norm over dimension 1 holds one length per column: none of them is the row's.
    if row is None or shard.full_shape[0] != task.shape[0]:
        return
    width = math.prod(shard.full_shape[1:])
    overlap = shard.overlap(row * width, (row + 1) * width)
    if overlap is not None:
        shard.local[overlap[0].start // shard.local[0].numel()] = 0


@contextmanager
def summon_fsdp1_parameters(model: nn.Module) -> Iterator[None]:
    """FSDP1 keeps flat shards: gather them as plain parameters, and write every rank's shard back."""
    with ExitStack() as stack:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=True))
        yield
