"""Schedules start with a step that counts, and end where they should."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rbe.errors import RbeError
from rbe.optim import PowerDecay, WarmupDecay


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


@pytest.mark.parametrize(
    "make",
    [
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
    with pytest.raises(RbeError, match=r"Decay\(.*=.*\): "):
        make()
