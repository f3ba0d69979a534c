"""Conversion and compression (001): the printed formulas in numpy, beside what is implemented and what is wrong."""

import math

import numpy as np
import pytest
import torch

from rbe import disk, encode, formats, metrics
from rbe.formats import packed64


def f(r: float, theta: float, phi: float = 1.0) -> float:
    """8.2.3."""
    return math.tanh(2 * math.atanh(r)) * math.sin(theta) * phi


def fmix(h: int) -> int:
    """MurmurHash3's finaliser, in Python's own integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def phi(size: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """8.2.3, with the 32-bit hash of the pair (i, j)."""
    hashes = [[fmix(j ^ fmix(i ^ 0x9E3779B9)) for j in range(size)] for i in range(size)]
    return 1 + 0.1 * np.sin(2 * np.pi * np.array(hashes, dtype=float) / 2**32)


def test_the_printed_function_is_packed64() -> None:
    spec = formats.make_spec("packed64", (8, 8), block=8)
    for r, theta in ((0.0, 1.0), (0.3, 0.4), (0.999, 4.0), (0.5, 6.2)):
        point = torch.tensor([[r]], dtype=torch.float64), torch.tensor([[theta]], dtype=torch.float64)
        found = packed64.values(torch.empty(1, 0), *point, spec)[0].numpy()
        np.testing.assert_allclose(found, f(r, theta) * phi(8), rtol=1e-12, atol=1e-15)


def test_g_and_its_slope_in_closed_form() -> None:
    """8.2.3: tanh(2 artanh r) is 2 r / (1 + r^2), and 2 / (1 - r^2) sech^2(2 artanh r), as printed, its slope."""
    r = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(disk.radial(torch.from_numpy(r)), np.tanh(2 * np.arctanh(r)), rtol=1e-12)
    printed = 2 / (1 - r**2) / np.cosh(2 * np.arctanh(r)) ** 2
    np.testing.assert_allclose(disk.radial_slope(torch.from_numpy(r)), printed, rtol=1e-10)


def test_the_slope_vanishes_at_the_rim_and_does_not_explode() -> None:
    """8.6.1 prints 2 / (1 - r)^2 -> inf; it is (1 - r), so r / (1 + eps r) removes a singularity that is not there."""
    for gap in (1e-2, 1e-4, 1e-6):
        numeric = (f(1 - gap + gap / 10, math.pi / 2) - f(1 - gap - gap / 10, math.pi / 2)) / (gap / 5)
        assert numeric == pytest.approx(gap, rel=0.05)
        assert 2 / gap**2 > 1e4 * numeric
        assert float(disk.radial_slope(torch.tensor(1 - gap, dtype=torch.float64))) == pytest.approx(gap, rel=0.03)


def test_a_seed_is_one_number_and_a_curve_of_seeds_gives_the_same_matrix() -> None:
    """8.2.1, 8.9.3: T is no function with a Lipschitz constant, because its minimisers are a whole curve."""
    c = f(0.8, 0.7)
    for r in (0.5, 0.7, 0.95):
        theta = math.asin(c / math.tanh(2 * math.atanh(r)))
        assert f(r, theta) == pytest.approx(c, rel=1e-12)


def test_the_jacobian_has_rank_one() -> None:
    """8.6.1: sigma_min is 0 and kappa infinite, whatever the point, so the bound of 8.6.2 says nothing."""
    spec = formats.make_spec("packed64", (16, 16))
    for r, theta in ((0.1, 0.3), (0.7, 2.0), (0.99, 5.0)):
        point = torch.tensor([[r]], dtype=torch.float64), torch.tensor([[theta]], dtype=torch.float64)
        by_r, by_theta = packed64.derivatives(torch.empty(1, 0), *point, spec)
        found = metrics.jacobian(torch.stack([by_r.flatten(), by_theta.flatten()], 1))
        assert found.rank == 1 and found.condition == math.inf
        slopes = math.hypot(float(disk.radial_slope(point[0])) * math.sin(theta), f(r, math.pi / 2) * math.cos(theta))
        assert found.largest == pytest.approx(slopes * np.linalg.norm(phi(16)), rel=1e-10)


def test_the_printed_key_collides() -> None:
    """8.2.3 says H is a hash; of the key 31 i + 17 j a 64x64 matrix has 2,545 values for 4,096 cells. Ours has all."""
    keys = {31 * i + 17 * j for i in range(64) for j in range(64)}
    assert len(keys) == 2545 and 31 * (5 + 17) + 17 * (40 - 31) == 31 * 5 + 17 * 40
    assert len({fmix(j ^ fmix(i ^ 0x9E3779B9)) for i in range(64) for j in range(64)}) == 4096
    np.testing.assert_allclose(packed64.modulation(64, 64, 0), phi(64), rtol=1e-12)


def test_a_modulation_by_the_remainder_has_rank_three() -> None:
    """The other printed hash, (31 i + 17 j) mod 256: sin of a sum is a sum of two products."""
    i, j = np.mgrid[:64, :64]
    remainder = 1 + 0.1 * np.sin(2 * np.pi * ((31 * i + 17 * j) % 256) / 256)
    assert np.linalg.matrix_rank(remainder) == 3
    assert np.linalg.matrix_rank(phi(64)) == 64


def test_the_best_seed_is_in_closed_form_and_worth_nothing_for_gaussian_weights() -> None:
    """8.3.1: c* = <W, phi> / <phi, phi>; for 4,096 Gaussian weights it leaves 99.98 % of the error or more."""
    table = phi(64)
    errors = []
    for seed in range(20):
        w = np.random.default_rng(seed).normal(size=(64, 64))
        c = (w * table).sum() / (table * table).sum()
        errors.append(np.linalg.norm(w - c * table) / np.linalg.norm(w))
        shifted = [np.linalg.norm(w - (c + d) * table) for d in (-1e-3, 1e-3)]
        assert np.linalg.norm(w - c * table) < min(shifted)
    assert np.mean(errors) == pytest.approx(0.99987, abs=1e-4)
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 64)))
    found = encode(w.float(), format="packed64", block=64)
    assert metrics.relative_error(found.decode(), w) == pytest.approx(errors[0], abs=2e-5)


def test_theta_zero_and_pi_are_the_same_zero() -> None:
    """8.3.2: half of the printed coarse angles start from no matrix at all."""
    for r in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert f(r, 0.0) == 0.0 and abs(f(r, math.pi)) < 1e-15


def test_the_first_grid_step_is_not_the_printed_formula() -> None:
    """8.3.2: level 0 of 0.999 / 2^k is 0.999, the radii listed stand 0.2 apart."""
    radii = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(np.diff(radii), 0.2)
    assert 0.999 / 2**0 > 4 * 0.2


def test_the_root_of_a_uniform_number_is_uniform_in_the_flat_disk_only() -> None:
    """8.3.3: of hyperbolic area next to nothing lies near the origin: cosh of the distance is uniform there."""
    r = np.sqrt(np.random.default_rng(0).uniform(size=100_000))
    assert np.mean(r < 0.5) == pytest.approx(0.25, abs=0.01)
    inside, whole = (math.cosh(2 * math.atanh(edge)) - 1 for edge in (0.5, 0.99))
    assert inside / whole < 0.01


def test_the_ratio_is_of_bytes_and_the_bits_of_a_matrix_are_no_information() -> None:
    """8.2.2: 32 mn bits are its size. What a code must pay depends on the error: R(D) = 1/2 log2(1/D) a weight."""
    assert 32 * 64 * 64 / 128 == 64 * 64 / 4
    assert metrics.ratio(16, 64 * 64) == 64 * 64 / 4 and metrics.ratio(8, 64 * 64) == 64 * 64 / 2
    rate = 128 / 64**2
    assert math.sqrt(metrics.shannon_floor(rate)) == pytest.approx(0.979, abs=1e-3)
    # R_RBE(D) = 128 / mn whatever D: near the optimum only if D is near the floor, and one seed is not.
    assert metrics.efficiency(0.9998, rate) < 0.01


def test_storage_and_arithmetic_are_two_terms() -> None:
    """8.6.2: 2^-64 is what storing costs; weights are float32, whose own term is 2^40 times larger."""
    assert pytest.approx(5.42e-20, rel=1e-3) == 2.0**-64
    storage = metrics.storage_bound(2.2, 1.1, 64)
    whole = metrics.weight_bound(2.2, 1.1, 64, operations=6, size=1.1)
    assert whole > 1e11 * storage
    assert metrics.accumulated(7, 2.0**-64, 0.5) == pytest.approx(7 * 2.0**-64 * 1.5**7)


def test_principal_ratio_can_exceed_one() -> None:
    """8.4.2: PCR_k is a ratio of energies, and noise has energy."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    noisy = w + torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert metrics.principal_ratio(noisy, w, k=8) > 1.5


def test_metrics_equal_the_printed_formulas() -> None:
    """8.4.1 to 8.4.3, in numpy."""
    draw = np.random.default_rng(3)
    w, v = draw.normal(size=(20, 12)), draw.normal(size=(20, 12))
    s, t = (np.linalg.svd(m, compute_uv=False) for m in (w, v))
    ours = torch.from_numpy(v), torch.from_numpy(w)
    assert metrics.mean_squared_error(*ours) == pytest.approx(((w - v) ** 2).mean())
    assert metrics.mean_absolute_error(*ours) == pytest.approx(np.abs(w - v).mean())
    assert metrics.relative_error(*ours) == pytest.approx(np.linalg.norm(w - v) / np.linalg.norm(w))
    assert metrics.spectral_error(*ours) == pytest.approx(np.linalg.norm(s - t) / np.linalg.norm(s))
    assert metrics.principal_ratio(*ours, k=5) == pytest.approx((t[:5] ** 2).sum() / (s[:5] ** 2).sum())
    assert metrics.lipschitz(ours[1]) == pytest.approx(s[0])
    assert metrics.condition(ours[1]) == pytest.approx(s[0] / s[-1])


def test_the_printed_allocation_compresses_what_matters_most() -> None:
    """8.5.1: R_l grows with the importance, and R is the ratio of compression."""
    importance = np.array([1.0, 9.0])
    ratio = 100 * importance / importance.sum() * 2
    assert ratio[1] > ratio[0]


def test_the_printed_reward_punishes_progress() -> None:
    """8.7.3: -a err - b |change|: of two ways to the same error, the one that came from further is worth less."""

    def reward(before: float, after: float) -> float:
        return -after - 2.0 * abs(after - before)

    assert reward(1.0, 0.5) < reward(0.5, 0.5) and reward(1.0, 0.5) < reward(1.0, 0.9)


def test_the_experiments_contradict_the_fitted_law() -> None:
    """8.10: accuracy A exp(-alpha R) falls with the ratio, yet 300:1 is said to lose less than 150:1."""
    alpha = -math.log(1 - 0.023) / 150
    assert 1 - math.exp(-alpha * 300) == pytest.approx(0.0455, abs=1e-3) != 0.018


def test_the_printed_optimum_depends_on_no_network_but_through_alpha() -> None:
    """8.10.1: with the fitted law and memory as 1 / R, accuracy over memory is R exp(-alpha R): R* = 1 / alpha."""
    alpha = -math.log(1 - 0.023) / 150  # the printed loss of a CNN at 150:1
    ratios = np.arange(1.0, 20_000.0)
    best = ratios[(ratios * np.exp(-alpha * ratios)).argmax()]
    assert best == pytest.approx(1 / alpha, abs=1) and best > 150
    # There exp(-1) of the accuracy is left, whatever the network: no point to operate at.
    assert math.exp(-alpha * best) == pytest.approx(0.368, abs=1e-3)


def test_a_pipeline_is_as_fast_as_its_slowest_stage_only_when_stages_overlap() -> None:
    """8.8.2: 1 / max T_i needs a worker for every stage; on the same workers it is less than workers / sum T_i."""
    times = np.array([0.1, 5.0, 0.3, 0.1])
    pipeline, shared = 1 / times.max(), len(times) / times.sum()
    assert shared > 3 * pipeline
