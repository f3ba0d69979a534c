"""Decode and multiply in plain torch: the definition put together, on any device and in any float precision."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe import formats
from rbe.formats import SeedSpec
from rbe.kernels.tensors import Tensors
from rbe.rotation import rotate, rotate_back


@dataclass(frozen=True)
class Definition:
    """A matrix that the definition generates, band by band; see `bands.Source`."""

    spec: SeedSpec
    tensors: Tensors
    dtype: torch.dtype

    def _blocks(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Code, radius and angle of the block rows from `first` to `last`, in the dtype of this matrix."""
        t, columns = self.tensors, self.spec.grid[1]
        some = slice(first * columns, last * columns)
        if t.radius is None or t.angle is None:
            code, radius, angle = formats.disk(self.spec.format).split(t.seeds[some], self.spec)
        else:
            code, radius, angle = t.seeds[some], t.radius[some], t.angle[some]
        return code, radius.to(self.dtype), angle.to(self.dtype)

    def _unscaled(self, first: int, last: int) -> Tensor:
        """The blocks (blocks, h, w) of some block rows, or their derivative along the direction of the tensors."""
        t, columns = self.tensors, self.spec.grid[1]
        some = slice(first * columns, last * columns)
        if self.spec.grades:  # their blocks differ in words
            return formats.get(self.spec.format).generate(t.seeds, self.spec)[some].to(self.dtype)
        if not formats.is_disk(self.spec.format):
            return formats.get(self.spec.format).generate(t.seeds[some], self.spec).to(self.dtype)
        parts = self._blocks(first, last)
        disk = formats.disk(self.spec.format)
        if t.d_radius is None or t.d_angle is None:
            return disk.values(*parts, self.spec)
        by_radius, by_angle = disk.derivatives(*parts, self.spec)
        along = (t.d_radius[some].to(self.dtype), t.d_angle[some].to(self.dtype))
        return (by_radius * along[0][..., None, None] + by_angle * along[1][..., None, None]).sum(1)

    def band(self, first: int, last: int) -> Tensor:
        """Some block rows of the matrix, scaled: (rows, columns)."""
        (height, width), (rows, columns) = self.spec.block_shape, self.spec.shape
        blocks = self._unscaled(first, last).reshape(last - first, -1, height, width)
        begin, end = first * height, min(last * height, rows)
        w = blocks.transpose(1, 2).reshape((last - first) * height, -1)[: end - begin, :columns]
        w = w * self.tensors.scale.to(self.dtype)
        return w if self.tensors.row_scale is None else w * self.tensors.row_scale[begin:end, None].to(self.dtype)

    def bands(self, tile: int) -> Iterator[tuple[slice, Tensor]]:
        """All bands, each about `tile` weights."""
        height = self.spec.block_shape[0]
        for rows in self.cuts(tile):
            yield rows, self.band(rows.start // height, -(-rows.stop // height))

    def cuts(self, tile: int) -> Iterator[slice]:
        """The rows of each band: whole block rows."""
        height, (rows, columns) = self.spec.block_shape[0], self.spec.shape
        step = max(1, tile // (columns * height)) * height
        return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))

    def rows(self, index: Tensor) -> Tensor:
        """Single rows before the rotation, (n, columns)."""
        out = self.tensors.seeds.new_empty((index.numel(), self.spec.shape[1]), dtype=self.dtype)
        for rows, band in self.bands(1 << 20):
            mine = (index >= rows.start) & (index < rows.stop)
            out[mine] = band[index[mine] - rows.start]
        return out

    def contract(self, rows: slice, gradient: Tensor, sums: Tensor) -> None:
        """Add the sums over blocks of G W, G dW/dr and G dW/dtheta, unscaled, to sums (blocks, stages, 3)."""
        height, width = self.spec.block_shape
        first, last, columns = rows.start // height, -(-rows.stop // height), self.spec.grid[1]
        padded = gradient.new_zeros((last - first) * height, columns * width)
        padded[: gradient.shape[0], : gradient.shape[1]] = gradient
        g = padded.reshape(last - first, height, columns, width).transpose(1, 2).reshape(-1, height, width)
        some = slice(first * columns, last * columns)
        # The value of all stages together: only the sum over everything is asked for.
        sums[some, 0, 0] += (g * self._unscaled(first, last)).sum((-1, -2))
        if formats.is_disk(self.spec.format):
            slopes = formats.disk(self.spec.format).derivatives(*self._blocks(first, last), self.spec)
            for k, slope in enumerate(slopes):
                sums[some, :, k + 1] += (g[:, None] * slope).sum((-1, -2))


def rotated(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix as encoded, before the rotations are undone: (rows, columns) in `dtype`."""
    return Definition(spec, Tensors(seeds, scale, row_scale), dtype).band(0, spec.grid[0])


def decode(
    spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense matrix (rows, columns) in `dtype`, W = R_out^T W~ R_in."""
    w = rotated(spec, seeds, scale, row_scale, dtype)
    w = rotate_back(w, spec.rotation[1])
    return rotate_back(w.T, spec.rotation[0]).T.contiguous()


def seed_matmul(x: Tensor, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """y = R_out^T (W~ (R_in x)) for x (..., columns), in x's precision; returns (..., rows)."""
    y = rotate(x, spec.rotation[1]) @ rotated(spec, seeds, scale, row_scale, x.dtype).T
    return rotate_back(y, spec.rotation[0])
