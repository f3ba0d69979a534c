"""Phases of a run: which roles move, how many bits may turn, and which signs are held already."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.optim import Optimizer

from rbe.errors import RbeError

ROLES = ("point", "latent", "dense")


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    >>> Phase(end=0.5, latent=0.0).bits
    1.0

    Attributes:
        end: share of the run at which it ends, in (0, 1].
        point, latent, dense: factors of the learning rates of these roles; 0 leaves them where they are.
        bits: factor of the share of seeds whose discrete bits may turn by `HybridAdam.flip` or `beam`.
        held: share of the signs that is fixed, for `HybridAdam.hold`.
    """

    end: float
    point: float = 1.0
    latent: float = 1.0
    dense: float = 1.0
    bits: float = 1.0
    held: float = 0.0


@dataclass(frozen=True)
class Phases:
    """The phases of a run, one after the other.

    >>> from rbe.nn import Linear
    >>> from rbe.optim import HybridAdam, PowerDecay
    >>> from torch.optim.lr_scheduler import LambdaLR
    >>> optimizer = HybridAdam(Linear(16, 16, format="outer128"), lr=0.5)
    >>> plan = three_phases(total=100)
    >>> scheduler = LambdaLR(optimizer, plan.factors(optimizer, PowerDecay(start=100)))
    >>> scheduler.get_last_lr()  # of points, latents, scales and dense parameters: at first the latents rest
    [0.5, 0.0, 0.5, 0.5]
    >>> plan(50).latent, plan(90).latent, plan(90).bits
    (1.0, 0.0, 0.0)

    Args:
        total: epochs or steps of the run.
        phases: in order; the last one ends at 1.

    Raises:
        RbeError: the ends do not grow to 1, or a factor is out of range.
    """

    total: int
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [phase.end for phase in self.phases]
        if self.total < 1 or not ends or ends[-1] != 1 or not all(a < b for a, b in pairwise([0.0, *ends])):
            raise RbeError(f"Phases: total {self.total} is 1 or more, and the ends {ends} must grow from above 0 to 1")
        for phase in self.phases:
            factors = (phase.point, phase.latent, phase.dense, phase.bits)
            if not all(0 <= factor < math.inf for factor in factors) or not 0 <= phase.held <= 1:
                raise RbeError(f"Phases: {phase}: factors are 0 or more, held is in [0, 1]")

    def __call__(self, t: float) -> Phase:
        """The phase at epoch or step t, from 0; after the end it is the last one."""
        return next((phase for phase in self.phases if t < phase.end * self.total), self.phases[-1])

    def factors(
        self, optimizer: Optimizer, base: Callable[[int], float] = lambda t: 1.0
    ) -> list[Callable[[int], float]]:
        """What `LambdaLR` takes: for every parameter group the factor of its role, times that of another schedule.

        Scales have the factor of what is dense.

        >>> from rbe.nn import Linear
        >>> from rbe.optim import HybridAdam
        >>> plan = Phases(10, (Phase(0.5, point=0.5), Phase(1.0)))
        >>> [factor(0) for factor in plan.factors(HybridAdam(Linear(16, 16, False, format="packed64")))]
        [0.5, 1.0]

        Raises:
            RbeError: a group has no role; those of `HybridAdam` have.
        """
        return [self._factor(group.get("role"), base) for group in optimizer.param_groups]

    def _factor(self, role: str | None, base: Callable[[int], float]) -> Callable[[int], float]:
        role = "dense" if role == "scale" else role
        if role not in ROLES:
            raise RbeError(f"Phases: a parameter group has the role {role!r}; use HybridAdam, whose groups have one")
        # A plain function: a scheduler saves the attributes of any other callable, and a restart makes this one anew.
        return lambda t: float(getattr(self(t), role)) * base(t)


def three_phases(total: int, warmup: float = 0.05, settled: float = 0.75) -> Phases:
    """Points alone, then everything, then points again with every discrete bit at rest.

    The warm-up in which points alone move is ours: a share of the run until the moments of Adam mean something.

    >>> [(phase.end, phase.latent, phase.bits, phase.held) for phase in three_phases(100).phases]
    [(0.05, 0.0, 0.0, 0.0), (0.75, 1.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0)]

    Args:
        total: epochs or steps.
        warmup, settled: shares of the run at which the second and third phase begin.

    Raises:
        RbeError: the shares do not grow from above 0 to below 1.

    Source: Poincare-ball learning, section 4.6.3: bits are explored first, points refined afterwards.
    """
    return Phases(
        total,
        (Phase(warmup, latent=0.0, bits=0.0), Phase(settled), Phase(1.0, latent=0.0, bits=0.0, held=1.0)),
    )


def rounds(total: int, shares: Sequence[float] = (0.5, 0.75, 0.9, 1.0), start: float = 0.5) -> Phases:
    """Everything at first, then rounds in each of which a larger share of the signs is held and the rest retrained.

    >>> [(phase.end, phase.held) for phase in rounds(40, shares=(0.5, 1.0)).phases]
    [(0.5, 0.0), (0.75, 0.5), (1.0, 1.0)]

    Args:
        total: epochs or steps.
        shares: held in each round, growing.
        start: share of the run at which the first round begins.

    Raises:
        RbeError: there is no round, or a share is out of range.

    Source: MIRACLE, M. Havasi, R. Peharz, J. M. Hernandez-Lobato, arXiv 1810.00440: blocks are fixed one after the
    other, and the others retrained in between.
    """
    if not shares or not 0 < start < 1:
        raise RbeError(f"rounds: shares {tuple(shares)} must name one at least, start {start} must be in (0, 1)")
    length = (1.0 - start) / len(shares)
    ends = [start + length * (k + 1) for k in range(len(shares) - 1)] + [1.0]
    return Phases(total, (Phase(start), *(Phase(end, held=share) for end, share in zip(ends, shares, strict=True))))
