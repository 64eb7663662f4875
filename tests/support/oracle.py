"""What the monitor should say, computed the slow way: every output kept whole, one process, plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

DEFAULT_STATS = ("activation_variance", "signal_variance", "gradient_variance", "gradient_norm", "dead_units")
Batch = tuple[Tensor, Tensor]
"""Inputs and classes (or targets) of one micro-batch on one rank."""


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


class Batches:
    """Trains ``network`` by SGD on exactly these micro-batches, in this order, on this rank."""

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Batch],
        loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
        learning_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.network = network
        self.batches = list(batches)
        self.loss = loss
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)


class BatchModule(Batches, LightningModule):
    """See :class:`Batches`."""


class MemoryLogger(Logger):
    """Keeps what it is given: ``steps[step][tag]``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update(metrics)


class Watched:
    """Keeps every output of the named modules, and after backward every gradient of them.

    What follows a module gets a clone of its output: an in-place operation can take hooks off a tensor.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in names}
        modules = dict(network.named_modules())
        for name in self.outputs:
            modules[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Callable[..., Tensor | None]:
        def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            tensor = output
            while not isinstance(tensor, Tensor):
                tensor = next(iter(tensor.values() if isinstance(tensor, dict) else tensor))
            self.outputs[name].append(tensor.detach().double().clone())
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gradients[name].append(gradient.double().clone()))
            return output.clone() if isinstance(output, Tensor) else None

        return keep


def expected_tags(
    network: nn.Module,
    steps: Sequence[Sequence[Batch]],
    *,
    accumulation: int,
    prefix: str = "network.",
    loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    names: Iterable[str] | None = None,
    unit_dims: Mapping[str, int] | None = None,
    rectifiers: Iterable[str] = (),
    bounded: Mapping[str, tuple[float, float]] | None = None,
    stats: Sequence[str] = DEFAULT_STATS,
) -> dict[str, float]:
    """The statistics of one optimizer step, as far as they are there before it.

    Args:
        network: in float64; its gradients are left in it.
        steps: the step's micro-batches of every rank: ``steps[rank][micro_batch]``.
        accumulation: the Trainer's ``accumulate_grad_batches``, also where the last window is shorter.
        names: layers; None: every leaf.
        unit_dims: dimension of a layer's units where it is not the last.
        rectifiers: layers that can have dead units.
        bounded: ends of the range of layers that saturate.
        stats: what to tell.
    """
    leaves = [n for n, m in network.named_modules() if n and not any(m.children()) and _is_layer(m)]
    names = leaves if names is None else list(names)
    watched = Watched(network, names)
    network.zero_grad()
    world_size = len(steps)
    for micro_batches in steps:
        for batch in micro_batches:
            (loss(network, batch) / (world_size * accumulation)).backward()
    tags = {}
    for name in names:
        if outputs := watched.outputs[name]:
            units = [_as_rows(output, (unit_dims or {}).get(name, -1)) for output in outputs]
            tags |= _output_tags(prefix + name, units, name in rectifiers, (bounded or {}).get(name))
        if gradients := watched.gradients[name]:
            together = torch.cat([g.flatten() for g in gradients])
            tags[f"gradient_variance/{prefix}{name}"] = _variance(together)
            tags[f"gradient_rms/{prefix}{name}"] = _rms(together)
        own = [p.grad for p in dict(network.named_modules())[name].parameters() if p.grad is not None]
        if own:
            tags[f"gradient_norm/{prefix}{name}"] = _norm(own)
        if weights := list(dict(network.named_modules())[name].parameters()):
            tags[f"weight_norm/{prefix}{name}"] = _norm(weights)
    tags["gradient_norm/total"] = _norm([p.grad for p in network.parameters() if p.grad is not None])
    tags["weight_norm/total"] = _norm(network.parameters())
    return {tag: value for tag, value in tags.items() if tag.partition("/")[0] in stats}


def share_left_by_clipping(total_norm: float, clip: float) -> float:
    """What clipping by norm multiplies gradients by, as ``torch.nn.utils.clip_grad_norm_`` does; 0 clips nothing."""
    return min(1.0, clip / (total_norm + 1e-6)) if clip else 1.0


def assert_tags_close(
    actual: Mapping[str, float], expected: Mapping[str, float], relative: float = 1e-5, absolute: float = 0.0
) -> None:
    """Same tags, and every value within ``relative`` (or ``absolute``) of what is expected."""
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    bounds = {tag: max(relative * abs(value), absolute) for tag, value in expected.items()}
    wrong = {t: (actual[t], e) for t, e in expected.items() if not abs(actual[t] - e) <= bounds[t]}
    assert not wrong, f"(actual, expected): {wrong}"


def _is_layer(module: nn.Module) -> bool:
    shapes = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Identity, nn.AdaptiveAvgPool2d)
    return not isinstance(module, shapes)


def _as_rows(output: Tensor, unit_dim: int) -> Tensor:
    return output.movedim(unit_dim, -1).reshape(-1, output.shape[unit_dim])  # [samples and positions, units]


def _output_tags(name: str, units: list[Tensor], rectifies: bool, ends: tuple[float, float] | None) -> dict[str, float]:
    by_width = {width: torch.cat([u for u in units if u.shape[1] == width]) for width in {u.shape[1] for u in units}}
    per_unit = torch.cat([rows.var(0, correction=0) for rows in by_width.values()])
    everything = torch.cat([u.flatten() for u in units])
    variance = _variance(everything)
    tags = {
        f"activation_variance/{name}": variance,
        f"signal_variance/{name}": float(per_unit.mean()),
        f"activation_mean/{name}": float(everything.mean()),
        f"activation_rms/{name}": _rms(everything),
        f"activation_max/{name}": float(everything.abs().max()),
        f"kurtosis/{name}": float(((everything - everything.mean()) ** 4).mean()) / variance**2 if variance else 0.0,
        f"near_zero/{name}": _near_zero(everything),
    }
    if ends:
        margin = (ends[1] - ends[0]) / 100
        flat = (everything < ends[0] + margin) | (everything > ends[1] - margin)
        tags[f"saturation/{name}"] = float(flat.double().mean())
    if rectifies:
        dead = torch.cat([~(rows > 0).any(0) for rows in by_width.values()])
        tags[f"dead_units/{name}"] = float(dead.double().mean())
    return tags


def near_zero_threshold(rms: float) -> float:
    """The largest of 1, 1.25, 1.5 and 1.75 times a power of two that is not above 1e-3 · rms, which is not 0."""
    octave = 2.0 ** math.floor(math.log2(1e-3 * rms))
    return octave * math.floor(4 * 1e-3 * rms / octave) / 4


def _near_zero(values: Tensor) -> float:
    rms = _rms(values)
    return float((values.abs() < near_zero_threshold(rms)).double().mean()) if rms else 1.0


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float((tensor.detach().double() ** 2).sum()) for tensor in tensors) ** 0.5


def _variance(values: Tensor) -> float:
    return float(values.double().var(correction=0))
