"""The few largest weights of a matrix, kept beside its seeds: positions and float16 values."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from rbe.errors import RbeError

# Bytes of one: a position in int32 and a value in float16.
BYTES = 6
# A weight is extreme where it is larger than so many times the root mean square of its matrix; normal ones never are.
# A rotation spreads an extreme weight over the matrix as a pattern that the encoder cuts down as a whole: the weights
# of 10 and more, 0.03 % of a matrix, made output errors of MiniLM's feed-forward layers 2 to 5 times larger.
EXTREME = 6.0
# Most of a matrix that is taken for extreme.
MOST_EXTREME = 0.01
# Products in memory at once, 16 MiB.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Outliers:
    """Single weights of a (rows, columns) matrix, the rest being zero.

    >>> few = Outliers.largest(torch.tensor([[1.0, -9.0, 2.0], [3.0, 0.0, 1.0]]), 2)
    >>> few.index.tolist(), few.values.tolist(), few.product(torch.ones(1, 3)).tolist()
    ([1, 3], [-9.0, 3.0], [[-9.0, 3.0]])

    Attributes:
        shape: (rows, columns).
        index: int32 (n,), positions in row-major order, ascending.
        values: float16 (n,).
    """

    shape: tuple[int, int]
    index: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        index, values = self.index, self.values
        if (
            index.dtype != torch.int32
            or values.dtype != torch.float16
            or index.ndim != 1
            or index.shape != values.shape
        ):
            raise RbeError(
                f"outliers: positions are {index.dtype} {tuple(index.shape)} and values {values.dtype} "
                f"{tuple(values.shape)}; they must be int32 and float16 of one length"
            )
        if index.is_meta or not len(index):
            return
        if int(index[0]) < 0 or int(index[-1]) >= self.shape[0] * self.shape[1] or not bool((index.diff() > 0).all()):
            raise RbeError(
                f"outliers: positions must ascend and lie inside the {self.shape} matrix; the file is damaged"
            )
        if not bool(values.isfinite().all()):
            raise RbeError("outliers: a value is NaN or infinite; the file is damaged")

    @classmethod
    def largest(cls, weight: Tensor, count: int) -> Self:
        """The `count` weights of largest size of a finite (rows, columns) matrix, rounded to float16."""
        if weight.numel() >= 1 << 31:
            raise RbeError(
                f"outliers: {tuple(weight.shape)} has too many weights for 32-bit positions; split the matrix"
            )
        flat = weight.detach().reshape(-1)
        index = flat.abs().float().topk(min(count, flat.numel())).indices.sort().values
        most = torch.finfo(torch.float16).max
        return cls((weight.shape[0], weight.shape[1]), index.int(), flat[index].float().clamp(-most, most).half())

    @staticmethod
    def extremes(weight: Tensor) -> int:
        """How many weights of a finite matrix are extreme.

        >>> weight = torch.ones(100, 10)
        >>> weight[3, 4] = 50.0
        >>> Outliers.extremes(weight)
        1
        """
        flat = weight.detach().reshape(-1)
        # In float32 the squares of huge weights overflow.
        limit = EXTREME * float(flat.double().square().mean().sqrt())
        return min(int((flat.abs() > limit).sum()), int(MOST_EXTREME * flat.numel()))

    def taken_from(self, dense: Tensor) -> Tensor:
        """A dense (rows, columns) matrix less what the outliers hold of it: what is left for the seeds."""
        flat = dense.detach().reshape(-1).clone()
        flat[self._places[0]] -= self.values.to(flat.dtype)
        return flat.reshape(self.shape)

    def add_to(self, dense: Tensor) -> Tensor:
        """The sum with a dense (rows, columns) matrix."""
        return dense.reshape(-1).scatter_add(0, self._places[0], self.values.to(dense.dtype)).reshape(self.shape)

    def product(self, x: Tensor) -> Tensor:
        """The product with x (..., columns): (..., rows), in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = x.new_zeros((*x.shape[:-1], self.shape[0]))
        step = max(1, _AT_ONCE // max(1, x[..., 0].numel()))
        values = self.values.to(x.dtype)
        _, rows, columns, _, _ = self._places
        for k in range(0, len(values), step):
            part = x[..., columns[k : k + step]] * values[k : k + step]
            y = y.scatter_add(-1, rows[k : k + step].expand(part.shape), part)
        return y

    def add_to_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """The sum with rows (*index.shape, columns) of a dense matrix."""
        _, _, columns, starts, most = self._places
        at = index.reshape(-1, 1)
        place = starts[at] + torch.arange(most, device=index.device)
        valid = place < starts[at + 1]
        place = place.clamp_max(max(0, len(self.values) - 1))
        values = torch.where(valid, self.values[place].to(rows.dtype), 0.0)
        flat = rows.reshape(at.shape[0], self.shape[1])
        return flat.scatter_add(1, columns[place], values).reshape(rows.shape)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """(positions, rows, columns, where the outliers of each row begin and the last end, most in one row)."""
        # Made in the midst of inference they would otherwise be of no use to autograd later.
        with torch.inference_mode(False):
            flat = self.index.long()
            ends = torch.arange(self.shape[0] + 1, device=flat.device) * self.shape[1]
            starts = torch.searchsorted(flat, ends)
            return flat, flat // self.shape[1], flat % self.shape[1], starts, int(starts.diff().max())

    def __len__(self) -> int:
        return len(self.index)
