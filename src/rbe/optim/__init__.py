"""Training of open seeds: one optimizer for all of them, schedules and phases, and a guard for any torch optimizer."""

from rbe.optim.hybrid import HybridAdam
from rbe.optim.penalties import hyperbolic_penalty, state_entropy, total_entropy
from rbe.optim.phases import Phase, Phases, rounds, three_phases
from rbe.optim.schedules import Cooling, PowerDecay, WarmupDecay
from rbe.optim.seeds import Guard, Points, damping, groups, guard, points, wrap
from rbe.optim.stream import StreamAdam

__all__ = [
    "Cooling",
    "Guard",
    "HybridAdam",
    "Phase",
    "Phases",
    "Points",
    "PowerDecay",
    "StreamAdam",
    "WarmupDecay",
    "damping",
    "groups",
    "guard",
    "hyperbolic_penalty",
    "points",
    "rounds",
    "state_entropy",
    "three_phases",
    "total_entropy",
    "wrap",
]
