"""The searches of the papers over the points of one seed a block: grid, several starts, gradient descent.

`encode` does not need them: it solves for what they look for. They are here to be compared with.

Source: 001 section 8.3; readings 42 and 43 of the sources.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe import disk
from rbe.errors import RbeError
from rbe.search.refine import Fit, Problem, Stop, levenberg_marquardt, through_origin

# The first level of the grid, as printed.
COARSE_RADII = (0.1, 0.3, 0.5, 0.7, 0.9)
COARSE_ANGLES = (0.0, math.pi / 2, math.pi, 3 * math.pi / 2)


def grid(problem: Problem, levels: int = 24) -> Fit:
    """Adaptive grid: the coarse points of the paper, then a 5x5 grid around the best point whose spacing halves.

    >>> from rbe import formats
    >>> from rbe.search.blocks import cut
    >>> spec = formats.make_spec("packed64", (4, 4), block=4)
    >>> problem = Problem(cut(-0.3 * formats.packed64.modulation(4, 4, 0), spec), torch.empty(1, 0, dtype=torch.int64))
    >>> grid(problem).loss.item() < 1e-9
    True

    Level k has spacings 0.999 / 2^k in the radius and 2 pi / (4 2^k) in the angle. The point stays where no neighbour
    is better, so the loss never grows.

    Raises:
        RbeError: there are several stages; a grid is over one point.
    """
    _single(problem)
    radii, angles = torch.tensor(COARSE_RADII).double(), torch.tensor(COARSE_ANGLES).double()
    radius, angle, loss = _best(problem, radii.repeat_interleave(4)[None], angles.repeat(5)[None])
    offsets = torch.arange(-2, 3, dtype=torch.float64)
    for k in range(1, levels + 1):
        r = radius + (offsets * 0.999 / 2**k).repeat_interleave(5)
        a = angle + (offsets * math.tau / (4 * 2**k)).repeat(5)
        r, a, value = _best(problem, r.clamp(0.0, problem.most), a)
        better = value < loss
        radius, angle = torch.where(better[:, None], r, radius), torch.where(better[:, None], a, angle)
        loss = torch.minimum(loss, value)
    return Fit(radius, angle, loss, torch.ones_like(loss, dtype=torch.bool))


def _single(problem: Problem) -> None:
    if problem.spec.stages != 1:
        raise RbeError(f"search: this method looks for one point a block, but there are {problem.spec.stages} stages")


def _best(problem: Problem, radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of several points (blocks or 1, points) of every block: radius, angle (blocks, 1), loss (blocks,)."""
    count = len(problem.blocks)
    shape = (count, radius.shape[1])
    r, a = radius.expand(shape), angle.expand(shape)
    columns = [problem.loss(r[:, k : k + 1], a[:, k : k + 1]) for k in range(shape[1])]
    loss, where = torch.stack(columns, 1).min(1)
    return r.gather(1, where[:, None]), a.gather(1, where[:, None]), loss


def gradient_descent(problem: Problem, radius: Tensor, angle: Tensor, stop: Stop | None = None) -> Fit:
    """Steepest descent along the Riemannian gradient, the step of every block halved until the loss falls.

    Args:
        problem: blocks and discrete bits.
        radius, angle: float64 (blocks, stages), where to start.
        stop: when to end.
    """
    stop = stop or Stop(steps=500)
    radius, angle = radius.double().clamp(0.0, problem.most), angle.double()
    loss = problem.loss(radius, angle)
    size = torch.ones_like(loss)
    converged = torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(stop.steps):
        if bool(converged.all()):
            break
        d_radius, d_angle = problem.gradient(radius, angle)
        down, around = disk.polar_gradient(radius, d_radius, d_angle, least_radius=0.01)
        there, turned = through_origin(radius - size[:, None] * down, angle - size[:, None] * around)
        there = there.clamp_max(problem.most)
        value = problem.loss(there, turned)
        slope = (down * d_radius + around * d_angle).sum(1)
        better = (value < loss - 1e-4 * size * slope) & ~converged
        converged |= slope.clamp_min(0.0).sqrt() < stop.gradient
        converged |= better & (loss - value < stop.change)
        radius, angle = torch.where(better[:, None], there, radius), torch.where(better[:, None], turned, angle)
        loss = torch.where(better, value, loss)
        size = torch.where(better, size * 2.0, size / 2.0).clamp(1e-12, 1e6)
    return Fit(radius, angle, loss, converged)


@dataclass(frozen=True)
class Starts:
    """What several starting points came to.

    Attributes:
        fit: the best of every block.
        success: float64 (blocks,), the share p of starts that came to the best loss, within the tolerance.
    """

    fit: Fit
    success: Tensor

    def probability(self, starts: int) -> Tensor:
        """1 - (1 - p)^n: how likely at least one of n starts arrives."""
        return 1.0 - (1.0 - self.success) ** starts


def uniform(count: int, starts: int, seed: int, hyperbolic: float | None = None) -> tuple[Tensor, Tensor]:
    """Starting points in the disk: radius and angle, float64 (count, starts).

    >>> radius, angle = uniform(1, 1000, seed=0)
    >>> bool((radius < 1).all()), round(radius.square().mean().item(), 1)
    (True, 0.5)

    Args:
        hyperbolic: r = sqrt(u) is uniform in the Euclidean disk; a number here makes it uniform in the hyperbolic disk
            of that radius instead: cosh(2 artanh r) = 1 + u (cosh R - 1).
    """
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.rand(2, count, starts, generator=generator, dtype=torch.float64)
    radius = u.sqrt() if hyperbolic is None else torch.tanh(torch.acosh(1 + u * (math.cosh(hyperbolic) - 1)) / 2)
    return radius, math.tau * v


def multi_start(
    problem: Problem, starts: int = 16, seed: int = 0, stop: Stop | None = None, tolerance: float = 1e-6
) -> Starts:
    """Levenberg-Marquardt from several points of the disk.

    >>> from rbe import formats
    >>> from rbe.search.blocks import cut
    >>> spec = formats.make_spec("packed64", (16, 16))
    >>> blocks = cut(0.8 * formats.packed64.modulation(16, 16, 0), spec)  # one seed makes it without an error
    >>> found = multi_start(Problem(blocks, torch.empty(1, 0, dtype=torch.int64)), starts=4)
    >>> found.fit.loss.item() < 1e-9, found.success.item(), found.probability(16).item()
    (True, 1.0, 1.0)

    Args:
        problem: blocks and discrete bits, one stage.
        starts: points a block, r = sqrt(u), theta = 2 pi v.
        seed: of the points.
        stop: when one of the fits ends.
        tolerance: of the loss, within which a start counts as arrived.

    Raises:
        RbeError: there are several stages, or no starts.
    """
    _single(problem)
    if starts < 1:
        raise RbeError(f"multi_start: {starts} starts; give 1 or more")
    radius, angle = uniform(len(problem.blocks), starts, seed)
    stop = stop or Stop(steps=60)
    fits = [levenberg_marquardt(problem, radius[:, k : k + 1], angle[:, k : k + 1], stop) for k in range(starts)]
    losses = torch.stack([fit.loss for fit in fits], 1)
    best, where = losses.min(1)
    tables = [torch.stack([table(fit) for fit in fits], 1) for table in (_radius, _angle, _converged)]
    r, a, converged = (table[torch.arange(len(where)), where] for table in tables)
    return Starts(Fit(r, a, best, converged), (losses <= best[:, None] + tolerance).double().mean(1))


def _radius(fit: Fit) -> Tensor:
    return fit.radius


def _angle(fit: Fit) -> Tensor:
    return fit.angle


def _converged(fit: Fit) -> Tensor:
    return fit.converged
