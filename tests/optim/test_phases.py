"""Phases say which roles move when; rounds hold more and more signs."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rbe.errors import RbeError
from rbe.nn import Linear
from rbe.optim import HybridAdam, Phase, Phases, PowerDecay, rounds, three_phases


def test_every_role_moves_in_its_phases_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(16, 32, format="outer128"), nn.Tanh(), Linear(32, 4, format="packed128"))
    optimizer = HybridAdam(model, lr=0.05)
    plan = Phases(6, (Phase(1 / 3, latent=0.0), Phase(2 / 3, point=0.0), Phase(1.0, latent=0.0, dense=0.0)))
    scheduler = LambdaLR(optimizer, plan.factors(optimizer))
    x = torch.randn(16, 16)
    watched = {"point": model[2].radius, "latent": model[0].latent, "dense": model[0].bias, "scale": model[0].scale}
    for t in range(6):
        before = {role: p.detach().clone() for role, p in watched.items()}
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        for role, p in watched.items():
            assert torch.equal(p, before[role]) == (getattr(plan(t), "dense" if role == "scale" else role) == 0.0), (
                t,
                role,
            )


def test_factors_multiply_another_schedule_and_its_state_is_saved() -> None:
    model = Linear(16, 16, format="outer128")
    optimizer = HybridAdam(model, lr=0.5, latent_lr=0.25)
    plan, base = three_phases(20), PowerDecay(5.0)
    scheduler = LambdaLR(optimizer, plan.factors(optimizer, base))
    seen = []
    for _ in range(20):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    for t, (point, latent, scale, dense) in enumerate(seen):
        decay = (5 / (5 + t)) ** 0.5
        assert point == scale == dense == pytest.approx(0.5 * decay)
        assert latent == pytest.approx(0.25 * decay if 1 <= t < 15 else 0.0)
    again = LambdaLR(HybridAdam(model, lr=0.5, latent_lr=0.25), plan.factors(optimizer, base))
    again.load_state_dict(scheduler.state_dict())
    assert again.last_epoch == 20


def test_three_phases_explore_in_the_middle_only() -> None:
    plan = three_phases(100, warmup=0.1, settled=0.6)
    assert [plan(t).bits for t in (0, 9, 10, 59, 60, 99, 1000)] == [0, 0, 1, 1, 0, 0, 0]
    assert [plan(t).held for t in (0, 59, 60)] == [0, 0, 1]


def test_rounds_hold_a_growing_share() -> None:
    plan = rounds(80, shares=(0.5, 0.75, 0.9, 1.0), start=0.5)
    assert [plan(t).held for t in (0, 39, 40, 49, 50, 60, 70, 79)] == [0, 0, 0.5, 0.5, 0.75, 0.9, 1, 1]
    assert all(phase.point == phase.latent == phase.dense == 1.0 for phase in plan.phases)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Phases(0, (Phase(1.0),)),
        lambda: Phases(10, ()),
        lambda: Phases(10, (Phase(0.5),)),
        lambda: Phases(10, (Phase(0.5), Phase(0.5), Phase(1.0))),
        lambda: Phases(10, (Phase(0.0), Phase(1.0))),
        lambda: Phases(10, (Phase(1.0, latent=-1.0),)),
        lambda: Phases(10, (Phase(1.0, bits=math.nan),)),
        lambda: Phases(10, (Phase(1.0, held=1.5),)),
        lambda: rounds(10, shares=(0.5, 1.5)),
        lambda: rounds(10, start=1.0),
        lambda: rounds(10, shares=()),
    ],
)
def test_bad_plans_are_named(make: type) -> None:
    with pytest.raises(RbeError, match=r"Phases|rounds"):
        make()


def test_a_group_without_a_role_is_named() -> None:
    with pytest.raises(RbeError, match="role None"):
        three_phases(10).factors(torch.optim.Adam(nn.Linear(2, 2).parameters()))
