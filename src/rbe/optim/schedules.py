"""Schedules: factors of a base value by epoch or step, for `torch.optim.lr_scheduler.LambdaLR` or by themselves."""

import math
from dataclasses import dataclass

from rbe.errors import RbeError


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up, then exponential decay: (t + 1) / warmup, then decay^((t - warmup) / span).

    >>> factor = WarmupDecay(warmup=100)
    >>> factor(0), factor(99), factor(100), factor(1100)
    (0.01, 1.0, 1.0, 0.1)
    >>> from torch import nn, optim
    >>> adam = optim.Adam(nn.Linear(2, 2).parameters(), lr=0.5)
    >>> optim.lr_scheduler.LambdaLR(adam, factor).get_last_lr()
    [0.005]

    The first factor is not 0, as it is where printed: a step of length 0 is an epoch lost.

    Args:
        warmup: epochs or steps of growth; 0 starts at 1.
        decay: factor of every further `span`.
        span: epochs or steps for one factor `decay`.

    Raises:
        RbeError: an argument out of range.

    Source: Neural-network layers, section 5.10.1.
    """

    warmup: int = 100
    decay: float = 0.1
    span: float = 1000.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 < self.decay <= 1 or not 0 < self.span < math.inf:
            raise RbeError(f"{self}: warmup is 0 or more, decay in (0, 1], span positive")

    def __call__(self, t: int) -> float:
        """The factor at epoch or step t, from 0."""
        if t < self.warmup:
            return (t + 1) / self.warmup
        return float(self.decay ** ((t - self.warmup) / self.span))


@dataclass(frozen=True)
class PowerDecay:
    """(t0 / (t0 + t))^exponent: slow decay without an end.

    >>> rate, flips = PowerDecay(start=100), PowerDecay(start=100, exponent=2.0)
    >>> rate(0), rate(300), flips(300)
    (1.0, 0.5, 0.0625)

    Printed are exponent 0.5 for the learning rate of (r, theta) and 2 for the probability of discrete transitions,
    which settle sooner. The source also demands that the sum of the rates diverges while that of their squares
    converges; this needs an exponent above 0.5 and at most 1.

    Args:
        start: t0, after which decay sets in.
        exponent: positive.

    Raises:
        RbeError: an argument out of range.

    Source: Poincare-ball learning, section 4.6.2.
    """

    start: float = 100.0
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.exponent < math.inf):
            raise RbeError(f"{self}: start and exponent are positive")

    def __call__(self, t: int) -> float:
        """The factor at epoch or step t, from 0."""
        return float((self.start / (self.start + t)) ** self.exponent)


@dataclass(frozen=True)
class Cooling:
    """start / (1 + slope t): the temperature of state transitions.

    >>> temperature = Cooling()
    >>> temperature(0), temperature(10)
    (0.1, 0.05)

    The printed temperature starts at 1, the printed beta = 1 / T is 10; the default start is its inverse. For the decay
    by a constant factor an epoch, decay^epoch of rates and cool^epoch of transitions with cool < decay, there is
    `WarmupDecay(0, decay, 1.0)`.

    Args:
        start: temperature at 0.
        slope: 0 is constant.

    Raises:
        RbeError: an argument out of range.

    Source: Poincare-ball learning, sections 4.3.2.2 and 4.5.3.
    """

    start: float = 0.1
    slope: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 <= self.slope < math.inf):
            raise RbeError(f"{self}: start is positive, slope 0 or more")

    def __call__(self, t: float) -> float:
        """The temperature at epoch t, from 0."""
        return self.start / (1.0 + self.slope * t)
