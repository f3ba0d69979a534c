"""The disk against numbers with sixty digits, against geoopt, and against its own laws, from the origin to the rim."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from rbe import disk
from rbe.errors import RbeError

mp = mpmath.mp.clone()
mp.dps = 60

# Distance from the origin and from the rim, fifteen orders of magnitude each.
ORDERS = [10.0**-k for k in range(1, 16)]
RADII = [*ORDERS, *(1 - gap for gap in ORDERS)]
EPS = torch.finfo(torch.float64).eps


def points(seed: int, radii: list[float] = RADII) -> Tensor:
    """One point for every radius, in random directions."""
    draw = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(len(radii), generator=draw, dtype=torch.float64)
    return disk.to_cartesian(torch.tensor(radii, dtype=torch.float64), angle)


def exact(x: Tensor) -> Any:
    """A stored point as a complex number without further rounding."""
    return mp.mpc(float(x[0]), float(x[1]))


def exact_add(x: Any, y: Any) -> Any:
    return (x + y) / (1 + mp.conj(x) * y)


def exact_gap(x: Any) -> Any:
    return 1 - mp.re(x) ** 2 - mp.im(x) ** 2


def exact_exp(x: Any, v: Any) -> Any:
    if v == 0:
        return x
    return exact_add(x, mp.tanh(abs(v) / exact_gap(x)) * v / abs(v))


def exact_log(x: Any, y: Any) -> Any:
    moved = exact_add(-x, y)
    return exact_gap(x) * mp.atanh(abs(moved)) * moved / abs(moved) if moved else mp.mpc(0)


def relative(found: Tensor, wanted: list[Any]) -> float:
    """Largest error of points or numbers relative to the size of what is wanted."""
    rows = found.reshape(len(wanted), -1)
    errors = [
        abs((exact(row) if len(row) == 2 else mp.mpf(float(row))) - want) / (abs(want) or 1)
        for row, want in zip(rows, wanted, strict=True)
    ]
    return float(max(errors))


def test_gap_and_factor_keep_every_digit_to_the_rim() -> None:
    for seed in range(8):
        x = points(seed)
        assert relative(disk.conformal_factor(x), [2 / exact_gap(exact(p)) for p in x]) < 4 * EPS
    radius = torch.tensor(RADII, dtype=torch.float64)
    wanted = [1 - mp.mpf(r) ** 2 for r in radius.tolist()]
    assert relative(disk.radial_gap(radius), wanted) < 2 * EPS
    # Written plainly the first is noise, the second has lost digits.
    x = points(3, [1 - 1e-15] * 40)
    assert relative(1 - x.square().sum(-1), [exact_gap(exact(p)) for p in x]) > 0.01
    assert relative(1 - radius.square(), wanted) > 1e4 * EPS


def test_distance_to_sixty_digits() -> None:
    for seed in range(4):
        x, y = points(seed), points(seed + 100)[torch.randperm(len(RADII), generator=torch.Generator().manual_seed(1))]
        wanted = [2 * mp.atanh(abs(exact_add(-exact(a), exact(b)))) for a, b in zip(x, y, strict=True)]
        assert relative(disk.distance(x, y), wanted) < 8 * EPS
    # Neighbours: the distance is far smaller than the distances from the origin.
    x = points(7)
    y = x + 1e-3 * (1 - x.norm(dim=-1, keepdim=True)) * torch.randn_like(x)
    wanted = [2 * mp.atanh(abs(exact_add(-exact(a), exact(b)))) for a, b in zip(x, y, strict=True)]
    assert relative(disk.distance(x, y), wanted) < 8 * EPS


def test_polar_distance_to_sixty_digits() -> None:
    draw = torch.Generator().manual_seed(0)
    r = torch.tensor(RADII, dtype=torch.float64)
    s = r[torch.randperm(len(r), generator=draw)]
    a, b = (6 * torch.rand(len(r), generator=draw, dtype=torch.float64) for _ in range(2))
    wanted = [
        2 * mp.atanh(abs(exact_add(-p * mp.expj(t), q * mp.expj(u))))
        for p, t, q, u in zip(*([mp.mpf(float(v)) for v in z] for z in (r, a, s, b)), strict=True)
    ]
    assert relative(disk.polar_distance(r, a, s, b), wanted) < 16 * EPS


def test_addition_to_sixty_digits() -> None:
    for seed in range(4):
        x, y = points(seed), points(seed + 50)[torch.randperm(len(RADII), generator=torch.Generator().manual_seed(2))]
        # The last opposes the first nearly: a sum of two points on the rim that lands anywhere.
        for other in (y, -x * (1 - 1e-3 * (1 - x.norm(dim=-1, keepdim=True)))):
            wanted = [exact_add(exact(a), exact(b)) for a, b in zip(x, other, strict=True)]
            assert relative(disk.add(x, other), wanted) < 16 * EPS


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 5.0, 30.0])
def test_exponential_map_to_sixty_digits(size: float) -> None:
    """v goes `size` half units of distance, in any direction and straight at the origin."""
    for seed in range(3):
        x = points(seed)
        scale = disk.radial_gap(disk.to_polar(x)[0]).unsqueeze(-1) * size
        directions = torch.nn.functional.normalize(points(seed + 9, [0.5] * len(x)), dim=-1)
        for v in (directions * scale, -torch.nn.functional.normalize(x, dim=-1) * scale):
            wanted = [exact_exp(exact(a), exact(b)) for a, b in zip(x, v, strict=True)]
            found = disk.exp(x, v)
            errors = [abs(exact(f) - w) for f, w in zip(found, wanted, strict=True)]
            sizes = (disk.to_polar(x)[0] + disk.to_polar(v)[0]).tolist()
            # The distance travelled is known to a rounding error, which counts once for every unit of it.
            allowed = [16 * EPS * (1 + size) * min(s, 1.0) for s in sizes]
            assert all(e < limit for e, limit in zip(errors, allowed, strict=True))
            assert bool((disk.to_polar(found)[0] < 1).all())


def test_logarithm_to_sixty_digits() -> None:
    for seed in range(4):
        x, y = points(seed), points(seed + 30)[torch.randperm(len(RADII), generator=torch.Generator().manual_seed(3))]
        near = x * (1 - 1e-4 * (1 - x.norm(dim=-1, keepdim=True)))
        for other in (y, near, x):
            wanted = [exact_log(exact(a), exact(b)) for a, b in zip(x, other, strict=True)]
            assert relative(disk.log(x, other), wanted) < 16 * EPS


def test_maps_at_the_origin() -> None:
    y = points(5)
    assert relative(disk.log0(y), [exact_log(mp.mpc(0), exact(p)) for p in y]) < 8 * EPS
    v = disk.log0(y)
    assert relative(disk.exp0(v), [exact_exp(mp.mpc(0), exact(p)) for p in v]) < 8 * EPS
    torch.testing.assert_close(disk.exp0(v), disk.exp(torch.zeros_like(v), v), rtol=8 * EPS, atol=0)
    assert disk.exp0(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_radial_curve_to_sixty_digits() -> None:
    r = torch.tensor(RADII, dtype=torch.float64)
    exactly = [mp.mpf(v) for v in r.tolist()]
    assert relative(disk.radial(r), [mp.tanh(2 * mp.atanh(v)) for v in exactly]) < 4 * EPS
    assert relative(disk.radial_slope(r), [2 * (1 - v * v) / (1 + v * v) ** 2 for v in exactly]) < 6 * EPS
    assert relative(disk.radial_inverse(r), [mp.tanh(mp.atanh(v) / 2) for v in exactly]) < 4 * EPS
    # c near 1 says little about r, so only the value it stands for is compared there.
    kept = disk.radial(r)[disk.radial(r) < 1]
    torch.testing.assert_close(disk.radial(disk.radial_inverse(kept)), kept, rtol=4 * EPS, atol=0)


def test_slope_is_the_derivative_of_the_curve() -> None:
    r = torch.tensor([0.0, 0.1, 0.7, 0.99, 1 - 1e-9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(disk.radial(r).sum(), r)
    torch.testing.assert_close(slope, disk.radial_slope(r).detach(), rtol=1e-12, atol=1e-15)


@pytest.fixture(scope="module")
def geoopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles with TorchScript, which torch is retiring
        import geoopt as module
        import geoopt.manifolds.stereographic.math
    return module


def inside(count: int = 200, seed: int = 0) -> Tensor:
    """Points away from the rim, where the oracle is not clamped."""
    draw = torch.Generator().manual_seed(seed)
    radius = 0.98 * torch.rand(count, generator=draw, dtype=torch.float64).sqrt()
    return disk.to_cartesian(radius, 2 * math.pi * torch.rand(count, generator=draw, dtype=torch.float64))


def test_equals_geoopt(geoopt: Any) -> None:
    math_of = geoopt.manifolds.stereographic.math
    k = torch.tensor(-1.0, dtype=torch.float64)
    x, y, v = inside(seed=1), inside(seed=2), 0.3 * inside(seed=3)

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)

    close(disk.distance(x, y), math_of.dist(x, y, k=k))
    close(disk.add(x, y), math_of.mobius_add(x, y, k=k))
    close(disk.exp(x, v), math_of.expmap(x, v, k=k))
    close(disk.log(x, y), math_of.logmap(x, y, k=k))
    close(disk.exp0(v), math_of.expmap0(v, k=k))
    close(disk.log0(y), math_of.logmap0(y, k=k))
    close(disk.conformal_factor(x), math_of.lambda_x(x, k=k))
    close(disk.riemannian_gradient(x, v), math_of.egrad2rgrad(x, v, k=k))
    close(disk.length(x, v), math_of.norm(x, v, k=k, keepdim=False))
    close(disk.project(3 * x, margin=0.01), math_of.project(3 * x, k=k, eps=0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws(dtype: torch.dtype) -> None:
    x, y, z = (inside(seed=s).to(dtype) for s in (4, 5, 6))
    close = {"rtol": 3e-4, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(disk.exp(x, disk.log(x, y)), y, **close)
    torch.testing.assert_close(disk.length(x, disk.log(x, y)), disk.distance(x, y), **close)
    torch.testing.assert_close(disk.add(-x, disk.add(x, y)), y, **close)
    # A motion keeps distances; a sum with 0 changes nothing.
    torch.testing.assert_close(disk.distance(disk.add(z, x), disk.add(z, y)), disk.distance(x, y), **close)
    assert torch.equal(disk.add(x, torch.zeros_like(x)), x)
    assert bool((disk.distance(x, z) <= disk.distance(x, y) + disk.distance(y, z) + 1e-4).all())
    (r, a), (s, b) = disk.to_polar(x), disk.to_polar(y)
    torch.testing.assert_close(disk.polar_distance(r, a, s, b), disk.distance(x, y), **close)
    torch.testing.assert_close(disk.to_cartesian(r, a), x, **close)


def test_everything_broadcasts() -> None:
    x, y = inside(3).unsqueeze(1), inside(4, seed=9)
    for function in (disk.add, disk.exp, disk.log, disk.distance):
        whole = function(x, y)
        assert whole.shape[:2] == (3, 4)
        torch.testing.assert_close(whole[1, 2], function(x[1, 0], y[2]))


def test_polar_gradient_is_the_cartesian_one_in_other_coordinates() -> None:
    x = points(11, [0.01, 0.3, 0.9, 0.999999]).requires_grad_()
    (euclidean,) = torch.autograd.grad((x[:, 0] * 3 - x[:, 1].exp()).sum(), x)
    r, a = (v.detach().requires_grad_() for v in disk.to_polar(x))
    z = disk.to_cartesian(r, a)
    d_r, d_a = torch.autograd.grad((z[:, 0] * 3 - z[:, 1].exp()).sum(), (r, a))
    step_r, step_a = disk.polar_gradient(r.detach(), d_r, d_a)
    wanted = disk.riemannian_gradient(x.detach(), euclidean)
    out, round_ = disk.to_cartesian(torch.ones_like(a), a).detach(), disk.to_cartesian(r, a + math.pi / 2).detach()
    torch.testing.assert_close(step_r.unsqueeze(-1) * out + step_a.unsqueeze(-1) * round_, wanted)


def test_polar_gradient_at_and_near_the_origin() -> None:
    r, one = torch.tensor([0.0, 1e-9, 1e-3]), torch.ones(3)
    _, around = disk.polar_gradient(r, one, one, least_radius=1e-6)
    assert around.tolist() == pytest.approx([0.25e12, 0.25e12, 0.25e6], rel=1e-5)
    assert disk.polar_gradient(r, one, one)[1][0] == 0


def test_project_keeps_points_inside_and_inner_points_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        draw = torch.Generator().manual_seed(0)
        far = torch.randn(2000, 2, generator=draw, dtype=dtype)
        kept = disk.project(far / far.norm(dim=-1, keepdim=True))
        disk.check_point(kept)
        x = inside().to(dtype)
        assert torch.equal(disk.project(x), x)
        assert torch.equal(disk.project(torch.zeros(2, dtype=dtype)), torch.zeros(2, dtype=dtype))
        disk.check_point(disk.exp(x, 1e4 * far[: len(x)]))
        rim = disk.project(far / far.norm(dim=-1, keepdim=True))
        disk.check_point(disk.add(rim, rim))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, v: disk.exp(disk.exp0(x), v),
        lambda x, v: disk.log(disk.exp0(x), disk.exp0(v)),
        lambda x, v: disk.add(disk.exp0(x), disk.exp0(v)),
        lambda x, v: disk.distance(disk.exp0(x), disk.exp0(v)),
        lambda x, v: disk.length(disk.exp0(x), v),
        lambda x, v: disk.polar_distance(x[..., 0].tanh().abs(), v[..., 0], v[..., 1].tanh().abs(), x[..., 1]),
    ],
)
def test_derivatives(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    draw = torch.Generator().manual_seed(3)
    x, v = (torch.randn(5, 2, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, (x, v))
    assert torch.autograd.gradgradcheck(function, (x, v))


def test_derivatives_stay_finite_at_zero_and_at_the_rim() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(disk.exp0)(zero), eye)
    torch.testing.assert_close(torch.func.jacrev(disk.log0)(zero), eye)
    x = torch.tensor([0.3, 0.4], dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(disk.exp, argnums=1)(x, zero), eye)
    torch.testing.assert_close(torch.func.jacrev(disk.exp, argnums=0)(x, zero), eye)
    torch.testing.assert_close(torch.func.jacrev(disk.log, argnums=1)(x, x), eye, atol=1e-12, rtol=0)
    rim = points(4, [1 - gap for gap in ORDERS]).requires_grad_()
    for value in (disk.distance(rim, x), disk.log(rim, x), disk.exp(rim, 1e-3 * rim), disk.conformal_factor(rim)):
        (slope,) = torch.autograd.grad(value.sum(), rim)
        assert bool(slope.isfinite().all())


def test_works_under_vmap_and_compile() -> None:
    x, y = inside(6), inside(6, seed=8)
    torch.testing.assert_close(torch.func.vmap(disk.distance)(x, y), disk.distance(x, y))
    torch.testing.assert_close(torch.func.vmap(disk.exp)(x, y), disk.exp(x, y))
    compiled = torch.compile(disk.exp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), disk.exp(x, y))


@pytest.mark.parametrize("bad", [1.0, 1.5, -0.25, math.nan, math.inf])
def test_a_bad_radius_is_named(bad: float) -> None:
    radius = torch.tensor([[0.5, 0.5], [bad, 0.5]])
    with pytest.raises(RbeError, match=rf"this radius is {bad:g} at \[1, 0\]; the disk is 0 <= r < 1"):
        disk.check_radius(radius, "this radius")
    with pytest.raises(RbeError, match="radius"):
        disk.polar_gradient(radius, radius, radius)
    with pytest.raises(RbeError, match="other radius"):
        disk.polar_distance(torch.tensor(0.5), torch.tensor(0.0), radius, torch.tensor(0.0))
    with pytest.raises(RbeError, match="value of g"):
        disk.radial_inverse(radius)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (0.8, 0.7), (math.nan, 0.0), (math.inf, 0.0), (0.6, 0.8)])
def test_a_bad_point_is_named(bad: tuple[float, float]) -> None:
    x, fine = torch.tensor([[0.1, 0.2], bad]), torch.tensor([0.1, 0.2])
    with pytest.raises(RbeError, match=r"of radius .* the disk is 0 <= r < 1"):
        disk.check_point(x)
    for function in (disk.distance, disk.add, disk.log):
        with pytest.raises(RbeError, match="first point"):
            function(x, fine)
        with pytest.raises(RbeError, match="second point"):
            function(fine, x)
    for function in (disk.exp, disk.length, disk.riemannian_gradient):
        with pytest.raises(RbeError, match="point is"):
            function(x, fine)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(RbeError, match="last side of 2"):
        disk.distance(torch.zeros(3), torch.zeros(3))
    with pytest.raises(RbeError, match="float16"):
        disk.exp0(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(RbeError, match=r"theta is inf at \[1\]; an angle is a finite number"):
        disk.check_angle(torch.tensor([0.0, math.inf]), "theta")
    with pytest.raises(RbeError, match="margin is 0"):
        disk.project(torch.zeros(2), margin=0)
