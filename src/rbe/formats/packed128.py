"""`packed128`: the Poincare-disk seed, 64 discrete bits and a point (r, theta) in 16 bytes (docs/format.md).

This file is the definition: plain torch, any device; every kernel must equal it. With cell coordinates
x = 2j/(n-1) - 1, y = 2i/(m-1) - 1, cell angle a = atan2(y, x) and cell radius rho = min(hypot(x, y), 0.99):

* faithful: a point starts at r (cos(a + theta), sin(a + theta)) and takes 20 CORDIC steps, turned by +-atan(2^-k) and
  stretched by sqrt(1 + 4^-k); after steps 3, 7, 11, 15 and 19 a radius R >= 1 becomes tanh(R). At the end it stands
  at radius R and angle theta_f: W = A f(alpha R) M(theta_f). R is the same for every cell, so only M sees the place.
* radial: R = K r rho, K = 1.646760 the gain of the steps, theta_f = a + theta + sum of the steps, no tanh, and f is
  divided by its largest value on [0, alpha K].

A = 2 geo_amp / 4095 - 1, alpha = 10 hyp_freq / 4095, f is one of sinh, cosh, tanh, sech^2, and with q = basis_sel
M = 1 (q = 0), cos(q theta_f) (1 ... 31) or sin(q theta_f) (32 ... 63).
"""

import math
from functools import cache

import torch
from torch import Tensor

from rbe.disk import check_angle, check_radius
from rbe.errors import RbeError
from rbe.formats.fields import Field, Layout, check_parts, join_floats, split_floats
from rbe.formats.spec import SeedSpec

VERSION = 1
SIGNS = False
MODES = ("radial", "faithful")
STEPS = 20
# The steps stretch every vector by this much, whatever their signs.
GAIN = math.prod(math.sqrt(1.0 + 4.0**-k) for k in range(STEPS))
LARGEST_RADIUS = 0.99  # of a cell
LARGEST_FREQUENCY = 10.0

LAYOUT = Layout(
    (
        (
            Field("quadrant", 2, "basis function: 0 sinh, 1 cosh, 2 tanh, 3 sech^2"),
            Field("hyp_freq", 12, "alpha = 10 hyp_freq / 4095; radial mode reads 0 as 1"),
            Field("geo_amp", 12, "A = 2 geo_amp / 4095 - 1"),
            Field("basis_sel", 6, "q: M = 1 (0), cos(q theta_f) (1-31), sin(q theta_f) (32-63)"),
            Field("cordic_seq", 32, "bit k from the least significant steers step k = 0 ... 19: 1 is +, 0 is -"),
        ),
        (Field("radius", 32, "r in [0, 1), IEEE float32"), Field("angle", 32, "theta in radians, IEEE float32")),
    )
)


def check(spec: SeedSpec) -> None:
    """Refuse a specification that this format cannot generate."""
    if spec.mode not in MODES:
        raise RbeError(f"packed128: mode {spec.mode!r} is not offered; choose one of {', '.join(MODES)}")
    if spec.precision != 32:
        raise RbeError(f"packed128: precision {spec.precision} is not offered; r and theta are float32")
    spec.check_rate(words(spec))


def words(spec: SeedSpec) -> int:
    """64-bit words a block."""
    return 2 * spec.stages


def code_words(spec: SeedSpec) -> int:
    """Words of discrete bits a block."""
    return spec.stages


def check_seeds(seeds: Tensor, spec: SeedSpec) -> None:
    """Refuse seeds whose radius is outside [0, 1) or whose angle is not finite."""
    _code, radius, angle = split(seeds, spec)
    check_radius(radius, "packed128: radius")
    check_angle(angle, "packed128: angle")


def fields(code: Tensor) -> dict[str, Tensor]:
    """The discrete fields of code words int64 (...), each int64 (...)."""
    table = LAYOUT.unpack(torch.stack([code.flatten(), torch.zeros_like(code).flatten()], -1))
    return {f.name: table[f.name].reshape(code.shape) for f in LAYOUT.words[0]}


def code_of(quadrant: Tensor, hyp_freq: Tensor, geo_amp: Tensor, basis_sel: Tensor, cordic_seq: Tensor) -> Tensor:
    """The inverse of `fields`: int64 tensors of one shape to code words of that shape.

    Raises:
        RbeError: a field is out of range, or not an int64 tensor of the others' shape.
    """
    given = {"quadrant": quadrant, "hyp_freq": hyp_freq, "geo_amp": geo_amp, "basis_sel": basis_sel}
    flat = {name: value.flatten() for name, value in {**given, "cordic_seq": cordic_seq}.items()}
    none = torch.zeros_like(flat["quadrant"])
    return LAYOUT.pack({**flat, "radius": none, "angle": none})[:, 0].reshape(quadrant.shape)


def split(seeds: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of seeds int64 (blocks, words): code int64, radius and angle float32, each (blocks, stages)."""
    pairs = seeds.reshape(seeds.shape[0], spec.stages, 2)
    return pairs[..., 0].contiguous(), *split_floats(pairs[..., 1])


def join(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The inverse of `split`: radius and angle are rounded to float32.

    Raises:
        RbeError: a radius is outside [0, 1) or not a number, an angle is not finite, or the shapes differ.
    """
    check_parts("packed128", {"radius": radius, "angle": angle}, (code.shape[0], spec.stages), code)
    r, theta = radius.detach().to(torch.float32), angle.detach().to(torch.float32)
    check_radius(r, "packed128: radius")
    check_angle(theta, "packed128: angle")
    return torch.stack([code, join_floats(r, theta)], -1).reshape(code.shape[0], words(spec))


@cache
def cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Radius in [0, 0.99] and angle of every cell of a block, float64 (height, width) each.

    >>> rho, a = cells(3, 3)
    >>> round(rho.max().item(), 6), rho[1, 1].item(), a[1, 1].item()
    (0.99, 0.0, 0.0)
    """
    y = _axis(height)[:, None].expand(height, width)
    x = _axis(width)[None, :].expand(height, width)
    return torch.hypot(x, y).clamp_max(LARGEST_RADIUS), torch.atan2(y, x)


def _axis(n: int) -> Tensor:
    if n == 1:
        return torch.zeros(1, dtype=torch.float64)
    return 2.0 * torch.arange(n, dtype=torch.float64) / (n - 1) - 1.0


def basis(quadrant: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The four basis functions and their first two derivatives.

    >>> [round(v.item(), 6) for v in basis(torch.tensor(3), torch.tensor(0.8, dtype=torch.float64))]
    [0.559055, -0.742466, 0.360965]

    Args:
        quadrant: int64, 0 sinh, 1 cosh, 2 tanh, 3 sech^2; broadcasts against x.
        x: float.

    Returns:
        (f, f', f''), each in x's dtype. The second derivative of sech^2 is 2 sech^2 (3 tanh^2 - 1); the table of 003
        section 4.2.3 has another.
    """
    sinh, cosh, tanh = torch.sinh(x), torch.cosh(x), torch.tanh(x)
    sech2 = 1.0 / (cosh * cosh)
    bell = -2.0 * tanh * sech2
    return (
        _choose(quadrant, sinh, cosh, tanh, sech2),
        _choose(quadrant, cosh, sinh, sech2, bell),
        _choose(quadrant, sinh, cosh, bell, 2.0 * sech2 * (3.0 * tanh * tanh - 1.0)),
    )


def _choose(quadrant: Tensor, sinh: Tensor, cosh: Tensor, tanh: Tensor, bell: Tensor) -> Tensor:
    return torch.where(quadrant < 2, torch.where(quadrant == 0, sinh, cosh), torch.where(quadrant == 2, tanh, bell))


def directions(cordic_seq: Tensor) -> Tensor:
    """d_k of every step: (..., 20), entries +1 and -1, float64."""
    return 2.0 * ((cordic_seq[..., None] >> torch.arange(STEPS, device=cordic_seq.device)) & 1).double() - 1.0


def turn(cordic_seq: Tensor) -> Tensor:
    """The angle by which the steps turn every vector, float64 (...): the sum of d_k atan(2^-k)."""
    angles = torch.atan(2.0 ** -torch.arange(STEPS, dtype=torch.float64, device=cordic_seq.device))
    return directions(cordic_seq) @ angles


def cordic(cordic_seq: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The 20 steps of the faithful mode from (x, y); cordic_seq broadcasts against them."""
    d = directions(cordic_seq).to(x)
    for k in range(STEPS):
        step = d[..., k] * 2.0**-k
        x, y = x - step * y, y + step * x
        if k % 4 == 3:
            radius = torch.hypot(x, y)
            outside = radius >= 1
            shrink = torch.where(outside, torch.tanh(radius) / torch.where(outside, radius, 1.0), 1.0)
            x, y = x * shrink, y * shrink
    return x, y


def final_radius(radius: Tensor) -> tuple[Tensor, Tensor]:
    """What the steps make of a radius in faithful mode, and its derivative; it jumps where a clamp sets in.

    >>> [round(v.item(), 6) for v in final_radius(torch.tensor(0.5, dtype=torch.float64))]
    [0.82338, 1.64676]
    """
    slope = torch.ones_like(radius)
    for k in range(STEPS):
        stretch = math.sqrt(1.0 + 4.0**-k)
        radius, slope = radius * stretch, slope * stretch
        if k % 4 == 3:
            clamped = torch.tanh(radius)
            slope = torch.where(radius >= 1, slope * (1.0 - clamped) * (1.0 + clamped), slope)
            radius = torch.where(radius >= 1, clamped, radius)
    return radius, slope


def _prepared(code: Tensor, radius: Tensor, mode: str | None) -> tuple[Tensor, ...]:
    """(quadrant, q, A, alpha, 1 / largest f), each (blocks, stages, 1, 1)."""
    part = {name: value[..., None, None] for name, value in fields(code).items()}
    frequency = part["hyp_freq"].clamp_min(1) if mode == "radial" else part["hyp_freq"]
    amplitude = (2.0 * part["geo_amp"].double() / 4095.0 - 1.0).to(radius)
    alpha = frequency.double() * (LARGEST_FREQUENCY / 4095.0)
    quadrant, top = part["quadrant"], torch.ones_like(alpha)
    if mode == "radial":
        top = torch.where(quadrant == 3, 1.0, basis(quadrant, alpha * GAIN)[0])
    return quadrant, part["basis_sel"], amplitude, alpha.to(radius), (1.0 / top).to(radius)


def _wave(q: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """M and its derivative in the angle."""
    phase = q.to(angle) * angle
    sin, cos = torch.sin(phase), torch.cos(phase)
    odd = q >= 32
    return torch.where(odd, sin, cos), q.to(angle) * torch.where(odd, cos, -sin)


def values(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The unscaled weights (blocks, h, w), in radius' dtype, summed over the stages; torch differentiates through.

    Args:
        code: int64 (blocks, stages).
        radius, angle: float32 or float64 (blocks, stages).
    """
    rho, a = (table.to(radius) for table in cells(*spec.block_shape))
    quadrant, q, amplitude, alpha, norm = _prepared(code, radius, spec.mode)
    r, theta = radius[..., None, None], angle[..., None, None]
    sequence = fields(code)["cordic_seq"][..., None, None]
    if spec.mode == "radial":
        final, at = GAIN * r * rho, a + theta + turn(sequence).to(radius)
    else:
        x, y = cordic(sequence, r * torch.cos(a + theta), r * torch.sin(a + theta))
        at_origin = (x == 0) & (y == 0)  # the angle of the origin is 0, whatever the signs of its zeros
        x = torch.where(at_origin, 1.0, x)
        final, at = torch.where(at_origin, 0.0, torch.hypot(x, y)), torch.atan2(y, x)
        at = torch.where(at_origin, 0.0, at)
    return (amplitude * norm * basis(quadrant, alpha * final)[0] * _wave(q, at)[0]).sum(1)


def derivatives(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor]:
    """dW/dr and dW/dtheta, each (blocks, stages, h, w), in radius' dtype; away from the jumps of the clamp.

    dW/dr = A alpha f'(alpha R) dR/dr M and dW/dtheta = A f(alpha R) M', because the steps turn all angles alike and R
    does not depend on theta. At r = 0 in faithful mode the angle is not continuous and dW/dtheta is 0.
    """
    rho, a = (table.to(radius) for table in cells(*spec.block_shape))
    quadrant, q, amplitude, alpha, norm = _prepared(code, radius, spec.mode)
    r, theta = radius[..., None, None], angle[..., None, None]
    at = a + theta + turn(fields(code)["cordic_seq"][..., None, None]).to(radius)
    if spec.mode == "radial":
        final, slope = GAIN * r * rho, GAIN * rho
    else:
        final, slope = final_radius(r)
        at = torch.where(r == 0, 0.0, at)
    f, f_slope, _ = basis(quadrant, alpha * final)
    wave, wave_slope = _wave(q, at)
    if spec.mode == "faithful":
        wave_slope = torch.where(r == 0, 0.0, wave_slope)
    return amplitude * norm * alpha * f_slope * slope * wave, amplitude * norm * f * wave_slope


def generate(seeds: Tensor, spec: SeedSpec) -> Tensor:
    """Generate the unscaled weights of every block.

    >>> spec = SeedSpec("packed128", (16, 16), bits=0.5, mode="radial")
    >>> generate(torch.tensor([[1 << 61, 0x3F000000 << 32]]), spec).shape
    torch.Size([1, 16, 16])

    Args:
        seeds: int64 (blocks, words).

    Returns:
        float64 (blocks, h, w).

    Raises:
        RbeError: the specification is not this format's, or the seeds do not fit it.

    Source: docs/format.md, packed128; 003 sections 4.2 and 4.5.1.
    """
    check(spec)
    if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != words(spec):
        raise RbeError(
            f"packed128: seeds are {seeds.dtype} {tuple(seeds.shape)}, "
            f"but {spec.stages} stages take int64 (blocks, {words(spec)})"
        )
    check_seeds(seeds, spec)
    code, radius, angle = split(seeds, spec)
    height, width = spec.block_shape
    at_once = max(1, (1 << 20) // (height * width * spec.stages))  # some temporaries a weight: not all blocks at once
    out = [
        values(code[k : k + at_once], radius[k : k + at_once].double(), angle[k : k + at_once].double(), spec)
        for k in range(0, len(code), at_once)
    ]
    return torch.cat(out) if out else radius.new_empty((0, height, width), dtype=torch.float64)
