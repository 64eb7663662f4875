"""What every scheme has in common: how a weight is filled, once it is known what the weight is to its module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol, TypeAlias

from lightning_init.schemes.fans import Fans

Fills: TypeAlias = Literal["weights", "known parameters", "any parameter"]
"""What a scheme can fill: only weights, which have fans; every parameter whose module type is known; anything."""


class ParameterRole(Protocol):
    """What a scheme asks of a parameter; :class:`~lightning_init.introspect.role.Role` answers."""

    @property
    def fans(self) -> Fans | None:
        """Fans of one slice and group; None for what is no weight and no lookup table."""

    @property
    def default(self) -> Initializer:
        """What the module itself draws for this parameter."""


class Scheme(ABC):
    """A way to fill one weight. Every scheme is a frozen dataclass under this class.

    Four kinds of classes lie below it:

    - :class:`~lightning_init.schemes.distributions.Distribution`: all elements are drawn alike and independently;
    - :class:`~lightning_init.schemes.structured.StructuredScheme`: builds a whole matrix;
    - :class:`~lightning_init.schemes.variance_scaling.FanScheme`: a distribution once the fans are known;
    - :class:`~lightning_init.schemes.named.TorchDefault`: what the module itself would draw.

    The first two are :class:`Initializer`, which the other two become by :meth:`resolve`.
    """

    takes_gain: ClassVar[bool] = False
    """Whether ``activation`` and ``Rule(gain=...)`` mean something to this scheme."""

    fills: ClassVar[Fills] = "weights"
    """What the scheme can fill where a rule names a parameter outright."""

    @property
    def gain(self) -> float:
        """The scheme's own gain, used when none is given."""
        return 1.0

    @abstractmethod
    def resolve(self, role: ParameterRole | None, gain: float) -> Initializer:
        """What a parameter with this role is filled with.

        Args:
            role: None where the module type is not known.
            gain: factor on the std, where the scheme takes one.

        Raises:
            TypeError: the scheme needs to know more of the parameter than the role says.
        """


class Initializer(Scheme):
    """A scheme from which values can be made as it is: nothing about the parameter has to be known first."""

    @property
    def target_mean(self) -> float:
        """Population mean of one element."""
        return 0.0

    def resolve(self, role: ParameterRole | None, gain: float) -> Initializer:
        """The scheme itself."""
        return self
