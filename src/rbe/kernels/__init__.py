"""The two operations on seeds, decode and multiply, and their implementations per device."""

import torch
from torch import Tensor

from rbe.formats import SeedSpec
from rbe.kernels import reference


def decode(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """The dense float32 matrix (rows, columns)."""
    return reference.decode(spec, seeds, scale, row_scale)


def seed_matmul(
    x: Tensor, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, activations: str = "float32"
) -> Tensor:
    """The product of x (..., columns) with the matrix: (..., rows), in x's dtype."""
    return reference.seed_matmul(x, spec, seeds, scale, row_scale)


def rows(index: Tensor, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """Rows of the matrix: float32 (*index.shape, columns)."""
    return torch.nn.functional.embedding(index, reference.decode(spec, seeds, scale, row_scale))
