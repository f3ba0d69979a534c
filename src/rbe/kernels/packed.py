"""The C++ kernels of packed64 and packed128: tensors in, tensors out, eager, on the CPU, outside of autograd.

Small blocks of packed128 are multiplied and differentiated inside one C++ call, without a stored weight or gradient.
packed64 in small blocks is a Kronecker product of amplitudes and one table: two small dense products. Blocks too large
for tables go band by band through the platform's GEMM; a few rows are multiplied as they are generated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

import rbe._cpu as _cpu
from rbe import formats
from rbe.formats import SeedSpec, packed64
from rbe.kernels import bands
from rbe.kernels.tensors import Tensors

# Rows of x up to which a matrix of large blocks is multiplied while it is generated (benchmarks/packed.py).
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
    kronecker = source.tabled and source.spec.format == "packed64"
    if not source.tabled and x.shape[0] > FUSED_ROWS:
        return bands.matmul(source, x)
    x = bands.turned(x, source.spec.rotation[1]).contiguous()
    if kronecker:
        y = _kronecker(source, x)
    else:
        y = torch.empty(x.shape[0], source.spec.shape[0])
        source.native.matmul(x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
    return bands.turned(y, source.spec.rotation[0], back=True)


def decode(source: Packed) -> Tensor:
    """The dense matrix; where nothing is rotated, C++ writes it in its place."""
    if any(source.spec.rotation):
        return bands.decode(source)
    out = torch.empty(source.spec.shape)
    source.native.decode(0, source.spec.shape[0], out.data_ptr(), torch.get_num_threads())
    return out


def backward(source: Packed, x: Tensor | None, y: Tensor, by_x: bool) -> tuple[Tensor | None, bands.Gradients | None]:
    """Derivatives of the sum of y (n, rows) times the product of x (n, columns).

    Returns:
        those by x, where `by_x`, and those by radius, angle and scale, where x is given.
    """
    if not source.tabled:
        d_x = bands.matmul_transposed(source, y) if by_x else None
        return d_x, None if x is None else bands.gradient(source, x, y)
    y = bands.turned(y, source.spec.rotation[0]).contiguous()
    if x is not None:
        x = bands.turned(x, source.spec.rotation[1]).contiguous()
    if source.spec.format == "packed64":
        d_x, gradients = _kronecker_backward(source, x, y, by_x)
    else:
        d_x = torch.empty(y.shape[0], source.spec.shape[1]) if by_x else None
        # The first rows of x write these; without rows nobody does.
        new = torch.empty if y.shape[0] else torch.zeros
        shape = source.spec.blocks, source.spec.stages
        sums = None if x is None else (new(shape), new(shape), new(shape))
        value, by_radius, by_angle = sums or (None, None, None)
        addresses = map(_address, (d_x, value, by_radius, by_angle))
        source.native.backward(_address(x), y.data_ptr(), y.shape[0], *addresses, torch.get_num_threads())
        gradients = None if sums is None else _finished(source, float(sums[0].sum(dtype=torch.float64)), *sums[1:])
    return None if d_x is None else bands.turned(d_x, source.spec.rotation[1], back=True), gradients


def _finished(source: Packed, value: float, by_radius: Tensor, by_angle: Tensor) -> bands.Gradients:
    """Gradients from those by radius and angle, and from what all seeds add to the product."""
    scale = source.tensors.scale
    by_scale = scale.new_tensor(value)
    if source.tensors.radius is None:
        return scale.new_empty(0), scale.new_empty(0), by_scale
    return by_radius, by_angle, by_scale


# packed64: block (I, J) is sum_s c_IJs phi_s. With P_Js = phi_s x_J, computed once, y_I = sum_Js c_IJs P_Js.


@lru_cache(maxsize=64)
def _phi(height: int, width: int, stages: int) -> Tensor:
    """phi of every stage, float32 (stages, h, w)."""
    return torch.stack([packed64.modulation(height, width, s) for s in range(stages)]).float()


def _modulations(source: Packed) -> Tensor:
    return _phi(*source.spec.block_shape, source.spec.stages)


def _amplitudes(source: Packed) -> Tensor:
    """Amplitudes (block rows, columns, stages)."""
    out = torch.empty(*source.spec.grid, source.spec.stages)
    source.native.amplitudes(out.data_ptr(), 0, 0, 0, torch.get_num_threads())
    return out


def _blocks(x: Tensor, count: int, side: int) -> Tensor:
    """x (n, columns) cut into blocks and padded: (count, n, side)."""
    missing = count * side - x.shape[1]
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(x.shape[0], count, side).transpose(0, 1)


def _unblocked(blocks: Tensor, columns: int) -> Tensor:
    """The inverse of `_blocks`."""
    count, n, side = blocks.shape
    return blocks.transpose(0, 1).reshape(n, count * side)[:, :columns].contiguous()


def _kronecker(source: Packed, x: Tensor) -> Tensor:
    (block_rows, block_columns), (height, width) = source.spec.grid, source.spec.block_shape
    amplitudes, blocks = _amplitudes(source), _blocks(x, block_columns, width).reshape(-1, width)
    y = x.new_zeros(block_rows, x.shape[0] * height)
    for stage, phi in enumerate(_modulations(source)):
        y.addmm_(amplitudes[..., stage], (blocks @ phi.T).reshape(block_columns, -1))
    y = _unblocked(y.reshape(block_rows, x.shape[0], height), source.spec.shape[0]) * source.tensors.scale
    return _scaled(source, y)


def _kronecker_backward(
    source: Packed, x: Tensor | None, y: Tensor, by_x: bool
) -> tuple[Tensor | None, bands.Gradients | None]:
    """As `backward`, before the rotations."""
    (block_rows, block_columns), (height, width) = source.spec.grid, source.spec.block_shape
    n, scale = y.shape[0], source.tensors.scale
    upstream, phis = _blocks(_scaled(source, y), block_rows, height).reshape(-1, height), _modulations(source)

    @lru_cache(maxsize=1)
    def passed(stage: int) -> Tensor:
        """What both derivatives need of y, y_I phi_s: the last one is kept, all of them might be large."""
        return (upstream @ phis[stage]).reshape(block_rows, -1)

    d_x = gradients = None
    if x is None:
        amplitudes = _amplitudes(source) if by_x else None
    else:
        amplitudes = torch.empty(*source.spec.grid, source.spec.stages) if by_x else None
        blocks = _blocks(x, block_columns, width).reshape(block_columns, -1)
        found = [passed(stage) @ blocks.T for stage in range(len(phis))]
        del blocks  # the sooner memory is free, the less of it is new to the process
        by_amplitude = found[0] if len(found) == 1 else torch.stack(found, -1)
        by_radius, by_angle = (torch.empty(source.spec.blocks, source.spec.stages) for _ in range(2))
        addresses = map(_address, (amplitudes, by_amplitude, by_radius, by_angle))
        value = source.native.amplitudes(*addresses, torch.get_num_threads())
        gradients = _finished(source, value, by_radius, by_angle)
    if amplitudes is not None:
        d_x = y.new_zeros(block_columns, n * width)
        for stage in reversed(range(len(phis))):
            d_x.addmm_(amplitudes[..., stage].T, passed(stage))
        d_x = _unblocked(d_x.reshape(block_columns, n, width), source.spec.shape[1]).mul_(scale)
    return d_x, gradients


def _scaled(source: Packed, y: Tensor) -> Tensor:
    row_scale = source.tensors.row_scale
    return y if row_scale is None else y * row_scale.float()
