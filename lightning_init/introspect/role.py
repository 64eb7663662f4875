"""What a parameter is to its module, such as the weight of a linear layer: what a plan needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_init.checks import check_choice
from lightning_init.schemes.distributions import Constant, Distribution
from lightning_init.schemes.fans import Fans

Kind = Literal["weight", "bias", "norm", "embedding", "other", "keep"]


@dataclass(frozen=True, slots=True)
class Role:
    """What one parameter is to its module.

    Args:
        kind: a "weight" gets the scheme, a "bias" the scheme's bias; "norm", "embedding" and "other" get
            ``default``; "keep" is left as it is.
        default: what the module itself draws for this parameter (``torch_default`` uses it for every kind).
        fans: of a weight or an embedding, per slice and per group.
        slices: names of the equal chunks along dimension 0 that are drawn independently, such as the gates
            of an LSTM; one nameless slice for most parameters.
        groups: equal chunks along dimension 0 of a grouped convolution: each is a matrix of its own.
        transposed: stored (in, out, …) instead of (out, in, …).
        bias_values: the bias of each slice where it is not simply 0.
        padding_index: row of an embedding that is zero after drawing.
        starts_at_zero: the module starts this parameter at exactly 0, so anything else is a sign of training.
        why: the reason to keep, for the report.

    Raises:
        ValueError: the kind is not one of those above; a weight has no fans; ``groups`` is below 1;
            ``slices`` is empty; ``bias_values`` does not have one value per slice.
    """

    kind: Kind
    default: Distribution
    fans: Fans | None = None
    slices: tuple[str, ...] = ("",)
    groups: int = 1
    transposed: bool = False
    bias_values: tuple[float, ...] | None = None
    padding_index: int | None = None
    starts_at_zero: bool = False
    why: str = "registered so"

    def __post_init__(self) -> None:
        check_choice("Role(kind)", self.kind, get_args(Kind))
        if self.kind == "weight" and self.fans is None:
            raise ValueError("Role(kind='weight') needs fans=Fans(fan_in, fan_out)")
        if not self.slices:
            raise ValueError("Role(slices) needs at least one name, such as the nameless ('',)")
        if self.groups < 1:
            raise ValueError(f"Role(groups) must be at least 1, got {self.groups!r}")
        if self.bias_values is not None and len(self.bias_values) != len(self.slices):
            raise ValueError(
                f"Role(bias_values) needs one value for each of the {len(self.slices)} slices, "
                f"got {len(self.bias_values)}"
            )


KEEP = Role("keep", Constant(0.0))
"""The role of a parameter that is left as it is; the default is never drawn."""
