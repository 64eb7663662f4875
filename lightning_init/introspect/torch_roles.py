"""The role of every parameter of torch's own modules, with what their ``reset_parameters`` draws.

Everything is read from the module's attributes, never from a parameter's local shape: parameters may be
shards, flat, parametrized or on meta.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_init.introspect.normalization import norm_role
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Constant, Distribution, Normal, Uniform
from lightning_init.schemes.fans import Fans, bilinear_fans, conv_fans, conv_transpose_fans, embedding_bag_fans

Describe = Callable[[Any, str], Role]
"""From a module and the name of one of its parameters to the parameter's role."""

LSTM_GATES, GRU_GATES = ("i", "f", "g", "o"), ("r", "z", "n")


def uniform_around_zero(bound: float) -> Distribution:
    """U(-bound, bound), or 0 for a parameter without elements (torch's fan is 0 there)."""
    return Uniform(-bound, bound) if 0 < bound < math.inf else Constant(0.0)


def torch_uniform(fan: float) -> Distribution:
    """U(±1/√fan), torch's default: its ``kaiming_uniform_(a=√5)`` has the bound √(6 / (1 + 5) / fan)."""
    return uniform_around_zero(fan**-0.5 if fan else 0.0)


def xavier_uniform(fan_in: int, fan_out: int) -> Distribution:
    """U(±√(6 / (fan_in + fan_out)))."""
    return uniform_around_zero(math.sqrt(6 / (fan_in + fan_out)))


def _linear_weight(module: Any, attribute: str) -> Role:
    fans = Fans(float(module.in_features), float(module.out_features))
    return Role("weight", torch_uniform(module.in_features), fans)


def _linear_bias(module: Any, attribute: str) -> Role:
    return Role("bias", torch_uniform(module.in_features))


def _zero_bias(module: Any, attribute: str) -> Role:
    return Role("bias", Constant(0.0), starts_at_zero=True)


def _conv(module: Any, attribute: str) -> Role:
    default = torch_uniform(module.in_channels // module.groups * math.prod(module.kernel_size))
    if attribute == "bias":
        return Role("bias", default)
    shape = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.groups)
    return Role("weight", default, conv_fans(*shape), groups=module.groups)


def _conv_transpose(module: Any, attribute: str) -> Role:
    # torch takes dimension 1 of the weight (C_in, C_out/g, …) for the input channels, so its own draw
    # has the fans swapped.
    default = torch_uniform(module.out_channels // module.groups * math.prod(module.kernel_size))
    if attribute == "bias":
        return Role("bias", default)
    shape = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.groups)
    return Role("weight", default, conv_transpose_fans(*shape), groups=module.groups, transposed=True)


def other_bias_draws(module: nn.Module) -> list[Uniform]:
    """What authors draw a bias of this module from, other than its role's ``default``; nothing for most modules.

    Torch takes the output channels of a transposed convolution for its fan_in, in the bound of its bias too. Authors
    who compute U(±1/√fan_in) themselves divide by the input channels.

    >>> [draw.high for draw in other_bias_draws(nn.ConvTranspose1d(4, 6, 4))]
    [0.25]
    """
    if not isinstance(module, _ConvTransposeNd):
        return []
    bound = (module.in_channels // module.groups * math.prod(module.kernel_size)) ** -0.5
    return [Uniform(-bound, bound)]


def _attention_weight(module: Any, attribute: str) -> Role:
    width = module.embed_dim
    if attribute == "in_proj_weight":
        # torch draws the three projections as one matrix of 3·width rows.
        fans, default = Fans(float(width), float(width)), xavier_uniform(width, 3 * width)
        return Role("weight", default, fans, slices=("q", "k", "v"))
    fan_in = {"q_proj_weight": width, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}[attribute]
    return Role("weight", xavier_uniform(fan_in, width), Fans(float(fan_in), float(width)))


def _attention_token(module: Any, attribute: str) -> Role:
    # bias_k and bias_v, (1, 1, width), are a key and a value of their own, not biases: torch draws them.
    return Role("other", Normal(module.embed_dim**-0.5))


def _gates(module: Any) -> tuple[str, ...]:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return LSTM_GATES
    return GRU_GATES if isinstance(module, (nn.GRU, nn.GRUCell)) else ("",)


def _recurrent_weight(module: Any, attribute: str) -> Role:
    """weight_ih, weight_hh: every gate is a matrix of its own; weight_hr projects the hidden state."""
    hidden = module.hidden_size
    state = getattr(module, "proj_size", 0) or hidden  # [features] of what is handed to the next step
    if attribute.startswith("weight_hr"):
        return Role("weight", torch_uniform(hidden), Fans(float(hidden), float(state)))
    layer = re.search(r"_l(\d+)", attribute)
    if attribute.startswith("weight_hh"):
        fan_in = state
    elif layer is None or layer[1] == "0":
        fan_in = module.input_size
    else:
        fan_in = state * (2 if module.bidirectional else 1)
    fans = Fans(float(fan_in), float(hidden))
    return Role("weight", torch_uniform(hidden), fans, slices=_gates(module))


def _recurrent_bias(module: Any, attribute: str) -> Role:
    """The two bias vectors are added: only bias_ih carries the LSTM's forget gate of 1."""
    gates = _gates(module)
    forget = gates == LSTM_GATES and attribute.startswith("bias_ih")
    values = (0.0, 1.0, 0.0, 0.0) if forget else None
    return Role("bias", torch_uniform(module.hidden_size), slices=gates, bias_values=values)


def _embedding(module: Any, attribute: str) -> Role:
    fans = embedding_bag_fans(getattr(module, "mode", "sum"))
    return Role("embedding", Normal(1.0), fans, padding_index=module.padding_idx)


def _bilinear(module: Any, attribute: str) -> Role:
    default = torch_uniform(module.in1_features)
    if attribute == "bias":
        return Role("bias", default)
    fans = bilinear_fans(module.in1_features, module.in2_features, module.out_features)
    return Role("weight", default, fans)


def _prelu(module: Any, attribute: str) -> Role:
    return Role("other", Constant(module.init))


def _transformers_conv1d(module: Any, attribute: str) -> Role:
    # A Linear with its weight stored (in, out).
    default, fans = Normal(0.02), Fans(float(module.weight.shape[0]), float(module.nf))
    return Role("weight", default, fans, transposed=True)


TIME_STEPS = Role("keep", Constant(0.0), why="its values are the time steps of a state space model")
"""softplus of this bias is spread log-uniformly over the step sizes."""


def is_time_step(module: nn.Module, name: str) -> bool:
    """Whether this is the bias of the time steps in a Mamba mixer, whatever its class is called.

    >>> is_time_step(nn.Linear(2, 3), "bias")
    False
    """
    return name == "dt_proj.bias" and {"A_log", "D"} <= {own for own, _ in module.named_parameters(recurse=False)}


def _graph_linear(module: Any, attribute: str) -> Role:
    # torch_geometric's Linear draws by the name of an initialiser that it was given.
    fan_in, fan_out = module.in_channels, module.out_channels
    if attribute == "bias":
        zeros = module.bias_initializer == "zeros"
        return Role("bias", Constant(0.0) if zeros else torch_uniform(fan_in), starts_at_zero=zeros)
    default = xavier_uniform(fan_in, fan_out) if module.weight_initializer == "glorot" else torch_uniform(fan_in)
    return Role("weight", default, Fans(float(fan_in), float(fan_out)))


_LINEAR: dict[str, Describe] = {"weight": _linear_weight, "bias": _linear_bias}
_CONV: dict[str, Describe] = {"weight": _conv, "bias": _conv}
_CONV_TRANSPOSE: dict[str, Describe] = {"weight": _conv_transpose, "bias": _conv_transpose}
_RECURRENT: dict[str, Describe] = {"weight_*": _recurrent_weight, "bias_*": _recurrent_bias}
_EMBEDDING: dict[str, Describe] = {"weight": _embedding}
_NORM: dict[str, Describe] = {"weight": norm_role, "bias": norm_role}

TORCH_ROLES: Mapping[type[nn.Module] | str, Mapping[str, Describe]] = {
    nn.Linear: _LINEAR,
    # The class of MultiheadAttention's out_proj, whose bias MultiheadAttention sets to 0.
    NonDynamicallyQuantizableLinear: {"bias": _zero_bias},
    nn.Bilinear: {"weight": _bilinear, "bias": _bilinear},
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.MultiheadAttention: {
        "in_proj_weight": _attention_weight,
        "[qkv]_proj_weight": _attention_weight,
        "in_proj_bias": _zero_bias,
        "bias_[kv]": _attention_token,
    },
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
    nn.SyncBatchNorm: _NORM,
    nn.InstanceNorm1d: _NORM,
    nn.InstanceNorm2d: _NORM,
    nn.InstanceNorm3d: _NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.PReLU: {"weight": _prelu},
    "transformers.pytorch_utils.Conv1D": {"weight": _transformers_conv1d, "bias": _zero_bias},
    "torch_geometric.nn.dense.linear.Linear": {"weight": _graph_linear, "bias": _graph_linear},
}
"""Module type (or its qualified name, for a library that need not be installed) to parameter to role."""
