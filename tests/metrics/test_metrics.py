"""Metrics equal hand-worked values, torch and scipy."""

import math

import pytest
import torch

from rbe import metrics
from rbe.errors import RbeError


def test_relative_squared_error_is_error_over_power() -> None:
    a, b = torch.randn(30, 20), torch.randn(30, 20)
    assert metrics.relative_squared_error(a, b) == pytest.approx(((a - b).norm() / b.norm()).item() ** 2, rel=1e-5)


def test_error_of_a_zero_reference() -> None:
    zero = torch.zeros(4)
    assert metrics.relative_squared_error(zero, zero) == 0.0
    assert metrics.relative_squared_error(torch.ones(4), zero) == math.inf


def test_error_refuses_broadcasting() -> None:
    with pytest.raises(RbeError, match="differ"):
        metrics.relative_squared_error(torch.zeros(4), torch.zeros(3, 4))


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
def test_six_decibels_a_bit(bits: float) -> None:
    assert metrics.sqnr(metrics.shannon_floor(bits)) == pytest.approx(6.0206 * bits, rel=1e-4)


def test_rates_and_ratios() -> None:
    assert metrics.bits_per_weight(100, 400) == 2.0
    assert metrics.ratio(100, 400) == 16.0
    assert metrics.ratio(100, 400, width=2) == 8.0
    with pytest.raises(RbeError):
        metrics.bits_per_weight(10, 0)
    with pytest.raises(RbeError):
        metrics.ratio(0, 10)


def test_cosine_equals_torch_and_counts_a_lost_output() -> None:
    a, b = torch.randn(7, 5, 16), torch.randn(7, 5, 16)
    torch.testing.assert_close(metrics.cosine(a, b).float(), torch.nn.functional.cosine_similarity(a, b, dim=-1))
    assert metrics.cosine(torch.zeros(3), torch.ones(3)) == 0.0
    assert metrics.cosine(torch.zeros(3), torch.zeros(3)) == 1.0


def test_kl_equals_torch() -> None:
    p, q = torch.randn(9, 50), torch.randn(9, 50)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(metrics.kl_divergence(q, p).float(), expected)


def test_kl_points_from_the_reference() -> None:
    sharp, flat = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert metrics.kl_divergence(flat, sharp) != pytest.approx(metrics.kl_divergence(sharp, flat).item(), rel=0.1)
    assert metrics.kl_divergence(flat, sharp).item() == pytest.approx(0.5489, abs=2e-3)


def test_perplexity_equals_cross_entropy() -> None:
    logits, targets = torch.randn(11, 40), torch.randint(0, 40, (11,))
    expected = torch.nn.functional.cross_entropy(logits, targets).exp().item()
    assert metrics.perplexity(logits, targets) == pytest.approx(expected, rel=1e-5)


def test_spearman_equals_scipy_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle of the rank correlation")
    generator = torch.Generator().manual_seed(1)
    for n in (2, 5, 60, 400):
        a = torch.randn(n, generator=generator)
        b = torch.randint(0, 6, (n,), generator=generator).float() + (torch.arange(n) == 0) * 7
        assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)


def test_spearman_of_a_constant_list_is_nan_and_of_one_number_refused() -> None:
    assert math.isnan(metrics.spearman(torch.ones(5), torch.arange(5.0)))
    with pytest.raises(RbeError, match="two numbers"):
        metrics.spearman(torch.ones(1), torch.ones(1))


def test_errors_of_a_matrix_equal_torch() -> None:
    a, b = torch.randn(30, 20), torch.randn(30, 20)
    assert metrics.mean_squared_error(a, b) == pytest.approx(torch.nn.functional.mse_loss(a, b).item(), rel=1e-5)
    assert metrics.mean_absolute_error(a, b) == pytest.approx(torch.nn.functional.l1_loss(a, b).item(), rel=1e-5)
    assert metrics.relative_error(a, b) == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-5)
    assert metrics.captured_energy(a, b) == pytest.approx(1 - metrics.relative_error(a, b) ** 2)
    for name in ("mean_squared_error", "mean_absolute_error", "captured_energy", "relative_error"):
        with pytest.raises(RbeError, match="shapes"):
            getattr(metrics, name)(a, b[:5])
    for name in ("mean_squared_error", "mean_absolute_error"):
        with pytest.raises(RbeError, match=f"{name}: .*no elements"):
            getattr(metrics, name)(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("shape", [(3, 900_000), (1_700_000, 2), (2_500_000,), (2, 3, 400_001)])
def test_large_tensors_are_summed_in_pieces(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    largest = 0
    whole = torch.Tensor.to

    def watched(self: torch.Tensor, *arguments: object, **names: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return whole(self, *arguments, **names)

    power = a.double().square().sum().item()
    monkeypatch.setattr(torch.Tensor, "to", watched)
    found = metrics.mean_squared_error(a, b), metrics.mean_absolute_error(a, b)
    assert found == (
        pytest.approx((a - b).square().mean().item(), rel=1e-4),
        pytest.approx((a - b).abs().mean().item(), rel=1e-4),
    )
    assert metrics.energy(a) == pytest.approx(power)
    assert largest <= max(1 << 20, math.prod(shape) // shape[0])


@pytest.mark.parametrize("bits", [0.03, 0.5, 2.0, 4.0])
def test_efficiency_is_one_at_the_bound_and_the_inverse_of_the_floor(bits: float) -> None:
    assert metrics.least_rate(metrics.shannon_floor(bits)) == pytest.approx(bits)
    assert metrics.efficiency(metrics.shannon_floor(bits), bits) == pytest.approx(1.0)
    assert metrics.efficiency(1.0, bits) == 0.0 == metrics.efficiency(3.0, bits)
    # Twice the bits for the same error is half as efficient.
    assert metrics.efficiency(metrics.shannon_floor(bits), 2 * bits) == pytest.approx(0.5)
    assert metrics.efficiency(0.0, bits) == math.inf


def test_efficiency_refuses_what_is_no_error_or_rate() -> None:
    for error in (-0.1, math.nan):
        with pytest.raises(RbeError, match="least_rate"):
            metrics.efficiency(error, 2.0)
    for bits in (0.0, -1.0, math.nan):
        with pytest.raises(RbeError, match="positive rate"):
            metrics.efficiency(0.1, bits)
