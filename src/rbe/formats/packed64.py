"""`packed64`: a radius and an angle in 8 or 16 bytes, one degree of freedom a block (docs/format.md).

This file is the definition: plain torch, any device; every kernel must equal it. A block is

    W[i, j] = g(r) sin(theta) phi(i, j),   g(r) = tanh(2 artanh r) = 2 r / (1 + r^2)
    phi     = 1 + 0.1 sin(2 pi H(i, j) / 2^32),   H = fmix32(j xor fmix32(i xor 0x9E3779B9 xor fmix32(stage)))

with i, j counted within the block; fmix32(0) is 0, so the first stage is the formula of the papers. r is a Q0.32 and
theta a Q0.32 of a turn in one word, or, at precision 64, a Q0.64 each in two words.
"""

import math
from functools import cache

import torch
from torch import Tensor

from rbe.disk import check_angle, check_radius, radial, radial_slope
from rbe.errors import RbeError
from rbe.formats.fields import Field, Layout, check_parts
from rbe.formats.spec import SeedSpec
from rbe.mixing import fmix32

VERSION = 1
SIGNS = False
PRECISIONS = (32, 64)
# Strength of the spatial modulation, and the constant that the row index is mixed with.
MODULATION = 0.1
KEY = 0x9E3779B9

LAYOUT = Layout(((Field("radius", 32, "r, Q0.32, floor"), Field("angle", 32, "theta, Q0.32 of a turn, floor")),))
LAYOUT_64 = Layout(((Field("radius", 64, "r, Q0.64, floor"),), (Field("angle", 64, "theta, Q0.64 of a turn, floor"),)))


def check(spec: SeedSpec) -> None:
    """Refuse a specification that this format cannot generate."""
    if spec.precision not in PRECISIONS:
        raise RbeError(f"packed64: precision {spec.precision} is not offered; choose one of {PRECISIONS}")
    if spec.mode is not None:
        raise RbeError(f"packed64: mode {spec.mode!r} is not offered; this format has one mode, None")
    spec.check_rate(words(spec))


def words(spec: SeedSpec) -> int:
    """64-bit words a block."""
    return spec.stages * spec.precision // 32


def code_words(spec: SeedSpec) -> int:
    """Words of discrete bits a block: none."""
    return 0


def check_seeds(seeds: Tensor, spec: SeedSpec) -> None:
    """Every bit pattern is a seed of this format."""


def split(seeds: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of seeds int64 (blocks, words): no discrete bits, the radius and the angle.

    >>> spec = SeedSpec("packed64", (16, 16), bits=0.25)
    >>> [part.tolist() for part in split(torch.tensor([[(1 << 62) + (1 << 30)]]), spec)]
    [[[]], [[0.25]], [[1.5707963267948966]]]

    Returns:
        code int64 (blocks, 0); radius and angle (in radians) float64 (blocks, stages).
    """
    per_stage = seeds.reshape(-1, words(spec) // spec.stages)
    if spec.precision == 32:
        fields = LAYOUT.unpack(per_stage)
        radius, turn = (fields[name].double() * 2.0**-32 for name in ("radius", "angle"))
    else:
        fields = LAYOUT_64.unpack(per_stage)
        radius, turn = (_unsigned(fields[name]) * 2.0**-64 for name in ("radius", "angle"))
        radius = radius.clamp_max(_BELOW_ONE)  # the conversion to float64 may round up to 1
    shape = (seeds.shape[0], spec.stages)
    return seeds.new_empty((seeds.shape[0], 0)), radius.reshape(shape), (turn * math.tau).reshape(shape)


_BELOW_ONE = math.nextafter(1.0, 0.0)


def _unsigned(word: Tensor) -> Tensor:
    """The unsigned value of 64-bit patterns, rounded to float64."""
    high, low = (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFFFF
    return high.double() * 2.0**32 + low.double()


def join(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The inverse of `split`: floor to fixed point, the angle modulo a turn.

    The error stored is below 2^-32 in r and below 2 pi 2^-32 in theta (at precision 64 limited by float64, 2^-53).

    Raises:
        RbeError: a radius is outside [0, 1) or not a number, an angle is not finite, or the shapes differ.
    """
    check_parts("packed64", {"radius": radius, "angle": angle}, (*radius.shape[:1], spec.stages))
    check_radius(radius, "packed64: radius")
    check_angle(angle, "packed64: angle")
    r, turn = radius.double().reshape(-1), (angle.double().reshape(-1) / math.tau) % 1.0
    if spec.precision == 32:
        # From radians and back costs some 2^-53, which must not make a stored angle fall by a step; what comes to a
        # whole turn is angle 0 again.
        seeds = LAYOUT.pack({"radius": _floor(r, 32), "angle": _floor(turn + 2.0**-51, 32) & 0xFFFFFFFF})
    else:
        seeds = LAYOUT_64.pack({"radius": _floor(r, 64), "angle": _floor(turn % 1.0, 64)})
    return seeds.reshape(radius.shape[0], words(spec))


def _floor(fraction: Tensor, bits: int) -> Tensor:
    """floor(fraction * 2^bits) as a bit pattern, fraction in [0, 1]."""
    if bits == 32:
        return (fraction * 2.0**32).floor().to(torch.int64)
    high = (fraction * 2.0**32).floor()
    low = ((fraction * 2.0**32 - high) * 2.0**32).floor()  # exact: a float64 times a power of two
    return (high.to(torch.int64) << 32) | low.to(torch.int64)


@cache
def modulation(height: int, width: int, stage: int) -> Tensor:
    """phi of one block and stage: float64 (height, width), values in [0.9, 1.1].

    >>> modulation(1, 2, 0).shape
    torch.Size([1, 2])
    """
    i = torch.arange(height, dtype=torch.int64)[:, None]
    j = torch.arange(width, dtype=torch.int64)[None, :]
    h = fmix32(j ^ fmix32(i ^ KEY ^ fmix32(torch.tensor(stage))))
    return 1.0 + MODULATION * torch.sin(h.double() * (math.tau * 2.0**-32))


def coefficient(radius: Tensor, angle: Tensor) -> Tensor:
    """The one number c = g(r) sin(theta) in (-1, 1) that a seed holds; same shape and dtype."""
    return radial(radius) * torch.sin(angle)


def _tables(spec: SeedSpec, like: Tensor) -> Tensor:
    """phi of every stage: (stages, h, w)."""
    return torch.stack([modulation(*spec.block_shape, s) for s in range(spec.stages)]).to(like)


def values(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The unscaled weights (blocks, h, w), in radius' dtype, summed over the stages; torch differentiates through."""
    return torch.einsum("bs,shw->bhw", coefficient(radius, angle), _tables(spec, radius))


def derivatives(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor]:
    """dW/dr = g'(r) sin(theta) phi and dW/dtheta = g(r) cos(theta) phi, each (blocks, stages, h, w).

    g'(r) = 2 (1 - r^2) / (1 + r^2)^2 goes to 0 at the rim: there is no singularity.
    """
    tables = _tables(spec, radius)
    d_radius = radial_slope(radius) * torch.sin(angle)
    d_angle = radial(radius) * torch.cos(angle)
    return d_radius[..., None, None] * tables, d_angle[..., None, None] * tables


def generate(seeds: Tensor, spec: SeedSpec) -> Tensor:
    """Generate the unscaled weights of every block.

    >>> spec = SeedSpec("packed64", (2, 2), bits=16.0, block=2)
    >>> seeds = join(torch.empty(1, 0), torch.tensor([[0.5]]), torch.tensor([[math.pi / 2]]), spec)
    >>> generate(seeds, spec).mean().round(decimals=1).item()
    0.8

    Args:
        seeds: int64 (blocks, words).

    Returns:
        float64 (blocks, h, w).

    Raises:
        RbeError: the specification is not this format's, or the seeds do not fit it.

    Source: docs/format.md, packed64; 000 section 5.2, 001 section 8.2.3.
    """
    check(spec)
    if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != words(spec):
        raise RbeError(
            f"packed64: seeds are {seeds.dtype} {tuple(seeds.shape)}, but {spec.stages} stages at precision "
            f"{spec.precision} take int64 (blocks, {words(spec)})"
        )
    return values(*split(seeds, spec), spec)
