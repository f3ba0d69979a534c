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
    (4, 64)

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
        self.bias = None if bias is None else bias.float()
        self._view: tuple[float, Tensor | None, _cpu.SparseMatrix | _cpu.WideSparseMatrix] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and files make the C++ view anew."""
        return {**self.__dict__, "_view": None}

    @property
    def nbytes(self) -> int:
        """Of memory."""
        parts = (self.starts, self.columns, self.levels, self.bias)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def density(self) -> float:
        """Share of the matrix that is not 0."""
        return self.entries / (self.shape[0] * self.shape[1])

    def _native(self, scale: float) -> "_cpu.SparseMatrix | _cpu.WideSparseMatrix":
        """The C++ view, with the scale of the last call."""
        if self._view is None or self._view[0] != scale:
            bias = None if self.bias is None else self.bias * scale
            self._view = scale, bias, _matrix(self.starts, self.columns, self.levels, bias, scale)
        return self._view[2]

    def matmul(self, x: Tensor, scale: float) -> Tensor:
        """scale * (levels x + bias) of x float32 (n, columns): (n, rows)."""
        (rows, columns), x = self.shape, x.contiguous()
        y = torch.empty(x.shape[0], rows)
        threads = torch.get_num_threads()
        self._native(scale).matmul(columns, x.data_ptr(), x.shape[0], y.data_ptr(), threads)
        return y

    def convolves(self, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> bool:
        """Whether `conv2d` can: there is an output, and 32 bits count the numbers of an image."""
        sides = [x.shape[k + 2] + 2 * padding[k] for k in (0, 1)]
        size = x.shape[1] * math.prod(sides[k] + stride[k] for k in (0, 1))
        return all(sides[k] >= kernel[k] for k in (0, 1)) and min(padding) >= 0 and min(stride) > 0 and size < 1 << 31

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
        out = torch.empty(n, self.shape[0], *sides)
        window = (*kernel, *stride, *padding)
        self._native(scale).conv(image, window, x.data_ptr(), n, out.data_ptr(), torch.get_num_threads())
        return out

    def rows(self, index: Tensor, scale: float) -> Tensor:
        """Rows of scale * levels, float32 (len(index), columns), of int64 (count,)."""
        index = index.contiguous()
        out = torch.empty(len(index), self.shape[1])
        self._native(scale).rows(self.shape[1], index.data_ptr(), len(index), out.data_ptr(), torch.get_num_threads())
        return out

    def decode(self, scale: Tensor) -> Tensor:
        """The dense matrix, float32, the bias as its last column; compilers and torch.func see one operation.

        Args:
            scale: float32 ().
        """
        made: Tensor = _decode(self.starts, self.columns, self.levels, self.bias, scale, self.shape[1])
        return made


def _matrix(
    starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None, scale: float
) -> "_cpu.SparseMatrix | _cpu.WideSparseMatrix":
    kind = _cpu.SparseMatrix if columns.dtype == torch.int16 else _cpu.WideSparseMatrix
    addresses = (starts.data_ptr(), columns.data_ptr(), levels.data_ptr(), 0 if bias is None else bias.data_ptr())
    return kind(starts.shape[0] - 1, *addresses, scale)


@torch.library.custom_op("rbe::sparse_decode", mutates_args=())
def _decode(starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None, scale: Tensor, width: int) -> Tensor:
    index = torch.arange(starts.shape[0] - 1)
    out = torch.empty(len(index), width)
    matrix = _matrix(starts, columns, levels, None, float(scale))
    matrix.rows(width, index.data_ptr(), len(index), out.data_ptr(), torch.get_num_threads())
    out = out if bias is None else torch.cat((out, (bias * float(scale))[:, None]), 1)
    return out.to(scale)


@_decode.register_fake
def _(starts: Tensor, columns: Tensor, levels: Tensor, bias: Tensor | None, scale: Tensor, width: int) -> Tensor:
    return scale.new_empty(starts.shape[0] - 1, width + (bias is not None))
