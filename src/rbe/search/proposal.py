"""Spectral proposal for `packed128`: the best profile and angular frequency of every block, amplitude and phase solved.

For an angular frequency q and a profile p over the radius, the best amplitude and phase solve a 2x2 linear system in
the sums of the rings (`rbe.search.rings`); the energy it captures ranks (p, q). The four basis functions are two lines:
cosh(t rho), t > 0, meets sech^2(-t rho), t < 0, in the constant; sinh and tanh meet in the straight line. So a profile
is a family, even or odd, and one number t, |t| = alpha K r, and the search is a grid over t that is halved around its
best points.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rbe.formats import packed128
from rbe.search.blocks import Blocks
from rbe.search.rings import WAVES, gram, rings, sums

# The largest alpha K r: of a frequency of 10 and a radius of 0.97.
STEEPEST = 16.0
# The odd family loses its shape below: sinh(0.1 rho) is a straight line to a part in a thousand.
FLATTEST = 0.1
# The ridge of a singular system, relative to its trace: a wave that is 0 on all cells gets the coefficient 0.
_RIDGE = 1e-10
# Amplitudes of a profile go up to this many times the largest weight of the block.
_LOUDEST = 8.0
EVEN, ODD = 0, 1
QUADRANTS = torch.tensor([[3, 1], [2, 0]])  # family and whether t >= 0 to the basis function


@dataclass(frozen=True)
class Atoms:
    """Unquantised seeds: f(steepness * rho) (cosine cos(q a) + sine sin(q a)), all (blocks, stages).

    Attributes:
        quadrant: int64, the basis function f.
        wave: int64, q.
        steepness: float64, alpha K r.
        cosine, sine: float64, the amplitude and phase.
    """

    quadrant: Tensor
    wave: Tensor
    steepness: Tensor
    cosine: Tensor
    sine: Tensor

    def basis(self, shape: tuple[int, int]) -> Tensor:
        """The two waves of every stage: float64 (blocks, 2 stages, cells), the cosines first."""
        rho, angle = (table.flatten() for table in packed128.cells(*shape))
        profile = packed128.basis(self.quadrant[..., None], self.steepness[..., None] * rho)[0]
        phase = self.wave[..., None] * angle
        return torch.cat([profile * torch.cos(phase), profile * torch.sin(phase)], 1)

    def peaks(self) -> Tensor:
        """The largest value of every stage's profile, (blocks, 2 stages) like the coefficients."""
        peak = _peak(self.quadrant, self.steepness)
        return torch.cat([peak, peak], 1)

    @property
    def coefficients(self) -> Tensor:
        """(blocks, 2 stages), the cosines first."""
        return torch.cat([self.cosine, self.sine], 1)

    def with_coefficients(self, both: Tensor) -> "Atoms":
        """The same shapes with other amplitudes and phases."""
        cosine, sine = both.chunk(2, 1)
        return Atoms(self.quadrant, self.wave, self.steepness, cosine, sine)

    def part(self, chosen: slice | Tensor) -> "Atoms":
        """Some of the blocks."""
        return Atoms(*(table[chosen] for table in self.tables))

    def stage(self, s: int) -> "Atoms":
        """One stage."""
        return Atoms(*(table[:, s : s + 1] for table in self.tables))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tensors."""
        return self.quadrant, self.wave, self.steepness, self.cosine, self.sine


def stack(parts: list[Atoms], dim: int) -> Atoms:
    """Atoms of several chunks of blocks (0) or of several stages (1) as one."""
    return Atoms(*(torch.cat(tables, dim) for tables in zip(*(part.tables for part in parts), strict=True)))


@dataclass(frozen=True)
class Grid:
    """How finely the profiles are searched.

    Attributes:
        points: of each family on the first level; 1 is the constant profile alone.
        levels: how often the spacing is then halved around the best points.
        keep: families and frequencies of a block that go on to the finer levels.
        saturating: whether sech^2 and tanh, which have no small amplitudes of full precision, may be chosen.
    """

    points: int
    levels: int
    keep: int
    saturating: bool = True


FLAT = Grid(1, 0, 1)


def _steepness(place: Tensor, family: Tensor | int) -> Tensor:
    """Signed t of a place in [-1, 1] on the line of a family: denser around the flat profiles."""
    t = STEEPEST * place.sign() * place.abs().pow(1.5)
    odd = torch.where(place < 0, t.clamp_max(-FLATTEST), t.clamp_min(FLATTEST))
    return torch.where(torch.as_tensor(family) == ODD, odd, t)


def _profile(t: Tensor, family: Tensor | int, rho: Tensor) -> Tensor:
    """(..., rings) of t (...)."""
    quadrant = QUADRANTS[torch.as_tensor(family), (t >= 0).long()]
    return packed128.basis(quadrant[..., None], t.abs()[..., None] * rho)[0]


def _solve(known: tuple[Tensor, Tensor], system: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Captured energy and coefficients of the waves, from their inner products with W and with each other."""
    (c, s), (cc, cs, ss) = known, system
    ridge = _RIDGE * (cc + ss) + 1e-30  # profiles are of the order of 1: on this block this one is 0
    cc, ss = cc + ridge, ss + ridge
    determinant = cc * ss - cs * cs
    cosine = (ss * c - cs * s) / determinant
    sine = (cc * s - cs * c) / determinant
    return cosine * c + sine * s, cosine, sine


def _three(system: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    cc, cs, ss = system.unbind(dim)
    return cc, cs, ss


def propose(blocks: Blocks, grid: Grid) -> Atoms:
    """The best single atom of every block.

    >>> from rbe.formats import make_spec
    >>> from rbe.search.blocks import cut
    >>> rho, a = packed128.cells(16, 16)
    >>> W = torch.tanh(3 * rho) * torch.cos(5 * a + 1)
    >>> found = propose(cut(W, make_spec("packed128", (16, 16))), Grid(17, 8, 2))
    >>> found.quadrant.item(), found.wave.item(), round(found.steepness.item(), 1)
    (2, 5, 3.0)
    """
    rho = rings(*blocks.spec.block_shape).radius
    inner, norms = sums(blocks), gram(blocks)
    most = (_LOUDEST * blocks.values.abs().amax(1).double()).square()
    place = torch.linspace(-1.0, 1.0, grid.points, dtype=torch.float64) if grid.points > 1 else torch.zeros(1).double()
    if not grid.saturating:
        place = place.abs()
    found = []
    for family in (EVEN, ODD) if grid.points > 1 else (EVEN,):
        t = _steepness(place, family)
        profile = _profile(t, family, rho)  # (points, rings)
        known = inner @ profile.T  # (blocks, 2, waves, points)
        system = (norms @ profile.square().T)[blocks.kind]  # (blocks, 3, waves, points)
        energy, cosine, sine = _solve((known[:, 0], known[:, 1]), _three(system, 1))
        found.append(_quiet(energy, cosine, sine, t, family, most[:, None, None]).max(-1))
    ranked = torch.stack([f.values for f in found], 1).flatten(1)  # (blocks, families * waves)
    where = torch.stack([f.indices for f in found], 1).flatten(1)
    best = ranked.topk(min(grid.keep, ranked.shape[1])).indices  # (blocks, keep)
    wave, which = best % WAVES, best // WAVES  # which family

    at = place[where.gather(1, best)]
    rows = torch.arange(len(blocks))[:, None]
    inner = inner.transpose(1, 2)[rows, wave]  # (blocks, keep, 2, rings)
    norms = norms.transpose(1, 2)[blocks.kind[:, None], wave]  # (blocks, keep, 3, rings)

    def solve(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = _steepness(at, which)
        profile = _profile(t, which, rho)
        known = (inner * profile[:, :, None]).sum(-1)
        system = (norms * profile.square()[:, :, None]).sum(-1)
        energy, cosine, sine = _solve((known[..., 0], known[..., 1]), _three(system, -1))
        return _quiet(energy, cosine, sine, t, which, most[:, None]), cosine, sine

    value = solve(at)[0]
    spacing = 2.0 / max(grid.points - 1, 1)
    for level in range(1, grid.levels + 1):
        for side in (-1.0, 1.0):
            near = (at + side * spacing / 2**level).clamp(-1.0 if grid.saturating else 0.0, 1.0)
            other = solve(near)[0]
            at, value = torch.where(other > value, near, at), torch.maximum(other, value)
    winner = value.argmax(1, keepdim=True)
    _, cosine, sine = solve(at)
    t = _steepness(at, which)
    quadrant = QUADRANTS[which, (t >= 0).long()]
    return Atoms(*(table.gather(1, winner) for table in (quadrant, wave, t.abs(), cosine, sine)))


def _quiet(energy: Tensor, cosine: Tensor, sine: Tensor, t: Tensor, family: Tensor | int, most: Tensor) -> Tensor:
    """The energy, or -1 where it takes an amplitude whose square is above `most`.

    A wave that happens to vanish on the few cells where its profile is large would fit them with an enormous amplitude:
    one such block would decide the scale of the matrix, and the others would lose their digits. The constant profile,
    whose amplitudes have many digits, is always allowed.
    """
    peak = _peak(QUADRANTS[torch.as_tensor(family), (t >= 0).long()], t.abs())
    loud = (cosine.square() + sine.square()) * peak.square() > most
    flat = (t == 0) & (torch.as_tensor(family) == EVEN)
    # As good is not better: the constant profile has the finest amplitudes, sech^2 and tanh have the coarsest.
    handicap = torch.where(flat, 0.0, torch.where(t < 0, 1e-6, 1e-8))
    return torch.where(loud & ~flat, -1.0, energy * (1.0 - handicap))


def _peak(quadrant: Tensor, steepness: Tensor) -> Tensor:
    """The largest value of a profile on the unit disk."""
    return torch.where(quadrant == 3, 1.0, packed128.basis(quadrant, steepness)[0])
