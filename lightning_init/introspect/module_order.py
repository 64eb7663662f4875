"""What the order of modules shows of what feeds each weight, where no batch is at hand to trace a call.

Only ``nn.Sequential`` says in which order it calls what it has. Two layers with nothing between them, or a
normalisation, show that no nonlinearity feeds the second; anything else shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.padding import _ConstantPadNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

from lightning_init.introspect.names import clean_name
from lightning_init.introspect.trace import Feed, Trace, Use

_WEIGHTED = (nn.Linear, _ConvNd)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POOLS = (_AvgPoolNd, _AdaptiveAvgPoolNd)
_LETS_PASS = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd, _ConstantPadNd, nn.Upsample, *_POOLS)


def trace_of_order(model: nn.Module) -> Trace:
    """What is known of the weights in a model's ``nn.Sequential`` modules.

    >>> trace_of_order(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).feed_of("1.weight")
    'linear'
    """
    uses = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if type(module) is not nn.Sequential or module in inside:
            continue
        inside.update(one for one in module.modules() if type(one) is nn.Sequential)
        chain = [(name, one) for name, one in _flattened(path, module) if not isinstance(one, _LETS_PASS)]
        last = next((one for _, one in reversed(chain) if isinstance(one, _WEIGHTED)), None)
        for (_, before), (name, one) in zip([("", None), *chain], chain, strict=False):
            if isinstance(one, _WEIGHTED):
                is_linear = isinstance(before, (*_WEIGHTED, *_NORMS))
                weight = clean_name(model, f"{name}.weight")
                feed: Feed = "linear" if is_linear else "unknown"
                uses.append(Use(frozenset({weight}), feed, one is last and not path, 1.0 if is_linear else None))
    return Trace(tuple(uses), is_of_call=False)


def _flattened(path: str, sequence: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """What a sequence calls, in order, with the sequences inside it taken apart."""
    for name, module in sequence.named_children():
        inner = f"{path}.{name}" if path else name
        if type(module) is nn.Sequential:
            yield from _flattened(inner, module)
        else:
            yield inner, module
