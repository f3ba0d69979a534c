"""`outer128` with its signs as numbers: products that never expand a block, differentiable in everything.

A block multiplies as y += a u1 (v1 . x) + b u2 (v2 . x): a quarter of the arithmetic of its 16x16 weights, and nothing
dense. Plain torch, so autograd and torch.func see through it; for training, where the signs come from latents.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rbe.formats import SeedSpec, outer128
from rbe.rotation import rotate, rotate_back


def factors(signs: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor]:
    """Row vectors times their coefficients, and column vectors: (block rows, block columns, terms, edge) each.

    Args:
        signs: (blocks, stages, 64), +1 and -1, in radius' dtype.
    """
    u, v = outer128.vectors(signs, spec)
    u = u * outer128.coefficients(radius, angle, spec)[..., None]
    u, v = (part.reshape(*spec.grid, -1, part.shape[-1]) for part in (u, v))
    return u, v


def decode(
    signs: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: SeedSpec
) -> Tensor:
    """The dense matrix (rows, columns), rotations undone."""
    w = rotate_back(_expanded(*factors(signs, radius, angle, spec), scale, row_scale, spec), spec.rotation[1])
    return rotate_back(w.T, spec.rotation[0]).T if spec.rotation[0] else w


def _expanded(u: Tensor, v: Tensor, scale: Tensor, row_scale: Tensor | None, spec: SeedSpec) -> Tensor:
    """The matrix before its rotations."""
    blocks = u.mT @ v  # (block rows, block columns, edge, edge)
    rows, columns = spec.shape
    w = blocks.transpose(1, 2).reshape(spec.padded)[:rows, :columns] * scale
    return w if row_scale is None else w * row_scale.to(w.dtype)[:, None]


def matmul(
    x: Tensor,
    signs: Tensor,
    radius: Tensor,
    angle: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    spec: SeedSpec,
) -> Tensor:
    """The product of x (..., columns) with the matrix: (..., rows) in x's dtype.

    For many rows of x the inner products would take more room than the weights: then the blocks are expanded for the
    time of the product, as the dense layer has them all the time.
    """
    rows, columns = spec.shape
    dtype = torch.promote_types(x.dtype, radius.dtype)
    flat = rotate(x.reshape(-1, columns).to(dtype), spec.rotation[1])
    u, v = factors(signs.to(dtype), radius.to(dtype), angle.to(dtype), spec)
    scale = scale.to(dtype)
    count, terms = flat.shape[0], u.shape[2]
    if count * terms > spec.block_shape[0] ** 2 // 2:
        y = flat @ _expanded(u, v, scale, row_scale, spec).T
    else:
        (block_rows, block_columns), edge = spec.grid, spec.block_shape[0]
        tiles = pad(flat, (0, spec.padded[1] - columns)).reshape(count, block_columns, edge).transpose(0, 1)
        inner = tiles @ v.permute(1, 3, 0, 2).reshape(block_columns, edge, block_rows * terms)
        inner = inner.reshape(block_columns, count, block_rows, terms).permute(2, 1, 0, 3)
        y = inner.reshape(block_rows, count, -1) @ u.reshape(block_rows, block_columns * terms, edge)
        y = y.transpose(0, 1).reshape(count, -1)[:, :rows] * scale
        y = y if row_scale is None else y * row_scale.to(dtype)
    return rotate_back(y, spec.rotation[0]).reshape(*x.shape[:-1], rows).to(x.dtype)


def rows(
    index: Tensor,
    signs: Tensor,
    radius: Tensor,
    angle: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    spec: SeedSpec,
) -> Tensor:
    """Single rows, (*index.shape, columns); only their block rows are touched."""
    edge = spec.block_shape[0]
    u, v = factors(signs, radius, angle, spec)
    some = index.reshape(-1)
    mine = u[some // edge].gather(-1, (some % edge)[:, None, None, None].expand(-1, u.shape[1], u.shape[2], 1))
    w = (mine.mT @ v[some // edge]).reshape(len(some), -1)[:, : spec.shape[1]] * scale
    w = w if row_scale is None else w * row_scale.to(w.dtype)[some, None]
    return rotate_back(w, spec.rotation[1]).reshape(*index.shape, spec.shape[1])
