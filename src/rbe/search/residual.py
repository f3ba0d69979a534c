"""What seeds leave, as a few coefficients in a transformed basis: DCT, a wavelet, or the weights themselves.

The transform is separable and orthonormal, R = T_out^T C T_in with a sparse C, so the product needs no dense matrix:
y = T_out^T (C (T_in x)).

Sources: 001 sections 8.5.3 and 8.7.1; N. Ahmed, T. Natarajan, K. Rao, Discrete Cosine Transform, 1974; I. Daubechies,
Ten Lectures on Wavelets, 1992.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.search.linear_map import product

# The index of a coefficient is int32.
_MOST_CELLS = 1 << 31
# Wavelet levels, as long as the coarsest half is not shorter than this.
_COARSEST = 8


def dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II over the last side.

    >>> [round(v, 6) for v in dct(torch.ones(4)).tolist()]
    [2.0, 0.0, 0.0, 0.0]
    """
    n = x.shape[-1]
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    spectrum = torch.fft.fft(x[..., order]) * _turns(n, x.dtype)
    cosines: Tensor = spectrum.real * _norms(n, x.dtype)
    return cosines


def dct_back(c: Tensor) -> Tensor:
    """The inverse of `dct`, which is its transpose.

    >>> torch.allclose(dct_back(dct(torch.arange(5.0))), torch.arange(5.0), atol=1e-6)
    True
    """
    n = c.shape[-1]
    half = c / _norms(n, c.dtype)
    # The spectrum of a real sequence, from its real parts after the turn.
    mirrored = torch.cat([torch.zeros_like(half[..., :1]), half[..., 1:].flip(-1)], -1)
    spectrum = torch.complex(half, -mirrored) * _turns(n, c.dtype).conj()
    y = torch.fft.ifft(spectrum).real
    out = torch.empty_like(y)
    out[..., 0::2] = y[..., : (n + 1) // 2]
    out[..., 1::2] = y[..., (n + 1) // 2 :].flip(-1)
    return out


@lru_cache(maxsize=16)
def _turns(n: int, dtype: torch.dtype) -> Tensor:
    angle = torch.arange(n, dtype=torch.float64) * (-math.pi / (2 * n))
    turns = torch.complex(angle.cos(), angle.sin())
    return turns if dtype == torch.float64 else turns.to(torch.complex64)


@lru_cache(maxsize=16)
def _norms(n: int, dtype: torch.dtype) -> Tensor:
    norms = torch.full((n,), math.sqrt(2.0 / n), dtype=torch.float64)
    norms[0] = math.sqrt(1.0 / n)
    return norms.to(dtype)


def _pywt() -> Any:
    try:
        import pywt
    except ImportError:
        raise RbeError("residual: wavelets need PyWavelets; install rbe[wavelet], or use basis='dct'") from None
    return pywt


@dataclass(frozen=True)
class Side:
    """The transform of one side of a matrix.

    Attributes:
        basis: "dct", "identity" or the name of an orthogonal wavelet.
        size: the side.
        levels: of the wavelet, 0 for the others.
    """

    basis: str
    size: int
    levels: int

    @property
    def padded(self) -> int:
        """Number of coefficients: a wavelet halves an even side at every level."""
        return -(-self.size // (1 << self.levels)) << self.levels

    def forward(self, x: Tensor) -> Tensor:
        """T x over the last side: (..., size) to (..., padded)."""
        x = functional.pad(x, (0, self.padded - self.size))
        if self.basis == "identity":
            return x
        if self.basis == "dct":
            return dct(x)
        parts = _pywt().wavedec(x.numpy(), self.basis, mode="periodization", level=self.levels, axis=-1)
        return torch.cat([torch.from_numpy(part) for part in parts], -1)

    def back(self, c: Tensor) -> Tensor:
        """T^T c over the last side: (..., padded) to (..., size)."""
        if self.basis == "dct":
            c = dct_back(c)
        elif self.basis != "identity":
            sizes = [self.padded >> self.levels] + [self.padded >> k for k in range(self.levels, 0, -1)]
            parts = [part.numpy() for part in torch.split(c, sizes, -1)]
            c = torch.from_numpy(_pywt().waverec(parts, self.basis, mode="periodization", axis=-1))
        return c[..., : self.size]


def _through(x: Tensor, first: Side, coefficients: Callable[[torch.dtype], Tensor], last: Side) -> Tensor:
    """T_last^T C T_first x over the last side, in x's dtype."""
    flat = x.reshape(-1, first.size).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    turned = torch.sparse.mm(coefficients(flat.dtype), first.forward(flat).T).T
    return last.back(turned.contiguous()).to(x.dtype).reshape(*x.shape[:-1], last.size)


def _side(basis: str, size: int) -> Side:
    """The transform of a side, with as many levels as make sense."""
    if basis in ("dct", "identity"):
        return Side(basis, size, 0)
    pywt = _pywt()
    if basis not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(basis).orthogonal:
        raise RbeError(
            f"residual: basis {basis!r} is not offered; choose 'dct', 'identity' or an orthogonal wavelet such as "
            "'haar', 'db4' or 'sym4'"
        )
    shortest = max(_COARSEST, pywt.Wavelet(basis).dec_len)
    return Side(basis, size, max(0, int(math.log2(max(size / shortest, 1)))))


@dataclass(frozen=True, eq=False)
class SparseResidual:
    """A (rows, columns) matrix held as a few coefficients of a separable transform.

    >>> W = torch.outer(torch.linspace(0, 1, 40).cos(), torch.linspace(0, 2, 30).sin())
    >>> r = SparseResidual.fit(W, keep=20)
    >>> r.nbytes, bool((r.decode() - W).norm() < 0.05 * W.norm())
    (120, True)

    Attributes:
        shape: (rows, columns).
        basis: "dct", "identity" (the largest weights themselves) or an orthogonal wavelet of PyWavelets.
        index: int32 (kept,), position in the coefficients, row-major, ascending.
        values: float16 or float32 (kept,).

    Source: 001 sections 8.5.3 and 8.7.1.
    """

    shape: tuple[int, int]
    basis: str
    index: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        out, in_ = self._sides
        cells = out.padded * in_.padded
        if self.index.dtype != torch.int32 or self.index.ndim != 1 or self.values.shape != self.index.shape:
            raise RbeError(
                f"residual: index is {self.index.dtype} {tuple(self.index.shape)} and values are "
                f"{tuple(self.values.shape)}; they must be one int32 position for every value"
            )
        if self.values.dtype not in (torch.float16, torch.float32):
            raise RbeError(f"residual: values are {self.values.dtype}; they must be float16 or float32")
        inside = (self.index >= 0) & (self.index < cells)
        if not bool(inside.all()) or not bool(self.values.isfinite().all()):
            raise RbeError(
                f"residual: a position is outside the {cells} coefficients of {self.shape}, or a value is not finite; "
                "the source is damaged"
            )

    @classmethod
    def fit(cls, W: Tensor, keep: int, basis: str = "dct", dtype: torch.dtype = torch.float16) -> Self:
        """The `keep` largest coefficients of a matrix, which leave the least squared error.

        Args:
            W: (rows, columns), finite.
            keep: how many; at most as many as there are.
            basis: "dct", "identity" or an orthogonal wavelet ("haar", "db4", ...).
            dtype: of the stored values, float16 or float32; float16 is not used for values beyond it.

        Raises:
            RbeError: the matrix is not finite and 2-D, or the basis is not offered.
        """
        if W.ndim != 2 or W.numel() == 0 or not bool(W.isfinite().all()):
            raise RbeError(f"residual: the matrix {tuple(W.shape)} must be 2-D, not empty, and finite")
        if type(keep) is not int or keep < 0:
            raise RbeError(f"residual: keep is {keep!r}; give the number of coefficients, a whole one, 0 or more")
        out, in_ = _side(basis, W.shape[0]), _side(basis, W.shape[1])
        if out.padded * in_.padded >= _MOST_CELLS:
            raise RbeError(f"residual: {tuple(W.shape)} has too many coefficients for 32-bit positions; split it")
        table = in_.forward(W.detach().double().cpu())
        table = out.forward(table.T.contiguous()).T.flatten()
        index = table.abs().topk(min(keep, table.numel())).indices.sort().values
        values = table[index]
        if dtype == torch.float16 and index.numel() and float(values.abs().max()) > torch.finfo(torch.float16).max:
            dtype = torch.float32
        return cls((W.shape[0], W.shape[1]), basis, index.int(), values.to(dtype))

    @property
    def _sides(self) -> tuple[Side, Side]:
        return _side(self.basis, self.shape[0]), _side(self.basis, self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        return self.index.nbytes + self.values.nbytes

    def _coefficients(self, dtype: torch.dtype) -> Tensor:
        """C, sparse."""
        out, in_ = self._sides
        at = self.index.long()
        places = torch.stack([at // in_.padded, at % in_.padded])
        shape = (out.padded, in_.padded)
        return torch.sparse_coo_tensor(places, self.values.to(dtype), shape, is_coalesced=True, check_invariants=False)

    def decode(self) -> Tensor:
        """The dense matrix, float32 (rows, columns)."""
        out, in_ = self._sides
        table = out.back(self._coefficients(torch.float32).to_dense().T.contiguous()).T
        return in_.back(table.contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        """The product with x (..., columns): (..., rows) in x's dtype, differentiable in x; no dense matrix is made.

        Raises:
            RbeError: x has the wrong width.
        """
        if x.ndim < 1 or x.shape[-1] != self.shape[1] or not x.is_floating_point():
            raise RbeError(f"residual: x is {x.dtype} {tuple(x.shape)}; it must be (..., {self.shape[1]})")
        return product(x, self._times, self._times_transposed)

    def _times(self, x: Tensor) -> Tensor:
        out, in_ = self._sides
        return _through(x, in_, self._coefficients, out)

    def _times_transposed(self, y: Tensor) -> Tensor:
        out, in_ = self._sides
        return _through(y, out, lambda dtype: self._coefficients(dtype).t(), in_)

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {"index": self.index, "values": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], basis: str) -> Self:
        """The inverse of `to_tensors`.

        Raises:
            RbeError: a tensor is missing or does not fit.
        """
        missing = {"index", "values"} - set(tensors)
        if missing:
            raise RbeError(f"residual: {sorted(missing)} missing among {sorted(tensors)}; the file is incomplete")
        return cls(shape, basis, tensors["index"], tensors["values"])


@dataclass(frozen=True, eq=False)
class Corrected:
    """Seeds and a sparse residual, summed.

    >>> from rbe.search import encode
    >>> W = torch.randn(32, 48)
    >>> both = Corrected.fit(W, lambda rest: encode(rest, format="packed128"), keep=64)
    >>> both.nbytes == both.matrix.nbytes + 64 * 6
    True
    """

    matrix: SeedMatrix
    residual: SparseResidual

    @classmethod
    def fit(
        cls,
        W: Tensor,
        encode: Callable[[Tensor], SeedMatrix],
        keep: int,
        basis: str = "dct",
        outliers: bool = False,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Encode a matrix and keep the largest coefficients of what is left.

        Args:
            W: (rows, columns).
            encode: makes seeds of a matrix.
            keep: coefficients of the residual.
            basis: of the residual.
            outliers: take the coefficients out of the matrix first and encode what is left. With basis="identity" these
                are its largest weights, which then do not decide the scale of the seeds.
            dtype: of the stored values.
        """
        if outliers:
            residual = SparseResidual.fit(W, keep, basis, dtype)
            return cls(encode(W - residual.decode().to(W)), residual)
        matrix = encode(W)
        return cls(matrix, SparseResidual.fit(W.detach().cpu().double() - matrix.decode(), keep, basis, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.matrix.nbytes + self.residual.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight."""
        return 8 * self.nbytes / math.prod(self.matrix.shape)

    def decode(self) -> Tensor:
        """The dense matrix, float32 (rows, columns)."""
        return self.matrix.decode() + self.residual.decode()

    def matmul(self, x: Tensor) -> Tensor:
        """The product with x (..., columns): (..., rows) in x's dtype, differentiable in x."""
        return self.matrix.matmul(x) + self.residual.matmul(x)
