"""Whether a parameter is to its module what the module's type says: subclasses change shapes, and what forward reads.

What is known of ``nn.Linear`` and the convolutions holds for a subclass only if it computes the same. An equalised
learning rate, a mask or a positive map in ``forward`` makes another weight of the parameter than is stored.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_init.introspect.role import Role
from lightning_init.introspect.torch_roles import torch_uniform
from lightning_init.sandbox import sandbox
from lightning_init.schemes.fans import Fans

_ASKED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def computes_as_its_type(module: nn.Module) -> bool:
    """Whether a subclass of Linear or a convolution with a ``forward`` of its own computes what its base would.

    A copy with random weights is asked with random inputs; one that needs other arguments, or fails, does not.
    """
    base = next((base for base in _ASKED if isinstance(module, base)), None)
    if base is None or type(module).forward is base.forward:
        return True
    with sandbox(module, zeros=True) as copied, torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in copied.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        example = _example(copied, generator)
        try:
            own, usual = copied.forward(example), base.forward(copied, example)
        except Exception:  # any code may stand here
            return False
        return isinstance(own, Tensor) and own.shape == usual.shape and torch.allclose(own, usual, rtol=1e-2, atol=1e-4)


def _example(module: nn.Module, generator: torch.Generator) -> Tensor:
    """A small input in the module's own dtype."""
    assert isinstance(module, (nn.Linear, _ConvNd))
    dtype = module.weight.dtype
    if isinstance(module, _ConvNd):
        spatial = [
            2 * (size - 1) * step + 1 + size for size, step in zip(module.kernel_size, module.dilation, strict=True)
        ]
        return torch.randn(2, module.in_channels, *spatial, generator=generator).to(dtype)
    return torch.randn(4, module.in_features, generator=generator).to(dtype)


def fitted_role(role: Role, module: nn.Module, attribute: str, shape: torch.Size) -> Role | None:
    """The role of a parameter of this full shape; None if its module's attributes speak of another kind of tensor.

    A weight that was given other sizes (a first convolution made grey) gets the fans of its shape. One with more
    dimensions, such as experts stacked in a subclass, is something else.
    """
    usual = _usual_shape(module, attribute)
    if usual is None or tuple(shape) == usual:
        return role
    if len(shape) != len(usual) or isinstance(module, nn.Embedding) or role.groups > 1 or role.transposed:
        return None
    taps = math.prod(shape[2:])
    stride = math.prod(module.stride) if isinstance(module, _ConvNd) else 1
    fans = Fans(float(shape[1] * taps), shape[0] * taps / stride)
    return replace(role, fans=fans, default=torch_uniform(fans.fan_in))


def _usual_shape(module: nn.Module, attribute: str) -> tuple[int, ...] | None:
    """The shape of a weight by its module's attributes, where they tell."""
    if attribute != "weight":
        return None
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim)
    if isinstance(module, _ConvTransposeNd):
        return (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
    if isinstance(module, _ConvNd):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return None
