"""The C++ kernels: tensors in, tensors out. Everything here is eager, on the CPU, outside of autograd.

Few rows are multiplied inside one C++ call, fused: no weight is ever stored. Many rows go band by band: a few hundred
rows of the matrix are decoded into one small buffer, and the platform's GEMM multiplies it.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

import rbe._cpu as _cpu
from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.rotation import rotate, rotate_back

# Rows of x up to which the fused product is at least as fast as decoding a band and calling the platform's GEMM
# (benchmarks/crossover.py). Integer activations are always fused: their sums are exact, whatever the tier.
FUSED_ROWS = {"portable": 8, "avx2": 32, "avx512": 48, "zen4": 48, "amx": 1 << 30}
# Numbers of the one tile buffer of the many-rows path: 4 MB, near the cores in their caches; but up to four
# times as many where the matrix is so wide that bands would be narrow, because the GEMM reads all of x for every band.
TILE = 1 << 20
NARROW = 256

if os.environ.get("RBE_TIER") not in (None, "", *FUSED_ROWS):  # the kernels would take the best one without a word
    raise RbeError(
        f"RBE_TIER={os.environ['RBE_TIER']} is no instruction tier; give one of {', '.join(FUSED_ROWS)}, or unset it"
    )

TrellisMatrix = _cpu.TrellisMatrix
set_tier = _cpu.set_tier
tier = _cpu.tier
tier_available = _cpu.tier_available


def native(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> _cpu.TrellisMatrix:
    """The C++ view of a matrix. It borrows the tensors' memory: keep them alive, contiguous and where they are."""
    definition = formats.get(spec.format)
    definition.check(spec)
    w = trellis.rate(spec.bits)
    even, odd = trellis.multipliers(spec.window, w)
    return _cpu.TrellisMatrix(
        seeds.data_ptr(),
        *spec.shape,
        w,
        spec.window,
        even,
        odd,
        scale.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        *spec.rotation,
    )


def matmul(matrix: _cpu.TrellisMatrix, spec: SeedSpec, x: Tensor, int8: bool) -> Tensor:
    """The product of x (..., columns) with a matrix, (..., rows) in x's dtype."""
    rows, columns = spec.shape
    batch = x.numel() // columns
    dtype = x.dtype
    if dtype == torch.float64 and not int8:
        return _many_rows(matrix, spec, x.reshape(-1, columns)).reshape(*x.shape[:-1], rows)
    # Asking first is several times cheaper than a conversion that does nothing.
    source = x if dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    if int8 or batch <= FUSED_ROWS[tier()]:
        y = torch.empty(*x.shape[:-1], rows)
        matrix.matmul(source.data_ptr(), batch, y.data_ptr(), torch.get_num_threads(), int8)
    else:
        y = _many_rows(matrix, spec, source.reshape(-1, columns)).reshape(*x.shape[:-1], rows)
    return y if dtype is torch.float32 else y.to(dtype)


def _bands(matrix: _cpu.TrellisMatrix, spec: SeedSpec, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Bands of rows of W~, transposed: (columns, width) each, in one buffer that the next band overwrites."""
    rows, columns = spec.shape
    size = min(max(TILE, NARROW * columns), 4 * TILE)
    width = min(rows, max(16, size // columns // 16 * 16))
    buffer = torch.empty(columns * width)
    for begin in range(0, rows, width):
        end = min(begin + width, rows)
        band = buffer[: columns * (end - begin)].view(columns, end - begin)
        matrix.decode_columns(begin, end, band.data_ptr(), torch.get_num_threads())
        yield slice(begin, end), band.to(dtype)


def _rotate(x: Tensor, seed: int, back: bool) -> Tensor:
    """Rotate the rows of x (batch, n); float32 in C++, in place where x is ours to change."""
    if x.dtype != torch.float32:
        return (rotate_back if back else rotate)(x, seed)
    _cpu.rotate_rows(x.data_ptr(), x.shape[0], x.shape[1], seed, back, torch.get_num_threads())
    return x


def _many_rows(matrix: _cpu.TrellisMatrix, spec: SeedSpec, x: Tensor) -> Tensor:
    """x (batch, columns), contiguous, float32 or float64, times the matrix, band by band."""
    if spec.rotation[1]:
        x = _rotate(x.clone(), spec.rotation[1], back=False)
    y = x.new_empty(x.shape[0], spec.shape[0])
    for rows, band in _bands(matrix, spec, x.dtype):
        torch.mm(x, band, out=y[:, rows])
    return _rotate(y, spec.rotation[0], back=True)


def matmul_transposed(matrix: _cpu.TrellisMatrix, spec: SeedSpec, y: Tensor) -> Tensor:
    """The product of y (..., rows) with the transposed matrix: (..., columns) in y's dtype, band by band."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    source = y.to(dtype).reshape(-1, spec.shape[0])
    if spec.rotation[0]:
        source = _rotate(source.clone(memory_format=torch.contiguous_format), spec.rotation[0], back=False)
    x = source.new_zeros(source.shape[0], spec.shape[1])
    for rows, band in _bands(matrix, spec, dtype):
        x.addmm_(source[:, rows], band.T)
    return _rotate(x, spec.rotation[1], back=True).reshape(*y.shape[:-1], spec.shape[1]).to(y.dtype)


def decode(matrix: _cpu.TrellisMatrix, spec: SeedSpec) -> Tensor:
    """The dense float32 matrix (rows, columns), rotations undone."""
    out = torch.empty(spec.shape)
    matrix.decode(out.data_ptr(), torch.get_num_threads())
    return out


def rows(matrix: _cpu.TrellisMatrix, spec: SeedSpec, index: Tensor) -> Tensor:
    """Rows of the matrix, float32 (*index.shape, columns); the indices are in range."""
    index = index.contiguous()
    out = torch.empty(*index.shape, spec.shape[1])
    matrix.rows(index.data_ptr(), index.numel(), out.data_ptr(), torch.get_num_threads())
    return out
