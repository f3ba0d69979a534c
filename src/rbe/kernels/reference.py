"""Decode and multiply in plain torch: the definition put together, on any device and in any float precision."""

import torch
from torch import Tensor

from rbe import formats
from rbe.formats import SeedSpec
from rbe.rotation import rotate, rotate_back


def rotated(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix as encoded, before the rotations are undone: (rows, columns) in `dtype`."""
    block_rows, block_columns = spec.grid
    codes = formats.get(spec.format).generate(seeds, spec)  # (blocks, block, block)
    tiled = codes.reshape(block_rows, block_columns, spec.block, spec.block).transpose(1, 2).reshape(spec.padded)
    w = tiled[: spec.shape[0], : spec.shape[1]].to(dtype) * scale.to(dtype)
    return w if row_scale is None else w * row_scale.to(dtype)[:, None]


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
