"""The C++ kernels of packed64 and packed128: tensors in, tensors out, eager, on the CPU, outside of autograd.

A few rows are multiplied inside one C++ call, without a stored weight. Many rows go band by band through the
platform's GEMM. Gradients of seeds need no more memory than one band.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import rbe._cpu as _cpu
from rbe import formats
from rbe.formats import SeedSpec
from rbe.kernels import bands
from rbe.kernels.tensors import Tensors

# Rows of x up to which the fused product is at least as fast as bands and the platform's GEMM (benchmarks/packed.py).
FUSED_ROWS = 8
# Cells of a padded block up to which its shape has tables, in C++, of cosines and radii.
TABLED = 4096
_KINDS = {("packed64", None): 0, ("packed128", "faithful"): 1, ("packed128", "radial"): 2}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Packed:
    """A matrix that the C++ kernels generate in float32; see `bands.Source`.

    It borrows the tensors' memory: keep them contiguous and where they are. Radius and angle are float32.
    """

    spec: SeedSpec
    tensors: Tensors
    dtype: torch.dtype = torch.float32

    @cached_property
    def native(self) -> _cpu.PackedMatrix:
        """The C++ view."""
        t, spec = self.tensors, self.spec
        height, width = spec.block_shape
        return _cpu.PackedMatrix(
            _KINDS[spec.format, spec.mode],
            *spec.shape,
            height,
            width,
            spec.stages,
            formats.get(spec.format).words(spec) // spec.stages,
            self.tabled,
            *(_address(part) for part in (t.seeds, t.radius, t.angle, t.d_radius, t.d_angle, t.scale, t.row_scale)),
        )

    @property
    def tabled(self) -> bool:
        """Whether the blocks are small, and share tables."""
        height, width = self.spec.block_shape
        return self.spec.block is not None and height * (-(-width // 16) * 16) <= TABLED

    def bands(self, tile: int) -> Iterator[tuple[slice, Tensor]]:
        """Bands in one buffer that the next band overwrites."""
        buffer = torch.empty(0)
        for rows in self.cuts(tile):
            shape = (rows.stop - rows.start, self.spec.shape[1])
            if buffer.shape[0] < shape[0]:
                buffer = torch.empty(shape)
            band = buffer[: shape[0]]
            self.native.decode(rows.start, rows.stop, band.data_ptr(), torch.get_num_threads())
            yield rows, band

    def cuts(self, tile: int) -> Iterator[slice]:
        """Whole block rows of small blocks, any rows of large ones."""
        (rows, columns), height = self.spec.shape, self.spec.block_shape[0] if self.tabled else 8
        step = max(1, tile // columns // height) * height
        return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))

    def rows(self, index: Tensor) -> Tensor:
        """Single rows before the rotation."""
        index = index.to(torch.int64).contiguous()
        out = torch.empty(index.numel(), self.spec.shape[1])
        self.native.rows(index.data_ptr(), index.numel(), out.data_ptr(), torch.get_num_threads())
        return out

    def contract(self, rows: slice, gradient: Tensor, sums: Tensor) -> None:
        """As `bands.Source.contract`."""
        gradient = gradient.contiguous()
        self.native.contract(rows.start, rows.stop, gradient.data_ptr(), sums.data_ptr(), torch.get_num_threads())


def matmul(source: Packed, x: Tensor) -> Tensor:
    """The product of x (n, columns), float32, with the matrix."""
    if x.shape[0] > FUSED_ROWS:
        return bands.matmul(source, x)
    x = bands.turned(x, source.spec.rotation[1]).contiguous()
    y = torch.empty(x.shape[0], source.spec.shape[0])
    source.native.matmul(x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
    return bands.turned(y, source.spec.rotation[0], back=True)
