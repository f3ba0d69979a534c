"""Training of open seeds with ordinary torch optimizers: schedules, and the guard that keeps seeds in the disk."""

from rbe.optim.hybrid import HybridAdam
from rbe.optim.schedules import PowerDecay, WarmupDecay
from rbe.optim.seeds import Guard, Points, damping, groups, guard, points, wrap
from rbe.optim.stream import StreamAdam

__all__ = [
    "Guard",
    "HybridAdam",
    "Points",
    "PowerDecay",
    "StreamAdam",
    "WarmupDecay",
    "damping",
    "groups",
    "guard",
    "points",
    "wrap",
]
