"""Rounding bounds hold, and are not far above what happens."""

import math
from fractions import Fraction

import pytest
import torch

from rbe import disk, metrics
from rbe.errors import RbeError


def cut(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value * 2.0**bits).floor() / 2.0**bits


def test_storage_bound_holds_and_is_reached() -> None:
    """g(r) sin(theta) stored with 12 bits each, so that float64 sees nothing else."""
    draw = torch.Generator().manual_seed(0)
    r, turn = (torch.rand(200_000, generator=draw, dtype=torch.float64) for _ in range(2))
    exact = disk.radial(r) * (2 * math.pi * turn).sin()
    stored = disk.radial(cut(r, 12)) * (2 * math.pi * cut(turn, 12)).sin()
    worst = (exact - stored).abs().max().item()
    bound = metrics.storage_bound(radius_slope=2.0, angle_slope=1.0, fraction_bits=12)
    assert 0.5 * bound < worst <= bound


def test_seed_bound_holds_to_first_order() -> None:
    draw = torch.Generator().manual_seed(1)
    jacobian = torch.randn(256, 2, generator=draw, dtype=torch.float64)
    steps = torch.randn(2000, 2, generator=draw, dtype=torch.float64)
    moved = (steps @ jacobian.T).norm(dim=1)
    most = metrics.jacobian(jacobian).largest
    bounds = torch.tensor([metrics.seed_bound(most, a, b) for a, b in steps.tolist()], dtype=torch.float64)
    assert bool((moved <= bounds * (1 + 1e-12)).all()) and bool((moved > 0.99 * bounds).any())


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
def test_accumulated_bounds_n_roundings(n: int) -> None:
    """Exactly, in fractions: (1 + u)^n - 1 <= n u (1 + u)^n, and not by much."""
    u = Fraction(1, 2**24)
    worst = float((1 + u) ** n - 1) if n <= 1000 else math.expm1(n * math.log1p(2.0**-24))
    bound = metrics.accumulated(n, growth=metrics.FLOAT32)
    assert worst <= bound < 1.01 * worst


def test_a_product_of_many_float32_numbers_stays_within() -> None:
    draw = torch.Generator().manual_seed(2)
    factors = 0.9 + 0.2 * torch.rand(400, 500, generator=draw)
    found = torch.ones(400)
    for k in range(500):
        found = found * factors[:, k]
    exact = factors.double().prod(1)
    worst = ((found.double() - exact) / exact).abs().max().item()
    assert 0.001 * metrics.accumulated(500) < worst <= metrics.accumulated(500, growth=metrics.FLOAT32)


def test_packed64_weight_within_both_terms() -> None:
    """The generator in float32 from 32-bit fields: 2 r / (1 + r^2), sin, product; storage is the smaller part."""
    draw = torch.Generator().manual_seed(3)
    r, turn = (torch.rand(100_000, generator=draw, dtype=torch.float64) for _ in range(2))
    exact = disk.radial(r) * (2 * math.pi * turn).sin()
    stored = cut(r, 32).float(), (2 * math.pi * cut(turn, 32)).float()
    found = disk.radial(stored[0]) * stored[1].sin()
    worst = (found.double() - exact).abs().max().item()
    # r to float32, r^2, 1 +, 2 r /, sin, product: six roundings; and theta, up to 2 pi, to float32.
    bound = metrics.weight_bound(2.0, 1.0, 32, operations=6, size=1.0) + 2 * math.pi * metrics.FLOAT32
    assert metrics.storage_bound(2.0, 1.0, 32) < worst <= bound
    # More bits in the fields do not help a float32 weight.
    assert metrics.weight_bound(2.0, 1.0, 64, 6, 1.0) > 0.9 * 6 * metrics.FLOAT32


def test_dot_bound() -> None:
    draw = torch.Generator().manual_seed(4)
    x, w = torch.randn(300, 1000, generator=draw), torch.randn(300, 1000, generator=draw)
    exact = (x.double() * w.double()).sum(-1)
    running = torch.zeros(300)
    for k in range(1000):
        running = running + x[:, k] * w[:, k]
    bound = metrics.dot_bound(x, w)
    assert bool(((running.double() - exact).abs() <= bound).all())
    assert bool(((x * w).sum(-1).double() - exact).abs().le(bound).all())
    assert bound[0].item() == pytest.approx(1000 * 2.0**-24 * (x[0] * w[0]).abs().sum().item(), rel=1e-3)


def test_bad_input_is_named() -> None:
    with pytest.raises(RbeError, match="storage_bound"):
        metrics.storage_bound(-1.0, 1.0, 32)
    with pytest.raises(RbeError, match="storage_bound"):
        metrics.storage_bound(math.inf, 1.0, 32)
    with pytest.raises(RbeError, match="storage_bound"):
        metrics.storage_bound(1.0, 1.0, 0)
    with pytest.raises(RbeError, match="accumulated: -1 operations"):
        metrics.accumulated(-1)
    with pytest.raises(RbeError, match="unit 1"):
        metrics.accumulated(1, unit=1.0)
    with pytest.raises(RbeError, match="dot_bound"):
        metrics.dot_bound(torch.ones(10), torch.ones(10), unit=0.1)
