"""`trellis`: weights read from sliding windows of a ring of bits, a computed code of each window (design 3.4).

This file is the definition: plain torch, any device; the C++ and Triton kernels must equal it bit for bit.

A block is 16x16 weights. Its 2w words are one ring of 128 w bits; ring bit p is bit p mod 64 (from the least
significant) of word p div 64. Weight t = 16 j + i (row i, column j) reads the `window` bits that end before ring bit
ceil(w (t + 1) / 2), newest bit highest, multiplies them by a 32-bit constant and sums the four bytes of the product.
At w = 1 ... 8 that is w / 2 bits a weight. 16 neighbours in the stream are the 16 rows of one column.
"""

from functools import cache

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
VERSION = 0  # 0 while the multipliers may still change; 1 once frozen

# Both halves of a multiplier are equal for window 16: then the upper half of the product is the lower half plus the
# high half of a 16-bit product, which spares every CPU kernel one multiply in three.
_MULTIPLIERS: dict[tuple[int, int], tuple[int, int]] = {
    **{(16, w): (0x4D474D47, 0x68276827) for w in range(1, 9)},
    **{(14, w): (0x83DCD12D, 0x2545F491) for w in range(1, 9)},
    **{(12, w): (0x83DCD12D, 0x2545F491) for w in range(1, 9)},
}


def rate(bits: float) -> int:
    """Seeds of 128 bits a block, w = 2 * bits.

    >>> rate(2)
    4

    Raises:
        RbeError: the rate is not offered.
    """
    if float(bits) not in BITS:
        raise RbeError(
            f"trellis: {bits} bits per weight is not offered; choose one of {', '.join(f'{b:g}' for b in BITS)}"
        )
    return int(2 * bits)


def check(spec: SeedSpec) -> None:
    """Refuse a specification that this format cannot generate."""
    rate(spec.bits)
    if spec.block != BLOCK:
        raise RbeError(f"trellis: block {spec.block} is not offered; this format has blocks of {BLOCK}")
    if spec.window not in WINDOWS:
        raise RbeError(f"trellis: window {spec.window} is not offered; choose one of {WINDOWS}")
    if spec.mode is not None:
        raise RbeError(f"trellis: mode {spec.mode!r} is not offered; this format has one mode, None")


def words(spec: SeedSpec) -> int:
    """64-bit words a block."""
    return 2 * rate(spec.bits)


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
        seeds: int64 (blocks, 2 w).

    Returns:
        int64 (blocks, 16, 16), row then column, values in [-510, 510].

    Raises:
        RbeError: the specification is not this format's, or the seeds do not fit it.

    Source: design 3.4.
    """
    check(spec)
    w = rate(spec.bits)
    if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != 2 * w:
        raise RbeError(
            f"trellis: seeds are {seeds.dtype} {tuple(seeds.shape)}, "
            f"but {spec.bits:g} bits per weight take int64 (blocks, {2 * w})"
        )
    even_odd = torch.tensor(multipliers(spec.window, w), dtype=torch.int64, device=seeds.device).repeat(WEIGHTS // 2)
    stream = code(windows(seeds, spec.window), even_odd)  # (blocks, 256), t = 16 j + i
    return stream.reshape(-1, BLOCK, BLOCK).transpose(1, 2)
