"""Write drawn values into parameters: plain, sharded, non-contiguous, parametrized; always in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_init.distributed.shards import LocalShard, local_shard_of
from lightning_init.initialization.draw import (
    DrawChunk,
    Measured,
    block_jobs,
    chunks_of,
    draw_full,
    measure,
    stream_fingerprint,
)
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.streams import one_thread_each, run_on_all_cores
from lightning_init.introspect.sites import ParameterSite, parametrizations_of, recomputing_hook_of, weight_norm_of
from lightning_init.schemes.distributions import Distribution

POWER_ITERATIONS = 15
"""As many as torch takes when a spectral norm is registered; training adds one at every step."""


def write_all(assignments: Sequence[Assignment], seed: int) -> list[Measured]:
    """Draw and write every assignment on all cores; what was written of each, in the same order.

    Contiguous parameters are filled block by block in their own memory. Others (channels_last, structured,
    complex, parametrized) need one copy of the parameter for each thread that is at work.
    """
    measured = [Measured() for _ in assignments]
    drawn = [(index, assignment) for index, assignment in enumerate(assignments) if assignment.is_drawn]
    jobs = [(index, job) for index, step in drawn if not _is_computed(step.site) for job in _jobs(step, seed)]
    results = run_on_all_cores([job for _, job in jobs])
    for (index, _), chunk in zip(jobs, results, strict=True):
        measured[index] += chunk
    # What goes through another computation comes one by one: on shards it may need all ranks, in one order.
    with one_thread_each():
        for index, assignment in drawn:
            if _is_computed(assignment.site):
                measured[index] += _write_through(assignment, seed)
            elif assignment.site.storage == "recomputed":
                _recompute(assignment.site)
            _zero_padding_row(assignment)
            _replace_shards_checksum(assignment, seed, measured[index])
    return measured


def _is_computed(site: ParameterSite) -> bool:
    """Whether the forward pass computes this attribute from other parameters."""
    return site.storage in ("parametrization", "weight_norm")


def _jobs(assignment: Assignment, seed: int) -> Iterator[Callable[[], Measured]]:
    """The independent pieces of work that fill one parameter."""
    shard = local_shard_of(assignment.site.parameter)
    chunks = chunks_of(assignment, seed, shard.full_shape.numel())
    is_elementwise = all(isinstance(chunk.initializer, Distribution) for chunk in chunks)
    if is_elementwise and shard.local.is_contiguous() and not shard.local.is_complex():
        for chunk in chunks:
            yield from block_jobs(chunk, shard, shard.local.view(-1))
    else:
        yield lambda: _write_whole(assignment, chunks, shard)


def _write_whole(assignment: Assignment, chunks: Sequence[DrawChunk], shard: LocalShard) -> Measured:
    """Build all of a parameter's values, then keep what belongs here."""
    values = shard.take(_whole_parameter(assignment, chunks, shard.full_shape, shard.local.dtype))
    shard.local.copy_(values.view(shard.local.shape))
    return measure(values.to(shard.local.dtype), chunks[0].initializer)


def _whole_parameter(
    assignment: Assignment, chunks: Sequence[DrawChunk], shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """All slices of a parameter, one after the other along dimension 0. Shape: ``shape``."""
    if not shape:
        return draw_full(chunks[0], (), assignment.role, dtype)
    chunk_shape = (shape[0] // len(chunks), *shape[1:])
    return torch.cat([draw_full(chunk, chunk_shape, assignment.role, dtype) for chunk in chunks])


@torch.no_grad()
def _write_through(assignment: Assignment, seed: int) -> Measured:
    """Write an attribute that is computed from other parameters, through the inverse of that computation.

    Measured is the attribute as the forward pass will read it.
    """
    site = assignment.site
    current = site.current
    chunks = chunks_of(assignment, seed, current.numel())
    values = _whole_parameter(assignment, chunks, current.shape, current.dtype)
    values = values.to(current.device, current.dtype)
    if site.storage == "weight_norm":
        _set_weight_norm(site, values)
    else:
        _set_parametrized(site, values)
    _settle_spectral_norms(site)
    now = site.current
    now = now.full_tensor() if isinstance(now, DTensor) else now
    measured = measure(now, chunks[0].initializer)
    measured.is_transformed = not torch.allclose(now, values, rtol=1e-3)
    return measured


def _set_parametrized(site: ParameterSite, values: Tensor) -> None:
    """Send values through each right inverse, last parametrization first, and copy them in place."""
    steps = parametrizations_of(site)
    assert steps is not None
    inverse: Tensor | Sequence[Tensor] = values
    for step in reversed(list(steps)):
        inverse = step.right_inverse(inverse)  # type: ignore[operator]
    originals = [steps.original] if steps.is_tensor else [getattr(steps, f"original{i}") for i in range(steps.ntensors)]
    for original, value in zip(originals, [inverse] if isinstance(inverse, Tensor) else inverse, strict=True):
        _put(original, value)


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


def _put(parameter: Tensor, whole_value: Tensor) -> None:
    """Copy this process's chunk of a whole value."""
    shard = local_shard_of(parameter)
    shard.local.copy_(shard.take(whole_value).view(shard.local.shape))


def _zero_padding_row(assignment: Assignment) -> None:
    """A lookup table's padding row is zero, as the module itself would have it."""
    row = assignment.role.padding_index if assignment.role else None
    site = assignment.site
    # A weight norm over dimension 1 holds one length per column: none of them is the row's.
    if row is None or len(site.parameter) != len(site.current):
        return
    shard = local_shard_of(site.parameter)
    width = math.prod(shard.full_shape[1:])
    overlap = shard.overlap(row * width, (row + 1) * width)
    if overlap is not None:
        shard.local[overlap[0].start // shard.local[0].numel()] = 0


def _replace_shards_checksum(assignment: Assignment, seed: int, measured: Measured) -> None:
    """The bits of a shard differ from rank to rank by design: compare the start of its streams instead."""
    shard = local_shard_of(assignment.site.parameter)
    if shard.is_sharded:
        chunks = chunks_of(assignment, seed, shard.full_shape.numel())
        measured.checksum = sum(stream_fingerprint(chunk) for chunk in chunks) % 2**62


@contextmanager
def summon_fsdp1_parameters(model: nn.Module) -> Iterator[None]:
    """FSDP1 keeps flat shards: gather them as plain parameters, and write every rank's shard back."""
    with ExitStack() as stack:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=True))
        yield
