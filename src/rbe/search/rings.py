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
# Numbers in the table of waves that is made at a time.
_TABLE = 1 << 22


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


@lru_cache(maxsize=8)
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


def _waves(ring: Rings, low: int, high: int) -> Tensor:
    """cos and sin of q a for q in low ... high - 1: float64 (cells, 2 (high - low)), the cosines first."""
    phase = ring.angle[:, None] * torch.arange(low, high, dtype=torch.float64)
    return torch.cat([torch.cos(phase), torch.sin(phase)], 1)


@lru_cache(maxsize=4)
def _all_waves(height: int, width: int) -> Tensor:
    return _waves(rings(height, width), 0, WAVES)


def _by_ring(values: Tensor, ring: Rings, table: Tensor) -> Tensor:
    """Sums of values (n, cells) times a table (cells, m), ring by ring: (n, rings, m)."""
    out = values.new_empty((values.shape[0], len(ring.sizes), table.shape[1]))
    start = 0
    for k, size in enumerate(ring.sizes):
        torch.mm(values[:, start : start + size], table[start : start + size], out=out[:, k])
        start += size
    return out


def sums(blocks: Blocks) -> Tensor:
    """Sums of W cos(q a) and W sin(q a) over every ring: float64 (blocks, 2, 64, rings)."""
    shape = blocks.spec.block_shape
    ring = rings(*shape)
    values = blocks.values.double()[:, ring.order]
    return _over_waves(values, ring, shape).permute(0, 2, 3, 1).contiguous()


def _over_waves(values: Tensor, ring: Rings, shape: tuple[int, int]) -> Tensor:
    """`_by_ring` for all waves: (n, rings, 2, 64); a large block has its table made bit by bit."""
    cells = ring.order.numel()
    if cells * 2 * WAVES <= _TABLE:
        return _by_ring(values, ring, _all_waves(*shape)).reshape(len(values), -1, 2, WAVES)
    step = max(1, _TABLE // (2 * cells))
    parts = []
    for low in range(0, WAVES, step):
        high = min(low + step, WAVES)
        parts.append(_by_ring(values, ring, _waves(ring, low, high)).reshape(len(values), -1, 2, high - low))
    return torch.cat(parts, 3)


def gram(blocks: Blocks) -> Tensor:
    """Sums of cos^2, cos sin and sin^2 over every ring and kind of block: float64 (kinds, 3, 64, rings)."""
    ring = rings(*blocks.spec.block_shape)
    masks = blocks.masks.double()[:, ring.order]
    out = []
    twice = Rings(ring.radius, ring.order, ring.sizes, 2.0 * ring.angle)
    step = max(1, _TABLE // (2 * ring.order.numel()))
    count = _by_ring(masks, ring, masks.new_ones((masks.shape[1], 1)))  # (kinds, rings, 1)
    for low in range(0, WAVES, step):
        high = min(low + step, WAVES)
        cos, sin = _by_ring(masks, ring, _waves(twice, low, high)).chunk(2, 2)
        out.append(torch.stack([(count + cos) / 2, sin / 2, (count - cos) / 2], 1))
    return torch.cat(out, 3).transpose(2, 3).contiguous()
