"""`stream`: one seed a matrix, a stream of bytes from which whole-number weights are read, most of them 0.

For ratios at which a block of its own seed is too coarse, 250:1 and beyond: no bit belongs to a block, all of them are
shared by the whole matrix. This file is the definition, in integers alone: the same bytes give the same weights
everywhere. A matrix is `scale` times *levels*, whole numbers; with a bias, a last column holds it.

The stream is a binary arithmetic code: decisions, one after another, each with a probability that follows from the
decisions before it.

    columns    whether columns are marked (1 decision at 1/2)
    rows       for every row, whether it has a level other than 0
    marks      for every column but the bias, if they are marked, whether it has one
    then for every row and, in it, the bias and every column that may have one, from the left:
    present    whether the level is other than 0
    sign       whether it is negative (at 1/2)
    more       whether it goes on from 1 to 2, from 2 to 3 and so on, up to LARGEST

All but `present` count what came before them, and begin with one half of each answer. `present` mixes in the log-odds
domain (base 2, 12 fractional bits) six views of the place: the whole matrix, its row, its column, its group (the
columns of one input channel, `cells` of them), its row's part of the group, its cell in the group, and whether its two
neighbours to the left are present. The weights of the mix start at MIX and follow the coding error, as in the
mixers of PAQ.
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache

import torch
from torch import Tensor

from rbe.errors import RbeError

VERSION = 1
LARGEST = 255
# Weights of the mix at the start, in units of 2^-12; the first is that of the whole matrix.
MIX = (4096, 2600, 2048, 1024, 1536, 1024, 1024)
# How strongly a view starts from the odds of the whole matrix, in observations.
PRIOR = 8
# The mix follows its error by 2^-RATE; its weights have FINE bits more, and what is added to them is rounded to the
# nearest: rounded down, they would sink at every place where nothing happens, which most places are.
RATE, FINE = 11, 8
# Probabilities are whole multiples of 2^-16, and none is certain.
LEAST = 24
_ONE = 1 << 16
_HALF = _ONE >> 1
_TOP = (1 << 32) - 1


@cache
def tables() -> tuple[list[int], list[int]]:
    """log2(1 + k/1024) in units of 2^-12, and 2^(16 - k/1024), rounded; decimals round alike everywhere."""
    with localcontext() as context:
        context.prec = 30
        two = Decimal(2).ln()
        logs = [int((4096 * (1 + Decimal(k) / 1024).ln() / two).to_integral_value()) for k in range(1024)]
        powers = [int((_ONE * (-two * k / 1024).exp()).to_integral_value()) for k in range(1024)]
    return logs, powers


def _clip(p: int) -> int:
    return min(max(p, LEAST), _ONE - LEAST)


class _Writer:
    """Encodes: `bit` returns the decision it was given."""

    def __init__(self) -> None:
        self.low, self.high, self.out = 0, _TOP, bytearray()

    def bit(self, p: int, bit: bool | None) -> bool:
        middle = self.low + ((self.high - self.low) * p >> 16)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.out.append(self.high >> 24)
            self.low, self.high = self.low << 8 & _TOP, (self.high << 8 & _TOP) | 255
        return bool(bit)

    def finish(self) -> bytes:
        """The fewest bytes that, with zeros after them, lie in the interval."""
        for count in range(5):
            rest = 32 - 8 * count
            value = -(-self.low >> rest)
            if value << rest <= self.high:
                break
        return bytes(self.out + value.to_bytes(count, "big")).rstrip(b"\0")


class _Reader:
    """Decodes: `bit` returns the decision it reads."""

    def __init__(self, data: bytes) -> None:
        self.low, self.high, self.data = 0, _TOP, data
        self.value, self.next = int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 4

    def bit(self, p: int, bit: bool | None = None) -> bool:
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = self.value <= middle
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.low, self.high = self.low << 8 & _TOP, (self.high << 8 & _TOP) | 255
            byte = self.data[self.next] if self.next < len(self.data) else 0
            self.value, self.next = (self.value << 8 & _TOP) | byte, self.next + 1
        return bit


_Coder = _Writer | _Reader


class _Counted:
    """A decision whose probability is how often it was taken before, with one half of each answer at the start."""

    def __init__(self) -> None:
        self.yes, self.no = 1, 1

    def code(self, coder: _Coder, bit: bool | None) -> bool:
        bit = coder.bit(_clip(_ONE * self.yes // (self.yes + self.no)), bit)
        if bit:
            self.yes += 2
        else:
            self.no += 2
        return bit


class _Mixed:
    """`present`: the odds of a place from several views of it."""

    def __init__(self, columns: int, cells: int) -> None:
        self.cells, self.mix, self.yes, self.no = cells, [w << FINE for w in MIX], 1, 12
        self.columns = [[0, 0] for _ in range(columns)]
        self.groups = [[0, 0] for _ in range(-(-columns // cells))]
        self.places = [[0, 0] for _ in range(cells)]
        self.logs, self.powers = tables()
        self.start()

    def start(self) -> None:
        """A new row."""
        self.row, self.parts, self.before = [0, 0], [[0, 0] for _ in self.groups], 0

    def _log2(self, n: int) -> int:
        length = n.bit_length()
        return (length - 1 << 12) + self.logs[(n >> length - 11 if length > 11 else n << 11 - length) & 1023]

    def _probability(self, odds: int) -> int:
        size = min(abs(odds), 63487)
        p = _ONE * _ONE // (_ONE + (self.powers[size >> 2 & 1023] >> (size >> 12)))
        return _clip(p if odds >= 0 else _ONE - p)

    def code(self, coder: _Coder, column: int, bit: bool | None) -> bool:
        group, place = divmod(column, self.cells)
        views = (self.row, self.columns[column], self.groups[group], self.parts[group], self.places[place])
        p = _ONE * self.yes // (self.yes + self.no)
        base = self._log2(p) - self._log2(_ONE - p)
        yes, no = PRIOR * p, PRIOR * (_ONE - p)
        inputs = [base]
        inputs += [self._log2((v[1] << 16) + yes) - self._log2((v[0] << 16) + no) - base for v in views]
        inputs.append((2 * (self.before & 1) + (self.before >> 1) - 1) << 11)
        p = self._probability(sum((w >> FINE) * x for w, x in zip(self.mix, inputs, strict=True)) >> 12)
        bit = coder.bit(p, bit)
        error = _ONE - p if bit else -p
        shift = 12 + RATE - FINE
        self.mix = [w + (x * error + (1 << shift - 1) >> shift) for w, x in zip(self.mix, inputs, strict=True)]
        for view in views:
            view[bit] += 1
        if bit:
            self.yes += 1
        else:
            self.no += 1
        self.before = (self.before << 1 | bit) & 3
        return bit


class _Levels:
    """The size and sign of a level that is not 0."""

    def __init__(self) -> None:
        self.more = [_Counted() for _ in range(8)]

    def code(self, coder: _Coder, level: int | None) -> int:
        negative = coder.bit(_HALF, None if level is None else level < 0)
        size = 1
        while size < LARGEST and self.more[min(size, 8) - 1].code(coder, None if level is None else abs(level) > size):
            size += 1
        return -size if negative else size


def _walk(
    coder: _Coder, rows: int, columns: int, cells: int, bias: bool, known: Sequence[Sequence[int]] | None, marked: bool
) -> list[list[int]]:
    """All decisions in their order; `known` levels are written, without them they are read."""
    levels = [[0] * (columns + bias) for _ in range(rows)]
    marked = coder.bit(_HALF, marked)
    row, mark, of_bias = _Counted(), _Counted(), _Counted()
    used = [row.code(coder, None if known is None else any(known[i])) for i in range(rows)]
    able = list(range(columns))
    if marked:
        able = [j for j in able if mark.code(coder, None if known is None else any(line[j] for line in known))]
    present, size = _Mixed(columns, cells), _Levels()
    for i in range(rows):
        if not used[i]:
            continue
        present.start()
        given = None if known is None else known[i]
        if bias and of_bias.code(coder, None if given is None else given[columns] != 0):
            levels[i][columns] = size.code(coder, None if given is None else given[columns])
        for j in able:
            if present.code(coder, j, None if given is None else given[j] != 0):
                levels[i][j] = size.code(coder, None if given is None else given[j])
    return levels


def check_shape(shape: tuple[int, int], cells: int) -> None:
    """Refuse sides that no matrix has.

    Raises:
        RbeError: a side is not positive, or groups of so many columns do not fit.
    """
    if len(shape) != 2 or min(shape) < 1 or not 1 <= cells <= shape[1]:
        raise RbeError(
            f"stream: shape {tuple(shape)} with groups of {cells} columns; give two positive sides, 1 or more"
        )


def check_levels(levels: Tensor, cells: int, bias: bool) -> None:
    """Refuse what cannot be packed.

    Raises:
        RbeError: the levels are no matrix of whole numbers of at most LARGEST.
    """
    if levels.ndim != 2 or levels.is_floating_point() or levels.is_complex():
        raise RbeError(f"stream: levels are {levels.dtype} {tuple(levels.shape)}; give a matrix of whole numbers")
    check_shape((levels.shape[0], levels.shape[1] - bias), cells)
    most = max(int(levels.max()), -int(levels.min()))
    if most > LARGEST:
        raise RbeError(f"stream: a level of {most} is too large; at most {LARGEST} can be said, choose a larger scale")


def check_seed(seed: Tensor, shape: tuple[int, int], cells: int) -> None:
    """Refuse what cannot be unpacked.

    Raises:
        RbeError: the seed is no row of bytes, or the shape none of a matrix.
    """
    check_shape(shape, cells)
    if seed.dtype != torch.uint8 or seed.ndim != 1:
        raise RbeError(f"stream: the seed is {seed.dtype} {tuple(seed.shape)}; it must be uint8 (bytes,)")


def check_end(size: int, wanted: int, shape: tuple[int, int]) -> None:
    """Refuse a seed of more bytes than the matrix wanted.

    Raises:
        RbeError: it is longer.
    """
    if size > wanted:
        raise RbeError(
            f"stream: a matrix of {tuple(shape)} is full after {wanted} of the seed's {size} bytes; the "
            "shape, the groups or the bias are not those it was packed with"
        )


def pack(levels: Tensor, *, cells: int = 1, bias: bool = False) -> Tensor:
    """The seed of a matrix of levels.

    >>> pack(torch.tensor([[0, 1, 0, -2], [0, 0, 0, 0]])).tolist()
    [177, 216, 53]

    Args:
        levels: any whole-number dtype, (rows, columns), or (rows, columns + 1) with a bias.
        cells: columns of one input channel, neighbours of each other.
        bias: the last column is one.

    Returns:
        uint8 (bytes,).

    Raises:
        RbeError: the levels are no matrix of whole numbers of at most LARGEST.
    """
    check_levels(levels, cells, bias)
    rows, columns = levels.shape[0], levels.shape[1] - bias
    known = levels.tolist()
    written: dict[bool, bytes] = {}
    # Marks save something only where a column has no level.
    full = columns == sum(map(any, zip(*(line[:columns] for line in known), strict=True)))
    for marked in (False,) if full else (False, True):
        writer = _Writer()
        _walk(writer, rows, columns, cells, bias, known, marked)
        written[marked] = writer.finish()
    shortest: bytes = min(written.values(), key=len)
    return torch.tensor(list(shortest), dtype=torch.uint8)


def unpack(seed: Tensor, shape: tuple[int, int], *, cells: int = 1, bias: bool = False) -> Tensor:
    """The levels that a seed stands for.

    >>> unpack(torch.tensor([177, 216, 53], dtype=torch.uint8), (2, 4)).tolist()
    [[0, 1, 0, -2], [0, 0, 0, 0]]

    Args:
        seed: uint8 (bytes,).
        shape: (rows, columns), the bias not counted.
        cells, bias: as for `pack`.

    Returns:
        int16 (rows, columns), or (rows, columns + 1) with a bias.

    Raises:
        RbeError: the seed is no row of bytes, or is longer than the matrix it is to fill.
    """
    check_seed(seed, shape, cells)
    data = bytes(seed.tolist())
    reader = _Reader(data)
    levels = _walk(reader, *shape, cells, bias, None, False)
    check_end(len(data), reader.next, shape)
    return torch.tensor(levels, dtype=torch.int16)
