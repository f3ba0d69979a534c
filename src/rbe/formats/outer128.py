"""`outer128`: two binary outer products and a point of the disk in 16 bytes, made for training (docs/format.md).

This file is the definition: plain torch, any device; every kernel must equal it. A block is

    W = a u1 v1^T + b u2 v2^T,   (a, b) = 2 artanh(r) (cos theta, sin theta)

with u, v vectors of signs: bit i of a field, from the least significant, is row or column i; 1 is +1, 0 is -1. The
point (r, theta) is the coefficient pair, seen from the tangent plane at the origin. Blocks of 8 use the low 8 bits of
each field. Blocks of 32 have one term, a u v^T, with 32 bits for each side; blocks of 64 reuse them, index i reading
bit i mod 32 with the fixed sign (-1)^(fmix32(i) & 1).
"""

import torch
from torch import Tensor

from rbe.disk import check_angle, check_radius, radial_gap
from rbe.errors import RbeError
from rbe.formats.fields import Field, Layout, check_parts, join_floats, split_floats
from rbe.formats.spec import SeedSpec
from rbe.mixing import signs

VERSION = 1
SIGNS = True
BLOCKS = (8, 16, 32, 64)

_POINT = (Field("radius", 32, "r in [0, 1), IEEE float32"), Field("angle", 32, "theta in radians, IEEE float32"))
LAYOUT = Layout(
    (
        (
            Field("u1", 16, "signs of the rows, first term"),
            Field("v1", 16, "signs of the columns, first term"),
            Field("u2", 16, "signs of the rows, second term"),
            Field("v2", 16, "signs of the columns, second term"),
        ),
        _POINT,
    )
)
LAYOUT_WIDE = Layout(((Field("u", 32, "signs of the rows"), Field("v", 32, "signs of the columns")), _POINT))


def check(spec: SeedSpec) -> None:
    """Refuse a specification that this format cannot generate."""
    if spec.block not in BLOCKS:
        raise RbeError(f"outer128: block {spec.block} is not offered; choose one of {', '.join(map(str, BLOCKS))}")
    if spec.mode is not None:
        raise RbeError(f"outer128: mode {spec.mode!r} is not offered; this format has one mode, None")
    if spec.precision != 32:
        raise RbeError(f"outer128: precision {spec.precision} is not offered; r and theta are float32")
    spec.check_rate(words(spec))


def words(spec: SeedSpec) -> int:
    """64-bit words a block."""
    return 2 * spec.stages


def code_words(spec: SeedSpec) -> int:
    """Words of discrete bits a block."""
    return spec.stages


def terms(spec: SeedSpec) -> int:
    """Outer products a seed: two, or one in blocks of 32 and 64."""
    return 2 if spec.block_shape[0] <= 16 else 1


def check_seeds(seeds: Tensor, spec: SeedSpec) -> None:
    """Refuse seeds whose radius is outside [0, 1) or whose angle is not finite."""
    _code, radius, angle = split(seeds, spec)
    check_radius(radius, "outer128: radius")
    check_angle(angle, "outer128: angle")


def split(seeds: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of seeds int64 (blocks, words): code int64, radius and angle float32, each (blocks, stages)."""
    pairs = seeds.reshape(seeds.shape[0], spec.stages, 2)
    return pairs[..., 0].contiguous(), *split_floats(pairs[..., 1])


def join(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The inverse of `split`: radius and angle are rounded to float32.

    Raises:
        RbeError: a radius is outside [0, 1) or not a number, an angle is not finite, or the shapes differ.
    """
    check_parts("outer128", {"radius": radius, "angle": angle}, (code.shape[0], spec.stages), code)
    r, theta = radius.detach().to(torch.float32), angle.detach().to(torch.float32)
    check_radius(r, "outer128: radius")
    check_angle(theta, "outer128: angle")
    return torch.stack([code, join_floats(r, theta)], -1).reshape(code.shape[0], words(spec))


def sign_bits(code: Tensor, spec: SeedSpec) -> Tensor:
    """The 64 trained signs of code words int64 (...): float32 (..., 64), entries +1 and -1.

    In the order u1, v1, u2, v2 (16 each), or u, v (32 each), least significant bit of a field first. Blocks of 8 do not
    use the upper half of each field.
    """
    width = 64 // (2 * terms(spec))
    shifts = torch.cat([torch.arange(64 - width * (k + 1), 64 - width * k) for k in range(64 // width)])
    return 2.0 * ((code[..., None] >> shifts.to(code.device)) & 1).to(torch.float32) - 1.0


def code_of(sign_values: Tensor, spec: SeedSpec) -> Tensor:
    """The inverse of `sign_bits`: values (..., 64), of which those >= 0 count as +1, to code words int64 (...)."""
    width = 64 // (2 * terms(spec))
    shifts = torch.cat([torch.arange(64 - width * (k + 1), 64 - width * k) for k in range(64 // width)])
    return ((sign_values >= 0).to(torch.int64) << shifts.to(sign_values.device)).sum(-1)  # disjoint: the sum is an or


def vectors(sign_values: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor]:
    """The row and column vectors of the outer products: (..., terms, edge) each, from sign values (..., 64)."""
    edge, count = spec.block_shape[0], terms(spec)
    width = 32 // count
    parts = sign_values.reshape(*sign_values.shape[:-1], count, 2, width)
    u, v = parts[..., 0, :], parts[..., 1, :]
    if edge <= width:
        return u[..., :edge], v[..., :edge]
    fixed = signs(edge, 0).to(sign_values)
    return torch.cat([u, u], -1) * fixed, torch.cat([v, v], -1) * fixed


def coefficients(radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The factors (a, b) of the outer products, (..., terms), in radius' dtype."""
    length = 2.0 * torch.atanh(radius)
    pair = torch.stack([length * torch.cos(angle), length * torch.sin(angle)], -1)
    return pair[..., : terms(spec)]


def values(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> Tensor:
    """The unscaled weights (blocks, edge, edge), in radius' dtype, summed over the stages.

    Args:
        code: int64 (blocks, stages).
        radius, angle: float32 or float64 (blocks, stages).
    """
    u, v = vectors(sign_bits(code, spec).to(radius), spec)
    return torch.einsum("bst,bsti,bstj->bij", coefficients(radius, angle, spec), u, v)


def derivatives(code: Tensor, radius: Tensor, angle: Tensor, spec: SeedSpec) -> tuple[Tensor, Tensor]:
    """dW/dr and dW/dtheta, each (blocks, stages, edge, edge); 2 artanh(r) has the slope 2 / (1 - r^2)."""
    u, v = vectors(sign_bits(code, spec).to(radius), spec)
    cos, sin = torch.cos(angle), torch.sin(angle)
    slope, length = 2.0 / radial_gap(radius), 2.0 * torch.atanh(radius)
    d_radius = torch.stack([slope * cos, slope * sin], -1)[..., : terms(spec)]
    d_angle = torch.stack([-length * sin, length * cos], -1)[..., : terms(spec)]
    return tuple(torch.einsum("bst,bsti,bstj->bsij", d, u, v) for d in (d_radius, d_angle))  # type: ignore[return-value]


def generate(seeds: Tensor, spec: SeedSpec) -> Tensor:
    """Generate the unscaled weights of every block.

    >>> from rbe.formats import make_spec
    >>> spec = make_spec("outer128", (16, 16))
    >>> seeds = join(torch.tensor([[-1]]), torch.tensor([[0.46211717]]), torch.tensor([[0.0]]), spec)
    >>> generate(seeds, spec)[0, :2, 0].round(decimals=6).tolist()
    [1.0, 1.0]

    Args:
        seeds: int64 (blocks, words).

    Returns:
        float64 (blocks, edge, edge).

    Raises:
        RbeError: the specification is not this format's, or the seeds do not fit it.

    Source: docs/format.md, outer128.
    """
    check(spec)
    if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != words(spec):
        raise RbeError(
            f"outer128: seeds are {seeds.dtype} {tuple(seeds.shape)}, "
            f"but {spec.stages} stages take int64 (blocks, {words(spec)})"
        )
    check_seeds(seeds, spec)
    code, radius, angle = split(seeds, spec)
    return values(code, radius.double(), angle.double(), spec)
