"""The C++ kernels of outer128: tensors in, tensors out, eager, on the CPU, outside of autograd.

Products read the signs as they are stored, and make no weight. Derivatives by the seeds need the sums of the gradient
of every block with its signs: that gradient is made band by band through the platform's GEMM, and contracted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import rbe._cpu as _cpu
from rbe.formats import SeedSpec, outer128
from rbe.kernels import bands
from rbe.kernels.bands import Gradients
from rbe.kernels.tensors import Tensors


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Outer:
    """A matrix that the C++ kernels generate in float32; see `bands.Source`.

    It borrows the tensors' memory: keep them contiguous and where they are. Radius and angle are float32.
    """

    spec: SeedSpec
    tensors: Tensors
    dtype: torch.dtype = torch.float32

    @cached_property
    def native(self) -> _cpu.OuterMatrix:
        """The C++ view."""
        t, spec = self.tensors, self.spec
        parts = (t.seeds, t.radius, t.angle, t.scale, t.row_scale)
        return _cpu.OuterMatrix(*spec.shape, spec.block_shape[0], spec.stages, *map(_address, parts))

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
        """Whole block rows."""
        (rows, columns), height = self.spec.shape, self.spec.block_shape[0]
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
        total, parts = self._contracted(rows, gradient, Parts(self.spec, seeds=True), 1.0)
        height, columns = self.spec.block_shape[0], self.spec.grid[1]
        some = slice(rows.start // height * columns, -(-rows.stop // height) * columns)
        sums[some.start, 0, 0] += total  # only the sum over everything is asked for
        for k, part in enumerate((parts.radius, parts.angle)):
            assert part is not None
            sums[some, :, k + 1] += part[some]

    def _contracted(self, rows: slice, gradient: Tensor, parts: "Parts", factor: float) -> tuple[float, "Parts"]:
        gradient = gradient.contiguous()
        addresses = map(_address, (gradient, parts.radius, parts.angle, parts.signs))
        total: float = self.native.contract(rows.start, rows.stop, *addresses, factor, torch.get_num_threads())
        return total, parts

    def derivatives(self, gradients: Iterator[tuple[slice, Tensor]], parts: "Parts") -> Gradients:
        """Derivatives by radius, angle and scale, and those by signs in `parts`, from all bands of a gradient."""
        scale, factor = self.tensors.scale, float(self.tensors.scale)
        total = sum(self._contracted(rows, g, parts, factor)[0] for rows, g in gradients)
        by_scale = scale.new_tensor(total)
        if parts.radius is None or parts.angle is None:
            return scale.new_empty(0), scale.new_empty(0), by_scale
        return parts.radius, parts.angle, by_scale


class Parts:
    """Where derivatives by the seeds are written: radius and angle (blocks, stages), signs (blocks, stages, 64)."""

    def __init__(self, spec: SeedSpec, seeds: bool, signs: bool = False) -> None:
        size = (spec.blocks, spec.stages)
        self.radius: Tensor | None = torch.empty(size) if seeds else None
        self.angle: Tensor | None = torch.empty(size) if seeds else None
        self.signs: Tensor | None = torch.empty(*size, 64) if signs else None


def code_of(latent: Tensor, spec: SeedSpec) -> Tensor:
    """As `outer128.code_of`, of latent numbers float32 (blocks, stages, 64), contiguous."""
    code = torch.empty(latent.shape[:-1], dtype=torch.int64)
    wide = outer128.terms(spec) == 1
    _cpu.outer_pack(latent.data_ptr(), code.numel(), wide, code.data_ptr(), torch.get_num_threads())
    return code


def matmul(source: Outer, x: Tensor) -> Tensor:
    """The product of x (n, columns), float32, with the matrix."""
    x = bands.turned(x, source.spec.rotation[1]).contiguous()
    y = torch.empty(x.shape[0], source.spec.shape[0])
    source.native.matmul(x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
    return bands.turned(y, source.spec.rotation[0], back=True)


def decode(source: Outer) -> Tensor:
    """The dense matrix; where nothing is rotated, C++ writes it in its place."""
    if any(source.spec.rotation):
        return bands.decode(source)
    out = torch.empty(source.spec.shape)
    source.native.decode(0, source.spec.shape[0], out.data_ptr(), torch.get_num_threads())
    return out


def backward(
    source: Outer, x: Tensor | None, y: Tensor, by_x: bool, signs: bool = False
) -> tuple[Tensor | None, Gradients | None, Tensor | None]:
    """Derivatives of the sum of y (n, rows) times the product of x (n, columns).

    Returns:
        those by x, where `by_x`; by radius, angle and scale, where x is given; by the signs, where asked for.
    """
    y = bands.turned(y, source.spec.rotation[0]).contiguous()
    d_x = None
    if by_x:
        d_x = torch.empty(y.shape[0], source.spec.shape[1])
        source.native.transposed(y.data_ptr(), y.shape[0], d_x.data_ptr(), torch.get_num_threads())
        d_x = bands.turned(d_x, source.spec.rotation[1], back=True)
    if x is None:
        return d_x, None, None
    x = bands.turned(x, source.spec.rotation[1])
    cuts = source.cuts(bands.TILE)
    parts = Parts(source.spec, source.tensors.radius is not None, signs)
    gradients = source.derivatives(((r, bands.factored(source, r, y[:, r].T @ x)) for r in cuts), parts)
    return d_x, gradients, parts.signs


def gradient_of_dense(source: Outer, g: Tensor) -> tuple[Gradients, Tensor]:
    """Derivatives by radius, angle and scale, and by the signs, of <g, W>."""
    g = bands.turned(g, source.spec.rotation[1])
    if source.spec.rotation[0]:
        g = bands.turned(g.T, source.spec.rotation[0]).T
    parts = Parts(source.spec, True, signs=True)
    whole = source.tensors.row_scale is None
    cuts = source.cuts(bands.TILE)
    pieces = ((r, g[r] if whole else bands.factored(source, r, g[r].clone())) for r in cuts)
    gradients = source.derivatives(pieces, parts)
    assert parts.signs is not None
    return gradients, parts.signs
