"""Seed formats: one module a format, each the definition of what its seeds mean."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Protocol

from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import outer128, packed64, packed128, trellis
from rbe.formats.spec import Grades, SeedSpec, mean_bits

__all__ = [
    "DISK_FORMATS",
    "FORMATS",
    "DiskFormat",
    "Rate",
    "SeedFormat",
    "SeedSpec",
    "disk",
    "get",
    "is_disk",
    "make_spec",
    "seeds_shape",
]

# Bits a weight, or (end row, bits) of each grade of a matrix; no end is the last row.
Rate = float | tuple[tuple[int | None, float], ...]


class SeedFormat(Protocol):
    """What a format's module offers."""

    VERSION: int

    def check(self, spec: SeedSpec, /) -> None:
        """Refuse a specification that the format cannot generate."""

    def words(self, spec: SeedSpec, /) -> int:
        """64-bit words a block."""

    def check_seeds(self, seeds: Tensor, spec: SeedSpec, /) -> None:
        """Refuse seeds that stand for no weights."""

    def generate(self, seeds: Tensor, spec: SeedSpec, /) -> Tensor:
        """Unscaled weights (blocks, h, w) of seeds int64 (blocks, words)."""


class DiskFormat(SeedFormat, Protocol):
    """A format around points of the Poincare disk, which can be trained: discrete code, radius and angle."""

    # Whether the discrete bits are signs that gradients train, through latent numbers.
    SIGNS: bool

    def code_words(self, spec: SeedSpec, /) -> int:
        """Words of discrete bits a block."""

    def split(self, seeds: Tensor, spec: SeedSpec, /) -> tuple[Tensor, Tensor, Tensor]:
        """(code int64, radius, angle (blocks, stages)) of seeds int64 (blocks, words)."""

    def join(self, code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec, /) -> Tensor:
        """The inverse of `split`."""

    def values(self, code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec, /) -> Tensor:
        """Unscaled weights (blocks, h, w) in the radius' dtype; torch differentiates through."""

    def derivatives(self, code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec, /) -> tuple[Tensor, Tensor]:
        """dW/dr and dW/dtheta, each (blocks, stages, h, w)."""


DISK_FORMATS: dict[str, DiskFormat] = {"packed64": packed64, "packed128": packed128, "outer128": outer128}
FORMATS: dict[str, SeedFormat] = {"trellis": trellis, **DISK_FORMATS}


def get(name: str) -> SeedFormat:
    """The definition of a format.

    >>> get("trellis").words(SeedSpec("trellis", (16, 16), bits=2.0))
    8

    Raises:
        RbeError: there is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        layers = "; streams have layers of their own, rbe.nn.StreamLinear and others" if name == "stream" else ""
        raise RbeError(f"format {name!r} is not known; this version has {', '.join(sorted(FORMATS))}{layers}") from None


def is_disk(name: str) -> bool:
    """Whether a format's seeds hold points of the Poincare disk, which can be trained by gradient.

    >>> is_disk("packed64"), is_disk("trellis")
    (True, False)
    """
    return name in DISK_FORMATS


def disk(name: str) -> DiskFormat:
    """The definition of a format around points of the Poincare disk.

    >>> disk("outer128").SIGNS  # its discrete bits are signs
    True

    Raises:
        RbeError: the format has no points.
    """
    if name not in DISK_FORMATS:
        raise RbeError(
            f"format {name!r} has no radius and angle; {', '.join(DISK_FORMATS)} have, and can be trained by them"
        )
    return DISK_FORMATS[name]


def make_spec(
    format: str,
    shape: tuple[int, int],
    *,
    bits: Rate | None = None,
    block: int | None = 16,
    window: int = 16,
    rotation: tuple[int, int] = (0, 0),
    mode: str | None = None,
    precision: int = 32,
    stages: int = 1,
) -> SeedSpec:
    """A specification with what was left out filled in: the rate that the block gives, and the usual mode.

    >>> make_spec("packed128", (784, 256))
    SeedSpec(format='packed128', shape=(784, 256), bits=0.5, block=16, window=16, rotation=(0, 0), mode='radial', \
precision=32, stages=1, grades=())

    Args:
        bits: trellis: the rate, 2 when left out, or grades, ((end row, bits), ...), where rows have different rates;
            the other formats have the rate of their block, and refuse another.
        block, window, rotation, mode, precision, stages: as in `SeedSpec`.

    Raises:
        RbeError: there is no such format, or it does not offer the combination.
    """
    definition = get(format)
    if format == "packed128" and mode is None:
        mode = "radial"
    sides = _sides(shape)
    grades = _grades(bits, sides[0]) if isinstance(bits, tuple) else ()
    if isinstance(bits, tuple):
        bits = mean_bits(grades, block or 1) if len(grades) > 1 else grades[0][1]
    grades = grades if len(grades) > 1 else ()
    if not (bits is None or isinstance(bits, Real)):
        raise RbeError(f"make_spec: bits {bits!r} is not a number; give a rate, for instance 2")
    nominal = 2.0 if bits is None else float(bits)
    spec = SeedSpec(format, sides, nominal, block, window, rotation, mode, precision, stages, grades)
    if is_disk(format) and window != 16:  # what a specification without a trellis says
        raise RbeError(f"make_spec: window {window} belongs to a trellis; {format} has none: leave it out")
    if is_disk(format) and bits is None:
        height, width = spec.block_shape
        spec = replace(spec, bits=64.0 * definition.words(spec) / (height * width))
    definition.check(spec)
    return spec


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """The two sides as ints.

    Raises:
        RbeError: there are not two, or one is no whole number.
    """
    try:
        rows, columns = (operator.index(side) for side in shape)
    except (TypeError, ValueError) as cause:
        raise RbeError(f"make_spec: shape {shape!r} is not (rows, columns), two whole numbers: {cause}") from cause
    return rows, columns


def _grades(given: tuple[tuple[int | None, float], ...], rows: int) -> Grades:
    """Grades as a specification has them.

    Raises:
        RbeError: they are no pairs of an end and a rate, or do not reach the last row.
    """
    try:
        grades = tuple((rows if end is None else operator.index(end), float(rate)) for end, rate in given)
    except (TypeError, ValueError) as cause:
        raise RbeError(
            f"make_spec: grades {given!r} are not ((end row, bits), ...), such as ((2048, 3), ({rows}, 1)): {cause}"
        ) from cause
    if not grades or grades[-1][0] != rows:
        raise RbeError(f"make_spec: grades {given!r} do not end at the last of the {rows} rows")
    return grades


def seeds_shape(spec: SeedSpec) -> tuple[int, int]:
    """Shape of a matrix's seeds: (blocks, words); of a graded one (half bits a block, 2), one grade after the other.

    >>> seeds_shape(make_spec("trellis", (40, 20), bits=2))
    (6, 8)
    >>> seeds_shape(make_spec("trellis", (40, 20), bits=((16, 3), (40, 1))))
    (20, 2)
    """
    words = get(spec.format).words
    if not spec.grades:
        return spec.blocks, words(spec)
    return sum(part.blocks * words(part) for _, part in spec.parts) // 2, 2
