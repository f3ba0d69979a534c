"""`trellis`: weights read from sliding windows of a ring of bits, a computed code of each window (docs/format.md).

This file is the definition: plain torch, any device; every kernel must equal it bit for bit.

A block is 16x16 weights. Its 2w words are one ring of 128 w bits; ring bit p is bit p mod 64 (from the least
significant) of word p div 64. Weight t = 16 j + i (row i, column j) reads the `window` bits that end before ring bit
ceil(w (t + 1) / 2), newest bit highest, multiplies them by a 32-bit constant and sums the four bytes of the product.
At w = 1 ... 8 that is w / 2 bits a weight. 16 neighbours in the stream are the 16 rows of one column.
"""

from collections.abc import Iterator
from functools import cache
from numbers import Real

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.formats.fields import Field, Layout
from rbe.formats.spec import SeedSpec

BLOCK = 16
WEIGHTS = BLOCK * BLOCK
WINDOWS = (12, 14, 16)
BITS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
# The mean of the sum of four uniform bytes.
OFFSET = 510
VERSION = 1  # the multipliers are frozen

# (window, w) -> the multipliers of even and odd t; from benchmarks/multipliers.py, two refined by hand; frozen.
# At window 16 most have equal halves: then the upper half of the product is the lower half plus the high half of a
# 16-bit product, which spares a CPU kernel one multiply in three. Others are there where they are over 0.3 % better.
_MULTIPLIERS: dict[tuple[int, int], tuple[int, int]] = {
    (16, 1): (0x79827982, 0x71597159),
    (16, 2): (0x4F3B929B, 0x4F3B929B),
    (16, 3): (0xC38DC38D, 0x79267926),
    (16, 4): (0x63C163C1, 0x63C163C1),
    (16, 5): (0x63C163C1, 0x63C363C3),
    (16, 6): (0xEBB1EBB1, 0xEBB1EBB1),
    (16, 7): (0x341B4ADB, 0x341B4ADB),
    (16, 8): (0xA596A596, 0xA596A596),
    (14, 1): (0x48DD4DA9, 0x5474C2BE),
    (14, 2): (0xAA2D256B, 0xAA2D256B),
    (14, 3): (0xAA2D2D6B, 0xAA2D256B),
    (14, 4): (0xC335D393, 0xC335D393),
    (14, 5): (0x89C4C5BF, 0x89C4D5BF),
    (14, 6): (0xCE6C5CAF, 0xCE6C5CAF),
    (14, 7): (0xC335D393, 0xC375D393),
    (14, 8): (0x8D958983, 0x8D958983),
    (12, 1): (0xC1CAC469, 0x5A72856A),
    (12, 2): (0xBCD79563, 0xBCD79563),
    (12, 3): (0x90E3B137, 0x73CD718F),
    (12, 4): (0x4B9FB3D3, 0x4B9FB3D3),
    (12, 5): (0x4E3B9A9B, 0x4E3B929F),
    (12, 6): (0x7C2BA71E, 0x7C2BA71E),
    (12, 7): (0x509EC72A, 0x109EC72A),
    (12, 8): (0x89C4C5BF, 0x89C4C5BF),
}


def rate(bits: float) -> int:
    """Seeds of 128 bits a block, w = 2 * bits.

    >>> rate(2)
    4

    Raises:
        RbeError: the rate is not offered.
    """
    if not isinstance(bits, Real) or bits not in BITS:
        raise RbeError(
            f"trellis: {bits!r} bits per weight is not offered; choose one of {', '.join(f'{b:g}' for b in BITS)}"
        )
    return int(2 * bits)


def check(spec: SeedSpec) -> None:
    """Refuse a specification that this format cannot generate."""
    for _, part in spec.parts:
        rate(part.bits)
    if spec.block != BLOCK:
        raise RbeError(f"trellis: block {spec.block} is not offered; this format has blocks of {BLOCK}")
    if spec.window not in WINDOWS:
        raise RbeError(f"trellis: window {spec.window} is not offered; choose one of {WINDOWS}")
    if spec.mode is not None:
        raise RbeError(f"trellis: mode {spec.mode!r} is not offered; this format has one mode, None")
    if spec.stages != 1 or spec.precision != 32:
        raise RbeError(f"trellis: stages {spec.stages} and precision {spec.precision} are not offered; leave them out")


def words(spec: SeedSpec) -> int:
    """64-bit words a block, of a matrix that is not graded."""
    return 2 * rate(spec.bits)


def grades(seeds: Tensor, spec: SeedSpec) -> Iterator[tuple[slice, Tensor, SeedSpec]]:
    """(rows, seeds (blocks, words), specification) of every grade of a graded matrix; the seeds are views.

    Args:
        seeds: int64 (units, 2): all blocks of the first grade, then those of the next; a unit is half a bit a weight.

    Raises:
        RbeError: the seeds do not fit the specification.
    """
    units = sum(part.blocks * words(part) for _, part in spec.parts) // 2
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != (units, 2):
        raise RbeError(
            f"trellis: seeds are {seeds.dtype} {tuple(seeds.shape)}, but grades {spec.grades} of a {spec.shape} matrix "
            f"take int64 {(units, 2)}"
        )
    start = 0
    for rows, part in spec.parts:
        stop = start + part.blocks * words(part) // 2
        yield rows, seeds[start:stop].reshape(part.blocks, words(part)), part
        start = stop


def check_seeds(seeds: Tensor, spec: SeedSpec) -> None:
    """Every bit pattern is a seed of this format."""


def multipliers(window: int, w: int) -> tuple[int, int]:
    """The two 32-bit multipliers, for even and odd t."""
    return _MULTIPLIERS[window, w]


def layout(w: int) -> Layout:
    """The bit fields of one block: a single ring, cut into words."""
    return Layout(
        tuple(
            ((Field(f"ring{k}", 64, f"ring bits {64 * k} ... {64 * k + 63}, first bit least significant"),))
            for k in range(2 * w)
        )
    )


def pack(ring: Tensor) -> Tensor:
    """Pack ring bits (blocks, 128 w), each 0 or 1, into seeds int64 (blocks, 2 w).

    >>> pack(torch.tensor([[1, 1] + [0] * 126])).tolist()
    [[3, 0]]
    """
    shifts = torch.arange(64, dtype=torch.int64, device=ring.device)
    return (ring.to(torch.int64).reshape(ring.shape[0], -1, 64) << shifts).sum(-1)  # disjoint bits: the sum is an or


def unpack(seeds: Tensor) -> Tensor:
    """The inverse of `pack`: seeds int64 (blocks, 2 w) to ring bits int64 (blocks, 128 w)."""
    shifts = torch.arange(64, dtype=torch.int64, device=seeds.device)
    return ((seeds.unsqueeze(-1) >> shifts) & 1).flatten(1)


@cache
def _window_bits(w: int, window: int) -> Tensor:
    """Ring positions (256, window) of the bits of every weight's window, oldest first."""
    t = torch.arange(WEIGHTS, dtype=torch.int64)
    ends = (w * (t + 1) + 1) // 2
    return (ends[:, None] - window + torch.arange(window)) % (128 * w)


def windows(seeds: Tensor, window: int) -> Tensor:
    """The window of every weight, int64 (blocks, 256) in stream order, values in [0, 2^window)."""
    ring = unpack(seeds)
    index = _window_bits(seeds.shape[1] // 2, window).to(seeds.device)
    return (ring[:, index] << torch.arange(window, dtype=torch.int64, device=seeds.device)).sum(-1)


def code(window_values: Tensor, multiplier: Tensor) -> Tensor:
    """The integer code of windows: the byte sum of window * multiplier mod 2^32, minus 510; int64, same shape."""
    product = (window_values * multiplier) & 0xFFFFFFFF
    byte_sum = (product & 255) + ((product >> 8) & 255) + ((product >> 16) & 255) + (product >> 24)
    return byte_sum - OFFSET


def code_table(window: int, w: int) -> Tensor:
    """The code of every window value for even and odd t, int64 (2, 2^window)."""
    every = torch.arange(1 << window, dtype=torch.int64)
    return torch.stack([code(every, torch.tensor(m)) for m in multipliers(window, w)])


def generate(seeds: Tensor, spec: SeedSpec) -> Tensor:
    """Generate the unscaled, still rotated integer weights of every block.

    >>> spec = SeedSpec("trellis", (16, 16), bits=0.5)
    >>> generate(torch.tensor([[1, 0]]), spec).shape
    torch.Size([1, 16, 16])

    Args:
        seeds: int64 (blocks, 2 w); of a graded matrix (units, 2), as in `grades`.

    Returns:
        int64 (blocks, 16, 16), row then column, values in [-510, 510].

    Raises:
        RbeError: the specification is not this format's, or the seeds do not fit it.

    Source: docs/format.md, trellis; A. Tseng et al., QTIP, arXiv 2406.11235 (bit-shift trellis, code by sums of bytes).
    """
    check(spec)
    if spec.grades:
        return torch.cat([generate(some, part) for _, some, part in grades(seeds, spec)])
    w = rate(spec.bits)
    if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != 2 * w:
        raise RbeError(
            f"trellis: seeds are {seeds.dtype} {tuple(seeds.shape)}, "
            f"but {spec.bits:g} bits per weight take int64 (blocks, {2 * w})"
        )
    even_odd = torch.tensor(multipliers(spec.window, w), dtype=torch.int64, device=seeds.device).repeat(WEIGHTS // 2)
    stream = code(windows(seeds, spec.window), even_odd)  # (blocks, 256), t = 16 j + i
    return stream.reshape(-1, BLOCK, BLOCK).transpose(1, 2)
