"""Mathematics of the Poincare disk: distance, exponential map, gradients, and the radial curve of `packed64`.

The disk is the open unit disk with curvature -1: lengths at x are Euclidean lengths times 2 / (1 - |x|^2). Points and
vectors are Cartesian, (..., 2), or polar, a radius in [0, 1) and an angle in radians. Everything is float32 or float64,
broadcasts, and differentiates.

The numbers that vanish at the rim, 1 - r^2 and its relatives, are computed as products of what is exactly known, or
with the rounding errors of the products added back. Written plainly, 1 - r^2 loses half of its digits on the way to
the rim, and 1 - x^2 - y^2 all of them.

Sources:
    A. A. Ungar, A Gyrovector Space Approach to Hyperbolic Geometry, 2009 (addition, exponential map).
    O. Ganea, G. Becigneul, T. Hofmann, Hyperbolic Neural Networks, 2018 (the conventions used here).
    T. J. Dekker, A floating-point technique for extending the available precision, 1971 (products with their error).
"""

import torch
from torch import Tensor

from rbe.errors import RbeError


def check_radius(radius: Tensor, field: str = "radius") -> None:
    """Refuse a radius that is no point of the disk.

    >>> check_radius(torch.tensor([0.0, 0.999]))
    >>> check_radius(torch.tensor([0.5, 1.0]), "seed radius")
    Traceback (most recent call last):
    rbe.errors.RbeError: seed radius is 1 at [1]; the disk is 0 <= r < 1: use rbe.disk.project, and train with \
rbe.optim.HybridAdam or rbe.optim.guard, which keep it there

    Inside `torch.compile` and `torch.func` nothing is known about the values, so nothing is refused there.

    Raises:
        RbeError: a value is below 0, is 1 or more, or is NaN.
    """
    if _opaque(radius):
        return
    outside = ~((radius >= 0) & (radius < 1))
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        value = float(radius.detach()[tuple(where)])
        place = f" at {where}" if where else ""
        raise RbeError(
            f"{field} is {value:.9g}{place}; the disk is 0 <= r < 1: use rbe.disk.project, and train with "
            "rbe.optim.HybridAdam or rbe.optim.guard, which keep it there"
        )


# From here on neighbouring float32 numbers are 2 radians apart: the place in the turn is lost.
_NO_ANGLE = 2.0**24


def check_angle(angle: Tensor, field: str = "angle") -> None:
    """Refuse an angle that is no number, or so large that float32 does not say where in the turn it is.

    >>> check_angle(torch.tensor(7.0))

    Raises:
        RbeError: a value is NaN, or 2^24 or more in size.
    """
    if _opaque(angle):
        return
    wrong = ~(angle.abs() < _NO_ANGLE)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        place = f" at {where}" if where else ""
        value = float(angle.detach()[tuple(where)])
        raise RbeError(
            f"{field} is {value}{place}; an angle is a finite number of radians, within 2^24 of 0: "
            "the file is damaged, or training needs rbe.optim.guard"
        )


def check_point(x: Tensor, field: str = "point") -> None:
    """Refuse Cartesian coordinates (..., 2) that are no point of the disk.

    >>> check_point(torch.tensor([0.6, 0.7]))
    >>> check_point(torch.tensor([0.6, 0.9]))
    Traceback (most recent call last):
    rbe.errors.RbeError: point is (0.6, 0.9), of radius 1.08167; the disk is 0 <= r < 1: use rbe.disk.project

    Raises:
        RbeError: the last side is not 2, or a point is outside the open disk or NaN.
    """
    _check_pairs(x, field)
    if _opaque(x):
        return
    outside = ~(_gap(x) > 0)
    if bool(outside.any()):
        point = x[tuple(outside.nonzero()[0].tolist())]
        pair = ", ".join(f"{float(v):.6g}" for v in point)
        raise RbeError(
            f"{field} is ({pair}), of radius {float(_norm(point)):.6g}; the disk is 0 <= r < 1: use rbe.disk.project"
        )


def to_polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of Cartesian points: (..., 2) -> (...), (...); the angle of the origin is 0.

    >>> radius, angle = to_polar(torch.tensor([0.0, 0.5]))
    >>> round(radius.item(), 6), round(angle.item(), 6)
    (0.5, 1.570796)
    """
    _check_pairs(x, "point")
    return _norm(x), torch.atan2(x[..., 1], x[..., 0])


def to_cartesian(radius: Tensor, angle: Tensor) -> Tensor:
    """Cartesian points of radius and angle: (...), (...) -> (..., 2).

    >>> to_cartesian(torch.tensor(0.5), torch.tensor(0.0)).tolist()
    [0.5, 0.0]
    """
    return _pair(radius * angle.cos(), radius * angle.sin())


def radial_gap(radius: Tensor) -> Tensor:
    """1 - r^2 as (1 - r)(1 + r), which keeps every digit at the rim.

    >>> r = torch.tensor(0.9998)
    >>> exact = 1 - r.double() ** 2
    >>> [f"{abs(gap / exact - 1).item():.0e}" for gap in (radial_gap(r), 1 - r * r)]
    ['2e-09', '5e-05']
    """
    return (1 - radius) * (1 + radius)


def conformal_factor(x: Tensor) -> Tensor:
    """2 / (1 - |x|^2), by which the metric stretches Euclidean lengths at x: (..., 2) -> (...).

    >>> conformal_factor(torch.tensor([0.0, 0.0])).item()
    2.0

    Raises:
        RbeError: x is not in the disk.
    """
    check_point(x)
    return 2 / _gap(x)


def length(x: Tensor, v: Tensor) -> Tensor:
    """Length of the vectors v at the points x in the metric of the disk: (..., 2), (..., 2) -> (...).

    >>> length(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])).item()
    10.0

    Raises:
        RbeError: x is not in the disk.
    """
    _check_pairs(v, "vector")
    return conformal_factor(x) * _norm(v)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of points in the disk: (..., 2), (..., 2) -> (...).

    >>> zero, half = torch.zeros(2), torch.tensor([0.5, 0.0])
    >>> round(distance(zero, half).item(), 6)  # 2 artanh(1/2) = log 3
    1.098612

    2 arsinh(|x - y| / sqrt((1 - |x|^2)(1 - |y|^2))); the form with artanh or arcosh has no digits left at the rim.

    Raises:
        RbeError: a point is not in the disk.
    """
    check_point(x, "first point")
    check_point(y, "second point")
    return 2 * torch.asinh(_norm(x - y) / (_gap(x).sqrt() * _gap(y).sqrt()))


def polar_distance(radius: Tensor, angle: Tensor, other_radius: Tensor, other_angle: Tensor) -> Tensor:
    """Distance of points given by radius and angle, all (...).

    >>> r, zero = torch.tensor(0.5), torch.tensor(0.0)
    >>> round(polar_distance(r, zero, r, zero + torch.pi).item(), 6)  # twice the distance from the origin
    2.197225

    Raises:
        RbeError: a radius is not in [0, 1).
    """
    check_radius(radius)
    check_radius(other_radius, "other radius")
    across = 2 * (radius * other_radius).sqrt() * ((angle - other_angle) / 2).sin()
    chord = _norm(_pair(radius - other_radius, across))
    return 2 * torch.asinh(chord / (radial_gap(radius).sqrt() * radial_gap(other_radius).sqrt()))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Moebius addition x (+) y: the point y moved by the motion of the disk that takes 0 to x: (..., 2) each.

    >>> add(torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.0])).tolist()  # tanh(2 artanh(1/2))
    [0.800000011920929, 0.0]

    As complex numbers (x + y) / (1 + conj(x) y). It is not commutative. The sum is kept inside the disk by `project`.

    Raises:
        RbeError: a point is not in the disk.
    """
    check_point(x, "first point")
    check_point(y, "second point")
    return project(_quotient(x + y, _one_plus(x, y)))


def exp(x: Tensor, v: Tensor) -> Tensor:
    """Exponential map: where the geodesic from x with velocity v is after unit time: (..., 2), (..., 2) -> (..., 2).

    >>> [round(z, 6) for z in exp(torch.tensor([0.0, 0.0]), torch.tensor([0.549306, 0.0])).tolist()]
    [0.5, 0.0]

    v has the Euclidean components of a tangent vector, of length 2 |v| / (1 - |x|^2), which is the distance covered.
    What rounds to the rim is kept inside by `project`.

    Raises:
        RbeError: x is not in the disk.
    """
    check_point(x)
    _check_pairs(v, "vector")
    gap = _gap(x)
    still = (v == 0).all(-1)
    safe = torch.where(still.unsqueeze(-1), torch.ones_like(v), v)
    norm = _norm(safe)
    unit = safe / norm.unsqueeze(-1)
    # x = u (c + i s) as complex numbers, u the direction; q = exp(-2 |v| / (1 - |x|^2)) turns tanh into a quotient.
    c = _dot(safe, x, 0.0) / norm
    s = _cross(safe, x) / norm
    # Towards the origin from the rim 1 + c vanishes; (1 - c)(1 + c) is a sum, so nothing is lost.
    ahead = torch.where(c < 0, (gap + s.square()) / (1 - c), 1 + c)
    behind = 1 - c
    step = -2 * norm / gap
    q, p = step.exp(), -torch.expm1(step)
    along = torch.where(q > 0.5, 2 * c + p * behind, ahead - q * behind)
    top, bottom = _pair(along, s * (1 + q)), _pair(ahead + q * behind, -s * p)
    moved = _product(unit, _quotient(top, bottom))
    # At v = 0 the map is x + v to first order, which is also what its derivative needs.
    return project(torch.where(still.unsqueeze(-1), x + v, moved))


def log(x: Tensor, y: Tensor) -> Tensor:
    """Logarithm, the inverse of `exp`: the velocity at x of the geodesic that is at y after unit time: (..., 2) each.

    >>> x, y = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.7])
    >>> torch.allclose(exp(x, log(x, y)), y)
    True

    Raises:
        RbeError: a point is not in the disk.
    """
    check_point(x, "first point")
    check_point(y, "second point")
    here, there = _gap(x).sqrt(), _gap(y).sqrt()
    apart = y - x
    turn = _one_plus(-x, y) * torch.tensor([1.0, -1.0], dtype=y.dtype, device=y.device)
    turn = turn / _norm(turn).unsqueeze(-1)
    # arsinh(z) / z, so that nothing is divided by |y - x|.
    z = _norm(apart) / (here * there)
    near = z == 0
    safe = torch.where(near, torch.ones_like(z), z)
    ratio = torch.where(near, torch.ones_like(z), torch.asinh(safe) / safe)
    return (here / there * ratio).unsqueeze(-1) * _product(apart, turn)


def exp0(v: Tensor) -> Tensor:
    """Exponential map at the origin, tanh(|v|) v / |v|: (..., 2) -> (..., 2).

    >>> [round(z, 6) for z in exp0(torch.tensor([0.549306, 0.0])).tolist()]
    [0.5, 0.0]
    """
    _check_pairs(v, "vector")
    norm = _norm(v)
    zero = norm == 0
    safe = torch.where(zero, torch.ones_like(norm), norm)
    return project(torch.where(zero, torch.ones_like(norm), safe.tanh() / safe).unsqueeze(-1) * v)


def log0(y: Tensor) -> Tensor:
    """Logarithm at the origin, artanh(|y|) y / |y|: (..., 2) -> (..., 2).

    >>> round(log0(torch.tensor([0.5, 0.0]))[0].item(), 6)
    0.549306

    Raises:
        RbeError: y is not in the disk.
    """
    return log(torch.zeros_like(y), y)


def project(x: Tensor, margin: float | None = None) -> Tensor:
    """The points of radius at most 1 - margin that are nearest: (..., 2) -> (..., 2).

    >>> torch.allclose(project(torch.tensor([3.0, 4.0]), margin=0.5), torch.tensor([0.3, 0.4]))
    True

    Args:
        x: any points of the plane.
        margin: distance kept from the rim; the default, four units in the last place, keeps a point inside through the
            rounding of its coordinates.

    Raises:
        RbeError: the margin is not in (0, 1].
    """
    _check_pairs(x, "point")
    if margin is None:
        margin = 4 * torch.finfo(x.dtype).eps
    if not 0 < margin <= 1:
        raise RbeError(f"project: margin is {margin}; the distance kept from the rim is in (0, 1]")
    norm = _norm(x)
    outside = norm > 1 - margin
    shrink = torch.where(outside, (1 - margin) / torch.where(outside, norm, torch.ones_like(norm)), 1.0)
    return torch.where(outside.unsqueeze(-1), x * shrink.unsqueeze(-1), x)


def riemannian_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Riemannian gradient at x of a function with this Euclidean gradient: (..., 2), (..., 2) -> (..., 2).

    >>> riemannian_gradient(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 8.0])).tolist()
    [1.0, 2.0]

    The inverse metric is ((1 - |x|^2) / 2)^2 in both directions.

    Raises:
        RbeError: x is not in the disk.
    """
    check_point(x)
    return gradient * (_gap(x) / 2).square().unsqueeze(-1)


def polar_gradient(
    radius: Tensor, d_radius: Tensor, d_angle: Tensor, least_radius: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Riemannian gradient in polar coordinates: derivatives in radius and angle times the inverse metric, all (...).

    >>> r, one = torch.tensor(0.5), torch.tensor(1.0)
    >>> [round(v.item(), 6) for v in polar_gradient(r, one, one)]  # 9/64 and 9/16
    [0.140625, 0.5625]

    The inverse metric is (1 - r^2)^2 / 4 in r and (1 - r^2)^2 / (4 r^2) in theta.

    Args:
        radius: in [0, 1).
        d_radius, d_angle: derivatives of a function in radius and angle.
        least_radius: smaller radii are taken as this one in the second factor, which grows without bound towards the
            origin, where the angle means nothing. At r = 0 that derivative stays 0 whatever is given.

    Raises:
        RbeError: a radius is not in [0, 1).
    """
    check_radius(radius)
    half = radial_gap(radius) / 2
    floor = radius.clamp_min(least_radius)
    still = floor == 0
    around = torch.where(still, torch.zeros_like(half), half / torch.where(still, torch.ones_like(floor), floor))
    return d_radius * half.square(), d_angle * around.square()


def radial(radius: Tensor) -> Tensor:
    """g(r) = tanh(2 artanh r) = 2 r / (1 + r^2), the point of twice the distance from the origin.

    >>> radial(torch.tensor([0.0, 0.5])).tolist()
    [0.0, 0.800000011920929]
    """
    return 2 * radius / (1 + radius.square())


def radial_slope(radius: Tensor) -> Tensor:
    """g'(r) = 2 (1 - r^2) / (1 + r^2)^2: from 2 at the origin down to 0 at the rim, where it goes as 1 - r.

    >>> radial_slope(torch.tensor([0.0, 0.5])).tolist()
    [2.0, 0.9599999785423279]
    """
    return 2 * radial_gap(radius) / (1 + radius.square()).square()


def radial_inverse(value: Tensor) -> Tensor:
    """The radius r in [0, 1) with g(r) = value, value in [0, 1): value / (1 + sqrt(1 - value^2)).

    >>> round(radial_inverse(torch.tensor(0.8)).item(), 6)
    0.5

    Raises:
        RbeError: a value is not in [0, 1).
    """
    check_radius(value, "value of g")
    return value / (1 + radial_gap(value).sqrt())


def _opaque(x: Tensor) -> bool:
    """Whether the values of a tensor cannot be looked at: it stands for many, or for none yet."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_meta


def _check_pairs(x: Tensor, field: str) -> None:
    if x.ndim < 1 or x.shape[-1] != 2 or x.dtype not in (torch.float32, torch.float64):
        raise RbeError(
            f"{field} is a {x.dtype} tensor of shape {tuple(x.shape)}; give float32 or float64 with a last side of 2"
        )


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """Two coordinates (...) as (..., 2)."""
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return torch.stack((a.expand(shape), b.expand(shape)), -1)


def _norm(v: Tensor) -> Tensor:
    """Euclidean length, safe from underflow, with derivative 0 at 0."""
    zero = (v == 0).all(-1)
    safe = torch.where(zero.unsqueeze(-1), torch.ones_like(v), v)
    return torch.where(zero, torch.zeros_like(safe[..., 0]), torch.hypot(safe[..., 0], safe[..., 1]))


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves with half the digits each, whose products are exact."""
    big = a * (2.0**27 + 1 if a.dtype == torch.float64 else 2.0**12 + 1)
    high = big - (big - a)
    return high, a - high


def _times(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A product and what rounding took from it."""
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _plus(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A sum and what rounding took from it."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _dot(a: Tensor, b: Tensor, start: float) -> Tensor:
    """start + <a, b>, as if computed with twice the digits and rounded once."""
    first, low = _times(a[..., 0], b[..., 0])
    second, lower = _times(a[..., 1], b[..., 1])
    total, rest = _plus(first, second)
    whole, more = _plus(torch.full_like(total, start), total)
    return whole + (more + (rest + (low + lower)))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """a_0 b_1 - a_1 b_0, as precise."""
    return _dot(a, _pair(b[..., 1], -b[..., 0]), 0.0)


def _gap(x: Tensor) -> Tensor:
    """1 - |x|^2."""
    return _dot(x, -x, 1.0)


def _one_plus(x: Tensor, y: Tensor) -> Tensor:
    """1 + conj(x) y of complex numbers."""
    return _pair(_dot(x, y, 1.0), _cross(x, y))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of complex numbers."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return _pair(ar * br - ai * bi, ar * bi + ai * br)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b of complex numbers; b is scaled first, so that its square neither overflows nor vanishes."""
    size = b.detach().abs().amax(-1, keepdim=True)
    a, b = a / size, b / size
    conjugate = _pair(b[..., 0], -b[..., 1])
    return _product(a, conjugate) / b.square().sum(-1, keepdim=True)
