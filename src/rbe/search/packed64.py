"""Encode into `packed64` seeds: a linear fit in closed form (docs/format.md).

A block is c phi, c = g(r) sin(theta), so the best c is <W, phi> / <phi, phi>, and with several stages, each with a phi
of its own, the c of a block solve one small linear system. No search can do better; `rbe.search.reference` has the
searches of the papers, which arrive at the same numbers.
"""

import math

import torch
from torch import Tensor

from rbe.disk import radial_inverse
from rbe.formats import SeedSpec, packed64
from rbe.search.blocks import Blocks

# The largest |c| of a matrix: its radius is 0.63, where r and c are equally well conditioned.
LARGEST = 0.9


def best_coefficients(blocks: Blocks) -> Tensor:
    """The coefficients of least squared error: float64 (blocks, stages).

    >>> from rbe.formats import make_spec
    >>> from rbe.search.blocks import cut
    >>> spec = make_spec("packed64", (16, 16))
    >>> phi = packed64.modulation(16, 16, 0)
    >>> round(best_coefficients(cut(0.3 * phi, spec)).item(), 6)
    0.3
    """
    spec = blocks.spec
    phi = torch.stack([packed64.modulation(*spec.block_shape, s).flatten() for s in range(spec.stages)])
    known = blocks.values.double() @ phi.T
    masked = phi[None] * blocks.masks.double()[:, None]
    # A block with fewer cells than stages has many best solutions; the pseudo-inverse takes the smallest.
    inverse = torch.linalg.pinv(masked @ phi.T, hermitian=True, rtol=1e-12)[blocks.kind]
    solved: Tensor = torch.einsum("bst,bt->bs", inverse, known)
    return solved


def seeds_of(coefficients: Tensor, scale: float, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(code, radius, angle) of coefficients (blocks, stages): the angle is a quarter turn, either way, r has the size.

    The radius is half a unit above, because `join` takes the floor.
    """
    c = coefficients / scale if scale > 0 else torch.zeros_like(coefficients)
    radius = radial_inverse(c.abs().clamp_max(1.0 - 2.0**-40))
    half = 2.0**-33 if spec.precision == 32 else 0.0
    radius = torch.where(c == 0, 0.0, (radius + half).clamp_max(1.0 - 2.0**-32))
    angle = torch.where(c < 0, 3 * math.pi / 2, math.pi / 2).double()
    return torch.empty(len(c), 0, dtype=torch.int64), radius, angle
