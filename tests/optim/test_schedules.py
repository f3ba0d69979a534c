"""Schedules start with a step that counts, and end where they should."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rbe.errors import RbeError
from rbe.optim import Cooling, PowerDecay, WarmupDecay


def printed(epoch: int, base: float) -> float:
    """Neural-network layers, section 5.10.1, as it stands there."""
    return base * (epoch / 100) if epoch < 100 else base * 0.1 ** ((epoch - 100) / 1000)


def test_warmup_equals_the_printed_schedule_one_epoch_earlier() -> None:
    factor = WarmupDecay()
    assert printed(0, 1.0) == 0.0 < factor(0)
    for epoch in range(99):
        assert factor(epoch) == pytest.approx(printed(epoch + 1, 1.0))
    for epoch in (100, 101, 600, 1100, 5000):
        assert factor(epoch) == pytest.approx(printed(epoch, 1.0))
    assert max(map(factor, range(3000))) == 1.0


def test_no_warmup_starts_at_one() -> None:
    assert WarmupDecay(warmup=0)(0) == 1.0


@pytest.mark.parametrize("factor", [WarmupDecay(5, 0.5, 7.0), PowerDecay(10.0)])
def test_an_ordinary_scheduler_takes_it_and_its_state_is_saved(factor: WarmupDecay | PowerDecay) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    scheduler = LambdaLR(optimizer, factor)
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx(0.3 * factor(t)) for t in range(20)]
    other = LambdaLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3), type(factor)())
    other.load_state_dict(scheduler.state_dict())
    assert other.lr_lambdas[0] == factor and other.last_epoch == 20


def test_power_decay() -> None:
    rate, flips = PowerDecay(50.0, 0.5), PowerDecay(50.0, 2.0)
    for t in (0, 1, 50, 1000):
        assert rate(t) == pytest.approx((50 / (50 + t)) ** 0.5) and flips(t) == pytest.approx(rate(t) ** 4)


def test_both_rates_of_4_6_2_beside_the_printed_formulas() -> None:
    for t0 in (1.0, 100.0):
        for t in range(0, 1000, 37):
            assert 3e-3 * PowerDecay(t0)(t) == pytest.approx(3e-3 * math.sqrt(t0 / (t0 + t)), rel=1e-12)
            assert 0.3 * PowerDecay(t0, 2.0)(t) == pytest.approx(0.3 * t0 * t0 / (t0 + t) ** 2, rel=1e-12)


def test_cooling_of_4_5_3_and_decay_by_epochs_of_4_3_3() -> None:
    for epoch in (0, 1, 10, 150):
        assert Cooling()(epoch) == pytest.approx(0.1 * (1.0 / (1.0 + 0.1 * epoch)))
        decay, cool = WarmupDecay(0, 0.99, 1.0), WarmupDecay(0, 0.95, 1.0)
        assert decay(epoch) == pytest.approx(0.99**epoch) and cool(epoch) == pytest.approx(0.95**epoch)
    assert 1 / Cooling()(0) == pytest.approx(10.0)  # the printed beta


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cooling(start=0.0),
        lambda: Cooling(slope=-1.0),
        lambda: WarmupDecay(warmup=-1),
        lambda: WarmupDecay(decay=0.0),
        lambda: WarmupDecay(decay=1.5),
        lambda: WarmupDecay(span=0.0),
        lambda: PowerDecay(start=0.0),
        lambda: PowerDecay(exponent=-1.0),
        lambda: PowerDecay(exponent=math.nan),
    ],
)
def test_bad_arguments_are_named(make: type) -> None:
    with pytest.raises(RbeError, match=r"(Decay|Cooling)\(.*=.*\): "):
        make()
