"""The few largest weights of a matrix, kept beside its seeds: positions and float16 values."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

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
# Weights that are looked at together.
_PART = 1 << 20


class Places(NamedTuple):
    """Positions in the matrix read row by row, rows, columns, and values in float32."""

    flat: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor


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
    _known: tuple[tuple[int | None, ...], Places] | None = field(default=None, init=False, repr=False)

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
        self._check()

    def _check(self) -> None:
        index, values = self.index, self.values
        if index.is_meta or not len(index) or torch.compiler.is_compiling():  # a trace has no values to look at
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
        count = min(count, flat.numel())
        # Part by part: topk takes several times the memory of what it looks at.
        index, step = torch.empty(0, dtype=torch.int64), max(_PART, 4 * count)
        for start in range(0, flat.numel(), step):
            index = torch.cat([index, torch.arange(start, min(start + step, flat.numel()))])
            index = index[flat[index].abs().float().topk(min(count, len(index))).indices]
        index = index.sort().values
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
        parts = [flat[start : start + _PART] for start in range(0, flat.numel(), _PART)]
        limit = EXTREME * math.sqrt(
            math.fsum(float(part.double().square().sum()) for part in parts) / max(1, flat.numel())
        )
        return min(sum(int((part.abs() > limit).sum()) for part in parts), int(MOST_EXTREME * flat.numel()))

    def taken_from(self, dense: Tensor) -> Tensor:
        """A copy, float32 or float64, of a dense (rows, columns) matrix less what the outliers hold of it."""
        places = self._places()
        wide = torch.promote_types(dense.dtype, torch.float32)
        rest = dense.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
        # Rounded as the source is, so that what is left does not depend on what it was widened to.
        few = dense.detach()[places.rows, places.columns]
        rest.view(-1)[places.flat] = (few - self.values.to(few.dtype)).to(wide)
        return rest

    def add_to(self, dense: Tensor) -> Tensor:
        """The sum with a dense (rows, columns) matrix."""
        places = self._places()
        return dense.reshape(-1).index_add(0, places.flat, places.values.to(dense.dtype)).reshape(self.shape)

    def add_to_(self, dense: Tensor) -> Tensor:
        """`add_to` in place."""
        places = self._places()
        dense.view(-1).index_add_(0, places.flat, places.values.to(dense.dtype))
        return dense

    def product(self, x: Tensor) -> Tensor:
        """The product with x (..., columns): (..., rows), in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.add_product(x.new_zeros((*x.shape[:-1], self.shape[0]), dtype=wide), x)

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """The sum of y (..., rows) and the product with x (..., columns), in y's dtype."""
        places = self._places()
        wide = torch.promote_types(x.dtype, torch.float32)
        values = places.values.to(wide)
        total = y.to(wide)
        step = max(1, len(values))
        if not torch.compiler.is_compiling():
            step = max(1, min(step, _AT_ONCE // max(1, math.prod(x.shape[:-1]))))
        for k in range(0, len(values), step):
            rows, columns, some = places.rows, places.columns, values
            if step < len(values):
                rows, columns, some = (t[k : k + step] for t in (rows, columns, values))
            total = total.index_add(-1, rows, x.index_select(-1, columns).to(wide) * some)
        return total.to(y.dtype)

    def add_to_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """The sum with rows (*index.shape, columns) of a dense matrix."""
        if torch.compiler.is_compiling():
            # How many there are in a row is in no trace.
            more: Tensor = outlier_rows(index, self.index, self.values, *self.shape)
            return rows + more.reshape(rows.shape).to(rows.dtype)
        at = index.reshape(-1, 1)
        places = self._places()
        ends = torch.arange(self.shape[0] + 1, device=at.device) * self.shape[1]
        starts = torch.searchsorted(places.flat, ends)
        place = starts[at] + torch.arange(int(starts.diff().max()), device=at.device)
        valid = place < starts[at + 1]
        place = place.clamp_max(max(0, len(self.values) - 1))
        values = torch.where(valid, places.values[place].to(rows.dtype), 0.0)
        flat = rows.reshape(at.shape[0], self.shape[1])
        return flat.scatter_add(1, places.columns[place], values).reshape(rows.shape)

    def _places(self) -> Places:
        """What positions mean, made once; made and checked again where the tensors were changed in place."""
        if torch.compiler.is_compiling():
            return self._find()
        state = tuple(None if t.is_inference() else t._version for t in (self.index, self.values))
        if self._known is None or self._known[0] != state or None in state:  # who does not count changes is not trusted
            if self._known is not None:
                self._check()
            # Made in the midst of inference they would otherwise be of no use to autograd later.
            with torch.inference_mode(False):
                object.__setattr__(self, "_known", (state, self._find()))
        assert self._known is not None
        return self._known[1]

    def _find(self) -> Places:
        flat = self.index.long()
        return Places(flat, flat // self.shape[1], flat % self.shape[1], self.values.float())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # copies count their changes anew

    def __len__(self) -> int:
        return len(self.index)


@torch.library.custom_op("rbe::outlier_rows", mutates_args=())
def outlier_rows(index: Tensor, places: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """Rows (numbers, columns) of a matrix of outliers alone, for compilers."""
    zeros = torch.zeros(index.numel(), columns, device=index.device)
    return Outliers((rows, columns), places, values).add_to_rows(zeros, index.reshape(-1))


@outlier_rows.register_fake
def _(index: Tensor, places: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(index.numel(), columns, device=index.device)
