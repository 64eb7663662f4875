"""Small modules with one property each, for tests of more than one wing; whole networks are in `models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.models import DigitsModule


class Unknown(nn.Module):
    """A parameter that no rule knows a role for, named as in state-space models."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.ones(3, 4, dtype=dtype), requires_grad=dtype.is_floating_point)


class Checkpointed(nn.Module):
    """Calls ``first``, ``blocks`` and ``head`` in turn; the blocks are computed again in the backward pass.

    Set ``recompute`` to False for the same network without checkpointing. Reentrant checkpointing needs an input
    with a gradient, so ``first`` should have parameters.
    """

    def __init__(self, first: nn.Module, blocks: list[nn.Module], head: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.blocks, self.head = first, nn.ModuleList(blocks), head
        self.reentrant = reentrant
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.recompute else block(x)
        output: Tensor = self.head(x)
        return output


class Pretrained(DigitsModule):
    """Loads its weights in ``__init__``, as ``from_pretrained`` does.

    Args:
        load: makes the network and loads its weights.
        new_head: put a layer on it that was never trained; the network must give 10 features.
        call: how to call the network on rows of pixels; plainly unless said otherwise.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        *,
        new_head: bool = False,
        call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    ) -> None:
        super().__init__(load)
        self.call = call
        self.head = nn.Linear(10, 10) if new_head else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.call(self.network, pixels))
        return logits


def loaded(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with the weights of a state dict."""
    network.load_state_dict(state)
    return network


class LlamaRMSNorm(nn.Module):
    """As in transformers: another library's own norm."""

    def __init__(self, units: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((units,), start))
        self.calls = 0

    def normalised(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalised(x)


class GemmaRMSNorm(LlamaRMSNorm):
    """Zero-centred: its scale is 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * self.normalised(x)


class TransformersConv1D(nn.Module):
    """As transformers writes it: a Linear stored (in, out), known by its qualified name."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


# It is known by its qualified name: transformers need not be installed.
TransformersConv1D.__module__, TransformersConv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
