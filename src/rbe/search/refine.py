"""Fit the points (r, theta) of seeds whose discrete bits are given: Levenberg-Marquardt and Riemannian Adam.

All blocks go side by side, each with its own damping or step, and each stops by itself. Derivatives are those of the
format, analytic.

Sources: K. Levenberg 1944, D. Marquardt 1963; G. Becigneul, O.-E. Ganea, Riemannian Adaptive Optimization Methods,
2019; 001 sections 8.3.2 (when to stop) and 8.6.1 (the map of the radius), 003 section 4.2.2 (condition of the steps).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe import disk, formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, packed128
from rbe.search.blocks import Blocks

# The largest radius that a fit goes to (the ranges of the papers).
LARGEST_RADIUS = {"packed64": 0.999, "packed128": 0.99}


@dataclass(frozen=True)
class Stop:
    """When a fit of one block ends; the loss is the squared error relative to the block's energy.

    >>> spec = formats.make_spec("packed128", (16, 16), mode="faithful")
    >>> radius = torch.tensor([0.5, 0.9], dtype=torch.float64)
    >>> (condition(radius, spec) <= Stop(condition=2.0).condition).tolist()  # where a fit with this C_max may go
    [True, False]

    Attributes:
        gradient: it has converged where the Riemannian gradient of the loss is shorter than this (epsilon),
        change: or where an accepted step changes the loss by less than this (delta).
        steps: the most steps.
        condition: points where the steps of the generator are worse conditioned than this are refused (C_max).
        rim: epsilon of r = s / (1 + epsilon s): the fit moves s, so that r stays below 1 / (1 + epsilon). 0 is r = s.
    """

    gradient: float = 1e-7
    change: float = 1e-10
    steps: int = 20
    condition: float = 1000.0
    rim: float = 0.0

    def __post_init__(self) -> None:
        # Asked the positive way round, which NaN fails.
        if not (self.steps >= 0 and 0 <= self.rim < math.inf and self.condition >= 1):
            raise RbeError(
                f"Stop: steps {self.steps} and rim {self.rim} must not be negative, condition {self.condition} not "
                "below 1, the best there is, and none may be NaN"
            )
        if not (self.gradient >= 0 and self.change >= 0):
            raise RbeError(
                f"Stop: gradient {self.gradient} and change {self.change} must not be negative or NaN; 0 never stops"
            )


@dataclass(frozen=True)
class Problem:
    """Blocks to approximate by seeds with given discrete bits.

    Attributes:
        blocks: what to approximate, divided by the scale: float64 (blocks, cells).
        code: int64 (blocks, stages) for packed128, (blocks, 0) for packed64.
    """

    blocks: Blocks
    code: Tensor

    @property
    def spec(self) -> SeedSpec:
        """The specification of the seeds."""
        return self.blocks.spec

    def part(self, chosen: slice | Tensor) -> "Problem":
        """Some of the blocks."""
        return Problem(self.blocks.part(chosen), self.code[chosen])

    def energy(self) -> Tensor:
        """What the loss is relative to: float64 (blocks,), 1 for a block of zeros."""
        energy = self.blocks.values.double().square().sum(1)
        return torch.where(energy == 0, 1.0, energy)

    def errors(self, radius: Tensor, angle: Tensor) -> Tensor:
        """What the seeds leave of the blocks, float64 (blocks, cells)."""
        made = formats.disk(self.spec.format).values(self.code, radius, angle, self.spec).flatten(1)
        return (self.blocks.values.double() - made) * self.blocks.exists

    def loss(self, radius: Tensor, angle: Tensor) -> Tensor:
        """(blocks,) of points float64 (blocks, stages)."""
        return self.errors(radius, angle).square().sum(1) / self.energy()

    def slopes(self, radius: Tensor, angle: Tensor) -> Tensor:
        """Derivatives of the weights, the radii first: float64 (blocks, 2 stages, cells)."""
        both = formats.disk(self.spec.format).derivatives(self.code, radius, angle, self.spec)
        return torch.cat([d.flatten(2) for d in both], 1) * self.blocks.exists[:, None]

    def gradient(self, radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss in the radius and the angle, each (blocks, stages)."""
        slopes = self.slopes(radius, angle)
        both = -2.0 * (slopes @ self.errors(radius, angle)[..., None])[..., 0] / self.energy()[:, None]
        d_radius, d_angle = both.chunk(2, 1)
        return d_radius, d_angle

    @property
    def most(self) -> float:
        """The largest radius."""
        return LARGEST_RADIUS[self.spec.format]


@dataclass(frozen=True)
class Fit:
    """Where a fit arrived.

    Attributes:
        radius, angle: float64 (blocks, stages).
        loss: float64 (blocks,), squared error relative to the block's energy.
        converged: bool (blocks,), whether a criterion was met before the steps ran out.
    """

    radius: Tensor
    angle: Tensor
    loss: Tensor
    converged: Tensor


def condition(radius: Tensor, spec: SeedSpec) -> Tensor:
    """Condition number of the generator's steps, as a map of the start point to the end point; radius' shape.

    >>> spec = formats.make_spec("packed128", (16, 16), mode="faithful")
    >>> [round(c.item(), 2) for c in condition(torch.tensor([0.5, 0.9], dtype=torch.float64), spec)]
    [1.0, 3.24]

    The steps are turns and stretches, of condition 1 whatever the bits; only the clamp of the faithful mode, which
    presses outward radii together, has another one. Without steps (packed64) it is 1.

    Source: 003 section 4.2.2.
    """
    if spec.format != "packed128" or spec.mode != "faithful":
        return torch.ones_like(radius)
    end, along = packed128.final_radius(radius)
    across = torch.where(radius == 0, along, end / torch.where(radius == 0, 1.0, radius))
    return torch.maximum(along, across) / torch.minimum(along, across)


def _length(radius: Tensor, d_radius: Tensor, d_angle: Tensor) -> Tensor:
    """Riemannian length of gradients, over all stages: (blocks,)."""
    inverse = (disk.radial_gap(radius) / 2).square()
    around = d_angle / radius.clamp_min(0.01)
    return (inverse * (d_radius.square() + around.square())).sum(1).sqrt()


def _metric(radius: Tensor) -> Tensor:
    """Diagonal of the metric in the radii and the angles: (blocks, 2 stages); an angle's never vanishes."""
    along = (2.0 / disk.radial_gap(radius)).square()
    return torch.cat([along, along * radius.clamp_min(0.01).square()], 1)


def _allowed(problem: Problem, radius: Tensor, stop: Stop) -> Tensor:
    """Whether all points of a block are conditioned well enough."""
    return (condition(radius, problem.spec) <= stop.condition).all(1)


def through_origin(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Points whose radius a step has made negative: they have gone straight through the origin to the other side.

    >>> [round(v.item(), 6) for v in through_origin(torch.tensor(-0.5), torch.tensor(0.0))]
    [0.5, 3.141593]
    """
    return radius.abs(), torch.where(radius < 0, angle + torch.pi, angle)


class _Rim:
    """r = s / (1 + epsilon s) and back."""

    def __init__(self, epsilon: float, most: float) -> None:
        self.epsilon, self.most = epsilon, most

    def radius(self, s: Tensor) -> Tensor:
        return s / (1.0 + self.epsilon * s)

    def slope(self, s: Tensor) -> Tensor:
        return 1.0 / (1.0 + self.epsilon * s).square()

    def inside(self, s: Tensor) -> Tensor:
        return s.clamp(0.0, self.most)

    def start(self, radius: Tensor) -> Tensor:
        room = (1.0 - self.epsilon * radius).clamp_min(1e-9)
        return self.inside(radius / room)


def levenberg_marquardt(problem: Problem, radius: Tensor, angle: Tensor, stop: Stop | None = None) -> Fit:
    """Refine points by damped Gauss-Newton steps, all stages of a block together; the loss never grows.

    >>> from rbe.search.blocks import cut
    >>> spec = formats.make_spec("packed64", (16, 16))
    >>> blocks = cut(0.8 * formats.packed64.modulation(16, 16, 0), spec)  # g(0.5) is 0.8
    >>> problem = Problem(blocks, torch.empty(1, 0, dtype=torch.int64))
    >>> start = torch.tensor([[0.3]]).double(), torch.tensor([[1.4]]).double()
    >>> levenberg_marquardt(problem, *start).loss.item() < 1e-9
    True

    Args:
        problem: blocks and discrete bits.
        radius, angle: float64 (blocks, stages), where to start.
        stop: when to end.
    """
    stop = stop or Stop()
    rim = _Rim(stop.rim, problem.most)
    s, angle = rim.start(radius.double()), angle.double().clone()
    loss = problem.loss(rim.radius(s), angle)
    damping = torch.full_like(loss, 1e-3)
    converged = torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(stop.steps):
        live = (~converged).nonzero()[:, 0]
        if live.numel() == 0:
            break
        now = problem.part(live)
        here, turn = s[live], angle[live]
        at = rim.radius(here)
        slopes = now.slopes(at, turn)
        slopes = torch.cat([slopes[:, : s.shape[1]] * rim.slope(here)[..., None], slopes[:, s.shape[1] :]], 1)
        pull = (slopes @ now.errors(at, turn)[..., None])[..., 0]
        matrix = slopes @ slopes.mT
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        # Damped in the metric of the disk: a seed of packed64 has a curve of best points, and this goes straight to it.
        metric = _metric(here)
        largest = (diagonal / metric).amax(1, keepdim=True) + torch.finfo(torch.float64).tiny
        extra = (damping[live, None] + 1e-12) * largest * metric
        step = torch.linalg.solve(matrix + torch.diag_embed(extra), pull[..., None])[..., 0]
        d_s, d_angle = step.chunk(2, 1)
        there, turned = through_origin(here + d_s, turn + d_angle)
        # Where weights hardly feel the angle steps are huge; whole turns, which change none, would cost it its digits.
        turned = turned.fmod(2 * torch.pi)
        there = rim.inside(there)
        value = now.loss(rim.radius(there), turned)
        better = (value < loss[live]) & _allowed(now, rim.radius(there), stop)
        change = loss[live] - value
        d_loss = -2.0 * pull / now.energy()[:, None]
        flat = _length(at, *d_loss.chunk(2, 1)) < stop.gradient
        taken = live[better]
        s[taken], angle[taken], loss[taken] = there[better], turned[better], value[better]
        damping[live] = torch.where(better, damping[live] / 5.0, damping[live] * 7.0)
        # A block that no step improves any more is at its minimum, or held by a bound.
        converged[live] = flat | (better & (change < stop.change)) | (damping[live] > 1e9)
    return Fit(rim.radius(s), angle, loss, converged)


def riemannian_adam(
    problem: Problem, radius: Tensor, angle: Tensor, stop: Stop | None = None, rate: float = 0.1
) -> Fit:
    """Refine points by Adam on the disk; the best point on the way is kept, so the loss never grows.

    The second moment is of the gradient's Riemannian length: dividing each polar coordinate by its own root would undo
    the metric. A step follows the exponential map.

    Args:
        problem: blocks and discrete bits.
        radius, angle: float64 (blocks, stages), where to start.
        stop: when to end; its steps are few for this method, give some hundreds.
        rate: hyperbolic length of the first steps; it falls to nothing over the steps.
    """
    stop = stop or Stop(steps=300)
    rim = _Rim(stop.rim, problem.most)
    s, turn = rim.start(radius.double()), angle.double().clone()
    best = [s.clone(), turn.clone(), problem.loss(rim.radius(s), turn)]
    momentum = torch.zeros(*s.shape, 2, dtype=torch.float64)
    second = torch.zeros_like(s)
    converged = torch.zeros_like(best[2], dtype=torch.bool)
    last = best[2].clone()
    for k in range(1, stop.steps + 1):
        if bool(converged.all()):
            break
        d_radius, d_angle = problem.gradient(rim.radius(s), turn)
        d_radius = d_radius * rim.slope(s)
        converged |= _length(s, d_radius, d_angle) < stop.gradient
        # Components in a frame of hyperbolic unit length, in which the momentum is carried along.
        unit = disk.radial_gap(s) / 2
        around = d_angle / s.clamp_min(0.01)
        cos, sin = torch.cos(turn), torch.sin(turn)
        plane = torch.stack([d_radius * cos - around * sin, d_radius * sin + around * cos], -1)
        gradient = plane * unit[..., None]
        momentum = 0.9 * momentum + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square().sum(-1)
        size = (second / (1 - 0.99**k)).sqrt() + 1e-12
        fall = rate * 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * k / (stop.steps + 1)))).item()
        step = -fall * momentum / (1 - 0.9**k) * (unit / size)[..., None]
        moved = disk.exp(disk.to_cartesian(s, turn), step)
        there, turned = disk.to_polar(moved)
        there = rim.inside(there)
        free = (~converged & _allowed(problem, rim.radius(there), stop))[:, None]
        s, turn = torch.where(free, there, s), torch.where(free, turned, turn)
        value = problem.loss(rim.radius(s), turn)
        better = value < best[2]
        best = [
            torch.where(better[:, None], s, best[0]),
            torch.where(better[:, None], turn, best[1]),
            torch.minimum(value, best[2]),
        ]
        converged |= ((last - value).abs() < stop.change) & free[:, 0]
        last = value
    return Fit(rim.radius(best[0]), best[1], best[2], converged)
