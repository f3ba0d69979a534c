"""What other codes of the same size capture of a matrix: the ceiling of rate and distortion, truncated SVD, DCT."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.search.residual import SparseResidual

# A coefficient of a sparse table: int32 position and float16 value.
_COEFFICIENT_BYTES = 6
# Of a factor of the SVD.
_FACTOR_BYTES = 2


@dataclass(frozen=True)
class Comparison:
    """Shares of a matrix' energy, all at the same number of bytes.

    Attributes:
        bits: per weight.
        captured: by the code that is compared, 1 minus its relative squared error.
        ceiling: 1 - 2^(-2 bits), which no code of Gaussian weights exceeds; other matrices may let more be captured.
        svd: by the largest singular values, factors in float16.
        dct: by the largest coefficients of a two-dimensional DCT, int32 positions and float16 values.
    """

    bits: float
    captured: float
    ceiling: float
    svd: float
    dct: float


def captured_energy(W: Tensor, made: Tensor) -> float:
    """1 - |W - made|^2 / |W|^2; 1 for a zero matrix that is met exactly.

    >>> captured_energy(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    0.36

    Raises:
        RbeError: the shapes differ.
    """
    if W.shape != made.shape:
        raise RbeError(f"captured_energy: shapes {tuple(W.shape)} and {tuple(made.shape)} differ")
    exact = W.detach().double().cpu()
    energy, error = exact.square().sum().item(), (made.detach().double().cpu() - exact).square().sum().item()
    if energy == 0.0:
        return 1.0 if error == 0.0 else -math.inf
    return 1.0 - error / energy


def svd_captured(W: Tensor, nbytes: int) -> float:
    """What the largest singular values capture whose factors, in float16, fit into so many bytes.

    >>> W = torch.outer(torch.ones(20), torch.ones(30))
    >>> svd_captured(W, 99), round(svd_captured(W, 100), 4)
    (0.0, 1.0)
    """
    rank = min(nbytes // (_FACTOR_BYTES * sum(W.shape)), min(W.shape))
    if rank == 0:
        return 0.0
    x = W.detach().float().cpu()
    u, s, v = torch.linalg.svd(x / x.abs().max().clamp_min(1e-30), full_matrices=False)
    root = s[:rank].sqrt()
    left, right = ((t * root).half().float() for t in (u[:, :rank], v[:rank].T))
    return captured_energy(x, left @ right.T * x.abs().max())


def dct_captured(W: Tensor, nbytes: int) -> float:
    """What the largest coefficients of a two-dimensional DCT capture that fit into so many bytes, positions counted.

    >>> dct_captured(torch.ones(8, 8), 6) > 0.999999
    True
    """
    return captured_energy(W, SparseResidual.fit(W, nbytes // _COEFFICIENT_BYTES, "dct").decode())


def compare(W: Tensor, made: Tensor, nbytes: int) -> Comparison:
    """A code of a matrix beside the others of its size.

    >>> from rbe.search import encode
    >>> W = torch.outer(torch.linspace(0, 1, 48), torch.linspace(1, 2, 64))
    >>> m = encode(W, format="packed128", effort="fast")
    >>> row = compare(W, m.decode(), m.nbytes)
    >>> round(row.bits, 2), row.captured > 0.9
    (0.51, True)

    Args:
        W: (rows, columns).
        made: what was decoded.
        nbytes: all that was stored for it.
    """
    bits = 8.0 * nbytes / W.numel()
    ceiling = 1.0 - math.exp2(-2.0 * bits)
    return Comparison(bits, captured_energy(W, made), ceiling, svd_captured(W, nbytes), dct_captured(W, nbytes))
