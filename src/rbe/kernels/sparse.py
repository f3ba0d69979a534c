"""Matrices of whole numbers, most of them 0, as streams decode to: products that touch only what is there.

Two bytes an entry of +1 or -1, four any other, and no dense matrix: a product reads a few percent of what the dense
one does, and does as little of its arithmetic. Eager, in float32, on the CPU, outside of autograd.
"""

import math

import torch
from torch import Tensor

import rbe._cpu as _cpu

# Columns that 16 bits can name.
NARROW = 1 << 16


class Sparse:
    """A matrix of levels, entry by entry.

    >>> matrix = Sparse(torch.tensor([[0, 1, 0, -3], [2, 0, 0, -1]], dtype=torch.int16))
    >>> matrix.matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), scale=0.5)
    tensor([[-5., -1.]])
    >>> matrix.entries, matrix.nbytes
    (4, 60)

    Args:
        levels: int16 (rows, columns).
        bias: levels (rows,) of what is added to products, times the scale.

    Attributes:
        shape: (rows, columns).
        entries: levels other than 0, the bias not counted.
    """

    def __init__(self, levels: Tensor, bias: Tensor | None = None) -> None:
        self.shape = rows, columns = levels.shape[0], levels.shape[1]
        row, column = levels.nonzero().unbind(1)
        level = levels[row, column]
        # Groups of a row: +1, -1, others. Within each columns ascend, so that memory is read in order.
        group = 3 * row + torch.where(level == 1, 0, torch.where(level == -1, 1, 2))
        order = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=3 * rows).view(rows, 3)
        ends = counts.flatten().cumsum(0)
        starts = torch.zeros(rows + 1, 4, dtype=torch.int64)
        starts[:-1, :3] = (ends - counts.flatten()).view(rows, 3)
        starts[-1, 0] = self.entries = len(level)
        starts[1:, 3] = counts[:, 2].cumsum(0)
        self.starts = starts.to(torch.int32)
        # PyTorch does next to nothing with unsigned numbers: 16 bits stand for columns from 0 to 65535.
        narrow = torch.int16 if columns <= NARROW else torch.int32
        self.columns = column[order].to(narrow)
        self.levels = level[order][group[order] % 3 == 2].contiguous()
        self.bias = None if bias is None else bias.to(torch.float32)
        self._view: _cpu.SparseMatrix | _cpu.WideSparseMatrix | None = None

    @property
    def nbytes(self) -> int:
        """Of memory."""
        parts = (self.starts, self.columns, self.levels, self.bias)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def density(self) -> float:
        """Share of the matrix that is not 0."""
        return self.entries / (self.shape[0] * self.shape[1])

    @property
    def _native(self) -> "_cpu.SparseMatrix | _cpu.WideSparseMatrix":
        """The C++ view, which borrows the tensors' memory; any number of calls may use it at once."""
        if self._view is None:
            self._view = _matrix(self.starts, self.columns, self.levels, self.bias)
        return self._view

    def __getstate__(self) -> dict[str, object]:
        """Copies and files make the C++ view anew."""
        return {**self.__dict__, "_view": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def matmul(self, x: Tensor, scale: float) -> Tensor:
        """scale * (levels x + bias) of x float32 (n, columns): (n, rows)."""
        (rows, columns), x = self.shape, x.contiguous()
        y = _empty(x.shape[0], rows)
        self._native.matmul(scale, columns, x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
        return y

    def convolves(self, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> bool:
        """Whether `conv2d` can: there is an output, and 32 bits count the numbers of an image."""
        sides = [x.shape[k + 2] + 2 * padding[k] for k in (0, 1)]
        size = x.shape[1] * math.prod(sides[k] + stride[k] for k in (0, 1))
        return all(sides[k] >= kernel[k] for k in (0, 1)) and min(padding) >= 0 and min(stride) > 0 and size < 1 << 31

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def conv2d(
        self, x: Tensor, scale: float, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        """The convolution of x float32 (n, channels, height, width) with rows of channels * cells of the kernel.

        Every entry adds the image of its channel, moved, to that of its row. With a stride the image is first taken
        apart into those of every stride-th pixel, so that neighbours of the output need neighbours again.
        """
        x = x.contiguous()
        n, *image = x.shape
        sides = ((image[k + 1] + 2 * padding[k] - kernel[k]) // stride[k] + 1 for k in (0, 1))
        out, window = _empty(n, self.shape[0], *sides), (*kernel, *stride, *padding)
        self._native.conv(scale, image, window, x.data_ptr(), n, out.data_ptr(), torch.get_num_threads())
        return out

    def rows(self, index: Tensor, scale: float) -> Tensor:
        """Rows of scale * levels, float32 (len(index), columns), of int64 (count,)."""
        made: Tensor = _rows(self._native, scale, index.contiguous(), self.shape[1])
        return made

    def decode(self) -> Tensor:
        """The levels, float32 (rows, columns), the bias as a last column; one operation for compilers."""
        made: Tensor = _decode(self.starts, self.columns, self.levels, self.bias, self.shape[1])
        return made


def _empty(*sides: int) -> Tensor:
    """Memory for C++, whatever torch's default dtype and device are."""
    return torch.empty(sides, dtype=torch.float32, device="cpu")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rows(matrix: "_cpu.SparseMatrix | _cpu.WideSparseMatrix", scale: float, index: Tensor, columns: int) -> Tensor:
    out = _empty(len(index), columns)
    matrix.rows(scale, columns, index.data_ptr(), len(index), out.data_ptr(), torch.get_num_threads())
    return out


def _matrix(
    starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None
) -> "_cpu.SparseMatrix | _cpu.WideSparseMatrix":
    kind = _cpu.SparseMatrix if columns.dtype == torch.int16 else _cpu.WideSparseMatrix
    addresses = (starts.data_ptr(), columns.data_ptr(), levels.data_ptr(), 0 if bias is None else bias.data_ptr())
    return kind(starts.shape[0] - 1, *addresses)


@torch.library.custom_op("rbe::sparse_decode", mutates_args=())
def _decode(starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None, width: int) -> Tensor:
    every = torch.arange(starts.shape[0] - 1, device="cpu")
    out: Tensor = _rows(_matrix(starts, columns, levels, None), 1.0, every, width)
    return out if bias is None else torch.cat((out, bias[:, None]), 1)


@_decode.register_fake
def _(starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return starts.new_empty(starts.shape[0] - 1, width + (bias is not None), dtype=torch.float32)
