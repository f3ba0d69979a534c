"""Singular values: exact where the matrix is small, and as near as stated where they are estimated."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rbe import metrics
from rbe.errors import RbeError


def rotated(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    draw = torch.Generator().manual_seed(seed)
    n = len(values)
    left = torch.linalg.qr(torch.randn(rows, n, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    return (left * values) @ right


N = 320
FALLING = torch.arange(1, N + 1, dtype=torch.float64)
MATRICES: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: torch.randn(N, N, generator=torch.Generator().manual_seed(77), dtype=torch.float64),
    "wide": lambda: torch.randn(N, 3 * N, generator=torch.Generator().manual_seed(78), dtype=torch.float64),
    "power law": lambda: rotated(FALLING**-0.7, N),
    "exponential": lambda: rotated(torch.exp(-FALLING / 60), 2 * N),
    "large columns": lambda: MATRICES["gaussian"]() * (1 + 5 * (FALLING <= 8)),
    "low rank": lambda: rotated((FALLING <= 20).double(), N),
    "outliers": lambda: MATRICES["gaussian"]() + 300 * rotated((FALLING <= 2).double(), N),
}


def noisy(a: Tensor, share: float = 0.26) -> Tensor:
    """The matrix with noise of this share of its norm, as a 2-bit code leaves it."""
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(5), dtype=a.dtype)
    return a + share * a.norm() / math.sqrt(a.numel()) * noise


@dataclass(frozen=True)
class Case:
    """A matrix with its true and its estimated singular values."""

    matrix: Tensor
    exact: Tensor
    found: metrics.Spectrum


@pytest.fixture(scope="module", params=list(MATRICES))
def pair(request: pytest.FixtureRequest) -> tuple[Case, Case]:
    """A matrix with noise, and the one without."""
    a = MATRICES[request.param]()
    noise, clean = (Case(m, torch.linalg.svdvals(m), metrics.spectrum(m, full=100)) for m in (noisy(a), a))
    return noise, clean


def test_estimated_values_are_within_the_stated_error(pair: tuple[Case, Case]) -> None:
    for case in pair:
        exact, found = case.exact, case.found
        assert found.values.shape == exact.shape
        assert bool((found.values.diff() <= 0).all())
        true = ((found.values - exact).norm() / exact.norm()).item()
        assert 2 * true <= found.error + 1e-12 and found.error < 0.08
        # The energy is kept whole.
        torch.testing.assert_close(found.values.norm(), exact.norm())


# Steps, which a distribution seen through a few probes smears.
STEPS: dict[str, Callable[[], Tensor]] = {
    "equal, then nothing": lambda: rotated((FALLING <= 50).double(), N),
    "two clusters": lambda: rotated(torch.where(FALLING <= 160, 1.0, 1e-3).double(), N),
    "three clusters": lambda: rotated(torch.where(FALLING <= 100, 1.0, torch.where(FALLING <= 200, 0.5, 0.1)), N),
    "rank 64": lambda: noisy(MATRICES["gaussian"](), 0.0)[:, :64] @ MATRICES["wide"]()[:64, :N],
    "identity": lambda: torch.eye(N, dtype=torch.float64),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_spectrum_are_within_the_stated_error(name: str) -> None:
    a = STEPS[name]()
    exact = torch.linalg.svdvals(a)
    for seed in range(6):
        found = metrics.spectrum(a, full=100, seed=seed)
        assert ((found.values - exact).norm() / exact.norm()).item() <= found.error + 1e-12


def test_a_limit_below_the_leading_values_is_fine() -> None:
    a = rotated(FALLING[:30] ** -0.5, 50)
    found = metrics.spectrum(a, full=10)
    assert found.values.shape == (30,)
    torch.testing.assert_close(found.values, FALLING[:30] ** -0.5, rtol=0, atol=0.05)


def test_estimates_are_the_same_every_time_and_another_with_another_seed() -> None:
    a = MATRICES["gaussian"]()
    state = torch.get_rng_state()
    one, other = (metrics.spectrum(a, full=100, seed=seed).values for seed in (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(one, metrics.spectrum(a, full=100).values) and not torch.equal(one, other)


def test_estimated_spectral_error_and_principal_ratio(pair: tuple[Case, Case]) -> None:
    ours, wanted = pair
    error = ((ours.exact - wanted.exact).norm() / wanted.exact.norm()).item()
    assert metrics.spectral_error(ours.found, wanted.found) == pytest.approx(error, abs=0.01)
    for k in (1, 8, 32):
        ratio = (ours.exact[:k].square().sum() / wanted.exact[:k].square().sum()).item()
        assert metrics.principal_ratio(ours.found, wanted.found, k) == pytest.approx(ratio, rel=0.02)


def test_estimated_lipschitz_constant(pair: tuple[Case, Case]) -> None:
    for case in pair:
        exact = case.exact[0].item()
        assert 0.999 * exact <= metrics.lipschitz(case.matrix, full=100) <= exact * (1 + 1e-12)


def test_lipschitz_constant_among_many_that_are_nearly_as_large() -> None:
    falling = torch.linspace(1.0, 0.0, N, dtype=torch.float64)
    for values in (falling, 0.8 + 0.2 * falling, falling**0.2, 1 - (1 - falling) ** 3):
        for seed in range(3):
            assert 0.9992 <= metrics.lipschitz(rotated(values, N, seed), full=100) <= 1 + 1e-12


def test_estimated_condition(pair: tuple[Case, Case]) -> None:
    exact = pair[0].exact
    assert metrics.condition(pair[0].matrix, full=100) == pytest.approx((exact[0] / exact[-1]).item(), rel=2e-3)


def test_condition_of_a_large_matrix_of_low_rank_is_infinite() -> None:
    low = MATRICES["low rank"]()
    assert metrics.condition(low, full=100) == math.inf == metrics.condition(low)


@pytest.mark.parametrize("shape", [(40, 40), (40, 7), (7, 40), (3000, 12), (12, 3001), (1, 5), (5, 1), (1, 1)])
def test_small_matrices_are_exact(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    s, t = (torch.linalg.svdvals(m.double()) for m in (a, b))
    found = metrics.spectrum(a)
    assert found.error == 0.0
    torch.testing.assert_close(found.values, s, rtol=1e-12, atol=1e-12)
    assert metrics.spectral_error(b, a) == pytest.approx(((s - t).norm() / s.norm()).item(), rel=1e-10)
    assert metrics.lipschitz(a) == pytest.approx(s[0].item(), rel=1e-12)
    assert metrics.condition(a) == pytest.approx((s[0] / s[-1]).item(), rel=1e-9)
    k = min(shape)
    assert metrics.principal_ratio(b, a, k) == pytest.approx((metrics.energy(b) / metrics.energy(a)), rel=1e-10)


def test_spectra_may_be_given_once_and_used_twice() -> None:
    a, b = torch.randn(20, 30), torch.randn(20, 30)
    both = metrics.spectrum(a), metrics.spectrum(b)
    assert metrics.spectral_error(*both) == metrics.spectral_error(a, b)
    assert metrics.principal_ratio(*both, k=3) == metrics.principal_ratio(a, b, k=3)


def test_spectral_error_is_at_most_the_relative_error_and_blind_to_directions() -> None:
    a = torch.randn(50, 30)
    b = noisy(a, 0.5)
    assert 0 < metrics.spectral_error(b, a) < metrics.relative_error(b, a)
    assert metrics.spectral_error(a.flip(0), a) == pytest.approx(0.0, abs=1e-7)
    # Random directions with the right lengths: all principal energy, nothing captured.
    assert metrics.principal_ratio(-a, a, k=5) == pytest.approx(1.0)
    assert metrics.captured_energy(-a, a) == pytest.approx(-3.0)


def test_zero_matrices() -> None:
    zero, one = torch.zeros(4, 4), torch.eye(4)
    assert metrics.spectral_error(zero, zero) == 0.0 and metrics.spectral_error(one, zero) == math.inf
    assert metrics.principal_ratio(zero, zero, 2) == 1.0 and metrics.principal_ratio(one, zero, 2) == math.inf
    assert metrics.lipschitz(zero) == 0.0 and metrics.condition(zero) == math.inf
    assert metrics.spectrum(torch.zeros(150, 150), full=100).values.abs().max() == 0.0
    assert metrics.lipschitz(torch.zeros(150, 150), full=100) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [20, 300])
def test_condition_of_a_matrix_of_low_rank_is_infinite(dtype: torch.dtype, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    u, v = torch.randn(size, 3, generator=draw).to(dtype), torch.randn(3, size + 5, generator=draw).to(dtype)
    assert metrics.condition(u @ v) == math.inf == metrics.condition(u @ v, full=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_large_condition_is_no_infinite_one(dtype: torch.dtype) -> None:
    a = rotated(torch.logspace(0, -5, 400, dtype=torch.float64), 500).to(dtype)
    exact = torch.linalg.cond(a.double()).item()
    assert (exact > 5e3) and metrics.condition(a) == pytest.approx(exact, rel=1e-4)
    assert metrics.condition(a, full=10) == pytest.approx(exact, rel=1e-2)


def test_jacobian_ranks() -> None:
    draw = torch.Generator().manual_seed(2)
    phi = torch.randn(64, 1, generator=draw)
    one = phi * torch.tensor([[0.3, -1.7]])
    assert metrics.jacobian(one).rank == 1
    assert metrics.jacobian(one).largest == pytest.approx(torch.linalg.matrix_norm(one, 2).item(), rel=1e-6)
    assert metrics.jacobian(one).condition == math.inf and metrics.jacobian(one).smallest == 0.0
    # The rounding of a long sum must not look like a second direction.
    tall = torch.randn(100_000, 1, generator=draw, dtype=torch.float64) * torch.tensor([[0.3, -1.7]])
    assert metrics.jacobian(tall).rank == 1
    two = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    found = metrics.jacobian(two)
    assert found.rank == 2 and found.condition == pytest.approx(torch.linalg.cond(two).item())
    assert metrics.jacobian(torch.zeros(64, 2)).rank == 0
    assert metrics.jacobian(torch.ones(1, 2)).rank == 1


def test_bad_input_is_named() -> None:
    a = torch.randn(4, 5)
    for function in (metrics.spectrum, metrics.lipschitz, metrics.condition):
        name = function.__name__
        with pytest.raises(RbeError, match=f"{name}: .*float matrix"):
            function(torch.zeros(3))
        with pytest.raises(RbeError, match=f"{name}: .*float matrix"):
            function(torch.zeros(3, 3, dtype=torch.int64))
        with pytest.raises(RbeError, match=f"{name}: .*infinities or NaN"):
            function(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(RbeError, match=r"spectral_error: shapes .* differ"):
        metrics.spectral_error(a, torch.zeros(3, 3))
    for k in (0, 5):
        with pytest.raises(RbeError, match=f"k is {k}; the matrices have 4"):
            metrics.principal_ratio(a, a, k)
    with pytest.raises(RbeError, match=r"jacobian: shape \(4, 5\)"):
        metrics.jacobian(a)
    with pytest.raises(RbeError, match="empty"):
        metrics.condition(torch.zeros(0, 3))


def test_a_matrix_drawn_from_a_generator_of_the_same_number_is_no_different() -> None:
    a = noisy(MATRICES["low rank"]())  # its noise is what a generator of seed 5 draws first
    exact = torch.linalg.svdvals(a)
    for seed in (4, 5):
        found = metrics.spectrum(a, full=100, seed=seed)
        assert ((found.values - exact).norm() / exact.norm()).item() <= found.error
