"""Products and gradients of matrices that come in bands of rows: whatever generates them, nothing whole is stored."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

import rbe._cpu as _cpu
from rbe.formats import SeedSpec
from rbe.kernels.tensors import Tensors
from rbe.rotation import rotate, rotate_back

# Numbers of the one band of the matrix, and of the one band of its gradient: 4 MB, inside the second-level caches of
# two cores.
TILE = 1 << 20

Gradients = tuple[Tensor, Tensor, Tensor]


class Source(Protocol):
    """What generates a matrix before its rotations, W~, in `dtype`."""

    @property
    def spec(self) -> SeedSpec:
        """What the matrix is."""

    @property
    def tensors(self) -> Tensors:
        """Its tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64, the precision of the bands."""

    def bands(self, tile: int, /) -> Iterator[tuple[slice, Tensor]]:
        """Bands of about `tile` weights, scaled; one may overwrite the one before."""

    def cuts(self, tile: int, /) -> Iterator[slice]:
        """The rows of these bands."""

    def rows(self, index: Tensor, /) -> Tensor:
        """Single rows, scaled."""

    def contract(self, rows: slice, gradient: Tensor, sums: Tensor, /) -> None:
        """Add the sums over blocks of G W, G dW/dr and G dW/dtheta, unscaled, to sums float64 (blocks, stages, 3)."""


def turned(x: Tensor, seed: int, back: bool = False) -> Tensor:
    """Rotate the rows of x (n, side), a copy where there is a rotation."""
    if not seed:
        return x
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return (rotate_back if back else rotate)(x, seed)
    x = x.clone(memory_format=torch.contiguous_format)
    _cpu.rotate_rows(x.data_ptr(), x.shape[0], x.shape[1], seed, back, torch.get_num_threads())
    return x


def matmul(source: Source, x: Tensor) -> Tensor:
    """x (n, columns) times the matrix: (n, rows)."""
    x = turned(x, source.spec.rotation[1])
    y = x.new_empty(x.shape[0], source.spec.shape[0])
    for rows, band in source.bands(TILE):
        torch.mm(x, band.T, out=y[:, rows])
    return turned(y, source.spec.rotation[0], back=True)


def matmul_transposed(source: Source, y: Tensor) -> Tensor:
    """y (n, rows) times the transposed matrix: (n, columns)."""
    y = turned(y, source.spec.rotation[0])
    x = y.new_zeros(y.shape[0], source.spec.shape[1])
    for rows, band in source.bands(TILE):
        x.addmm_(y[:, rows], band)
    return turned(x, source.spec.rotation[1], back=True)


def decode(source: Source) -> Tensor:
    """The dense matrix, rotations undone."""
    out = source.tensors.seeds.new_empty(source.spec.shape, dtype=source.dtype)
    for rows, band in source.bands(TILE):
        out[rows] = turned(band, source.spec.rotation[1], back=True)
    if source.spec.rotation[0]:
        out = turned(out.T, source.spec.rotation[0], back=True).T.contiguous()
    return out


def rows(source: Source, index: Tensor) -> Tensor:
    """Single rows, (*index.shape, columns)."""
    some = turned(source.rows(index.reshape(-1)), source.spec.rotation[1], back=True)
    return some.reshape(*index.shape, source.spec.shape[1])


def gradient(source: Source, x: Tensor, y: Tensor) -> Gradients:
    """Derivatives by radius, angle and scale of <y, W x> summed over the rows of x (n, columns) and y (n, rows)."""
    x, y = turned(x, source.spec.rotation[1]), turned(y, source.spec.rotation[0])
    sums = no_sums(source)
    for rows in source.cuts(TILE):
        source.contract(rows, factored(source, rows, y[:, rows].T @ x), sums)
    return finish(source, sums)


def gradient_of_dense(source: Source, g: Tensor) -> Gradients:
    """Derivatives by radius, angle and scale of <g, W>."""
    g = turned(g, source.spec.rotation[1])
    if source.spec.rotation[0]:
        g = turned(g.T, source.spec.rotation[0]).T
    sums = no_sums(source)
    for rows in source.cuts(TILE):
        source.contract(rows, factored(source, rows, g[rows].clone()), sums)
    return finish(source, sums)


def gradient_of_rows(source: Source, index: Tensor, g: Tensor) -> Gradients:
    """Derivatives by radius, angle and scale of the sum of <g, rows of W>, g (n, columns) at index (n,)."""
    g = turned(g, source.spec.rotation[1])
    order = torch.argsort(index, stable=True)
    index, g = index[order], g[order]
    sums = no_sums(source)
    for rows in source.cuts(TILE):
        limits = torch.tensor([rows.start, rows.stop], device=index.device)
        low, high = torch.searchsorted(index, limits).tolist()
        if low < high:  # bands whose rows nobody looked up cost nothing
            band = g.new_zeros(rows.stop - rows.start, g.shape[1])
            band.index_add_(0, index[low:high] - rows.start, g[low:high])
            source.contract(rows, factored(source, rows, band), sums)
    return finish(source, sums)


def no_sums(source: Source) -> Tensor:
    """What `contract` adds to."""
    return source.tensors.seeds.new_zeros(source.spec.blocks, source.spec.stages, 3, dtype=torch.float64)


def factored(source: Source, rows: slice, g: Tensor) -> Tensor:
    """g (rows, columns) times the factors of its rows, in place."""
    row_scale = source.tensors.row_scale
    return g if row_scale is None else g.mul_(row_scale[rows, None].to(g.dtype))


def finish(source: Source, sums: Tensor) -> Gradients:
    """Derivatives by radius, angle and scale from the sums; empty for what a frozen matrix lacks."""
    scale, radius = source.tensors.scale, source.tensors.radius
    by_scale = sums[..., 0].sum().to(scale.dtype)
    if radius is None:
        none = scale.new_empty(0)
        return none, none.clone(), by_scale
    by_radius, by_angle = (sums[..., k] * scale.double() for k in (1, 2))
    return by_radius.to(radius.dtype), by_angle.to(radius.dtype), by_scale
