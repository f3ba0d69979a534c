"""Blocks seen from their centre: sums over the cells of equal radius, for every angular frequency.

In `packed128` a weight is a function of the cell's radius times cos(q a + phase), a the cell's angle. Whatever is asked
about a profile over the radius follows from the sums of W cos(q a) and W sin(q a) over each ring of cells: a
16x16 block has 28 rings, so a profile costs 28 numbers instead of 256.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rbe.formats import packed128
from rbe.search.blocks import Blocks

# Angular frequencies 0 ... 63.
WAVES = 64
# A block with more different radii than this has rings of a finite width; the fit that follows is exact again.
MOST_RINGS = 512
# Cells whose waves are made at a time, and up to which a block's are kept.
_CELLS = 1 << 14


@dataclass(frozen=True)
class Rings:
    """The rings of a block shape.

    Attributes:
        radius: float64 (rings,), the cells' radius in [0, 0.99].
        order: int64 (cells,), the cells ring by ring.
        sizes: how many cells each ring has.
        angle: float64 (cells,), the cells' angle, in that order.
    """

    radius: Tensor
    order: Tensor
    sizes: tuple[int, ...]
    angle: Tensor


@lru_cache(maxsize=2)  # of a whole matrix they are large
def rings(height: int, width: int) -> Rings:
    """The rings of a block.

    >>> rings(16, 16).radius.numel(), rings(1, 1).radius.tolist()
    (22, [0.0])
    """
    rho, angle = (table.flatten() for table in packed128.cells(height, width))
    radius, ring = (rho * 1e9).round().unique(return_inverse=True)  # type: ignore[no-untyped-call]
    radius = radius / 1e9
    if radius.numel() > MOST_RINGS:
        radius = (torch.arange(MOST_RINGS, dtype=torch.float64) + 0.5) * (packed128.LARGEST_RADIUS / MOST_RINGS)
        # The cells at the rim, many and all at one radius, get a ring of their own.
        ring = torch.bucketize(rho, radius + 0.5 * packed128.LARGEST_RADIUS / MOST_RINGS).clamp_max(MOST_RINGS - 1)
        ring = torch.where(rho >= packed128.LARGEST_RADIUS, MOST_RINGS, ring)
        radius = torch.cat([radius, radius.new_tensor([packed128.LARGEST_RADIUS])])
    order = ring.argsort(stable=True)
    sizes = tuple(torch.bincount(ring, minlength=radius.numel()).tolist())
    return Rings(radius, order, sizes, angle[order])


def _waves(angle: Tensor) -> Tensor:
    """cos(q a) and sin(q a) for all q: float64 (cells, 128), the cosines first."""
    # Of the sum of two angles, q = 8 k + l: an eighth of the sines and cosines.
    low, high = (angle[:, None] * (step * torch.arange(8, dtype=torch.float64)) for step in (1.0, 8.0))
    c, s = low.cos()[:, None, :], low.sin()[:, None, :]
    big_c, big_s = high.cos()[:, :, None], high.sin()[:, :, None]
    return torch.cat([(big_c * c - big_s * s).flatten(1), (big_s * c + big_c * s).flatten(1)], 1)


@lru_cache(maxsize=8)
def _kept(height: int, width: int, times: int) -> Tensor:
    return _waves(times * rings(height, width).angle)


def _by_ring(values: Tensor, shape: tuple[int, int], times: int = 1) -> Tensor:
    """Sums of values (n, cells), in the rings' order, times the waves of a multiple of the angle: (n, 128, rings)."""
    ring = rings(*shape)
    out = values.new_zeros((values.shape[0], len(ring.sizes), 2 * WAVES))
    table = _kept(*shape, times) if values.shape[1] <= _CELLS else None
    start = 0
    for k, size in enumerate(ring.sizes):
        for first in range(start, start + size, _CELLS):
            part = slice(first, min(first + _CELLS, start + size))
            waves = _waves(times * ring.angle[part]) if table is None else table[part]
            out[:, k].addmm_(values[:, part], waves)
        start += size
    return out.transpose(1, 2)


def sums(blocks: Blocks) -> Tensor:
    """Sums of W cos(q a) and W sin(q a) over every ring: float64 (blocks, 2, 64, rings)."""
    shape = blocks.spec.block_shape
    found = _by_ring(blocks.values.double()[:, rings(*shape).order], shape)
    return found.reshape(len(blocks), 2, WAVES, -1)


def gram(blocks: Blocks) -> Tensor:
    """Sums of cos^2, cos sin and sin^2 over every ring and kind of block: float64 (kinds, 3, 64, rings)."""
    shape = blocks.spec.block_shape
    double = _by_ring(blocks.masks.double()[:, rings(*shape).order], shape, times=2)
    cos, sin = double.reshape(len(blocks.masks), 2, WAVES, -1).unbind(1)
    count = cos[:, :1]  # of q = 0
    return torch.stack([(count + cos) / 2, sin / 2, (count - cos) / 2], 1)
