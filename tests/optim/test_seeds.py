"""Ordinary optimizers train open seeds: gradients treated as stated, seeds kept in the disk, accumulation exact."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbe import optim
from rbe.errors import RbeError
from rbe.nn import Linear


def layer(format: str = "packed128", seed: int = 0, bias: bool = True) -> Linear:
    torch.manual_seed(seed)
    return Linear(40, 32, bias=bias, format=format, block=16)


def with_gradients(module: Linear, radius: Tensor, outward: float, around: float) -> None:
    """Set the radius everywhere and the gradients of radius and angle."""
    with torch.no_grad():
        module.radius.copy_(radius.expand_as(module.radius))
    module.radius.grad = torch.full_like(module.radius, outward)
    module.angle.grad = torch.full_like(module.angle, around)


def moved(module: Linear, **settings: Any) -> tuple[Tensor, Tensor]:
    """Change of radius and angle by one SGD step of rate 1e-3, divided by the rate, signs turned."""
    optimizer = torch.optim.SGD(optim.groups(module), lr=1e-3)
    optim.guard(optimizer, module, **settings)
    radius, angle = module.radius.detach().double(), module.angle.detach().double()
    optimizer.step()
    return (radius - module.radius.detach()) / 1e-3, (angle - module.angle.detach()) / 1e-3


PLAIN: dict[str, Any] = {"boundary_damping": 0.0, "clip_norm": None}


def test_points_are_found_once_each() -> None:
    one = layer()
    model = nn.Sequential(one, nn.ReLU(), nn.Linear(32, 8), nn.ModuleList([one, layer("packed64")]))
    found = optim.points(model)
    assert [p.name for p in found] == ["0", "3.1"]
    assert [(p.least, p.most) for p in found] == [(0.01, 0.99), (1e-6, 0.999)]
    assert optim.points(layer().freeze()) == []


def test_without_options_it_is_plain_gradient_descent() -> None:
    module = layer()
    with_gradients(module, torch.tensor(0.5), 0.3, -0.7)
    outward, around = moved(module, **PLAIN)
    torch.testing.assert_close(outward, torch.full_like(outward, 0.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(around, torch.full_like(around, -0.7), rtol=1e-3, atol=0)


def test_riemannian_scaling() -> None:
    module = layer()
    for r in (0.05, 0.5, 0.9):
        with_gradients(module, torch.tensor(r), 1.0, 1.0)
        outward, around = moved(module, riemannian=True, **PLAIN)
        assert outward.mean().item() == pytest.approx((1 - r * r) ** 2 / 4, rel=1e-2)
        assert around.mean().item() == pytest.approx((1 - r * r) ** 2 / (4 * r * r), rel=1e-2)


def test_damping_is_for_outward_steps_near_the_rim_only() -> None:
    module = layer()
    for r, factor in ((0.5, 1.0), (0.94, 1.0), (0.97, 0.6), (0.985, 0.3)):
        for gradient in (-1.0, 1.0):
            with_gradients(module, torch.tensor(r), gradient, 1.0)
            outward, around = moved(module, clip_norm=None)
            wanted = gradient * (factor if gradient < 0 else 1.0)
            assert outward.mean().item() == pytest.approx(wanted, rel=1e-2)
            assert around.mean().item() == pytest.approx(1.0, rel=1e-2)
    assert optim.damping(torch.tensor([0.9999, 0.95, 0.0])).tolist() == pytest.approx([0.1, 1.0, 1.0])


def test_decay_moves_the_radius_only() -> None:
    """The gradient of lambda artanh(r)^2, against autograd."""
    module = layer()
    for value in (0.1, 0.6, 0.95):
        r = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(0.3 * torch.atanh(r).square(), r)
        with_gradients(module, torch.tensor(value), 0.0, 0.0)
        outward, around = moved(module, weight_decay=0.3, **PLAIN)
        assert outward.mean().item() == pytest.approx(wanted.item(), rel=1e-2)
        assert bool((around == 0).all())


def test_clipping_is_of_the_norm_over_all_modules_or_of_components() -> None:
    model = nn.Sequential(layer(), nn.Linear(32, 40), layer("packed64"))
    optimizer = torch.optim.SGD(optim.groups(model), lr=1.0)
    seen: list[Tensor] = []
    watch = optim.guard(optimizer, model, boundary_damping=0.0, clip_norm=0.5)
    spy = optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for one in watch.points for p in (one.radius, one.angle))
    )
    for one in watch.points:
        one.radius.grad, one.angle.grad = torch.randn_like(one.radius), torch.randn_like(one.angle)
    before = [p.grad.clone() for one in watch.points for p in (one.radius, one.angle)]
    optimizer.step()
    size = math.sqrt(sum(g.square().sum().item() for g in before))
    for grad, old in zip(seen, before, strict=True):
        torch.testing.assert_close(grad, old * 0.5 / size, rtol=1e-4, atol=1e-7)
    spy.remove()
    watch.remove()
    seen.clear()
    optim.guard(optimizer, model, boundary_damping=0.0, clip_norm=None, clip_value=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for one in watch.points for p in (one.radius, one.angle))
    )
    optimizer.step()
    for grad, old in zip(seen, before, strict=True):
        assert torch.equal(grad, old.clamp(-0.1, 0.1))


def test_what_does_not_train_stays_and_what_trains_alone_is_clipped() -> None:
    for still, trained in (("radius", "angle"), ("angle", "radius")):
        module = layer()
        fixed, free = getattr(module, still), getattr(module, trained)
        with torch.no_grad():
            fixed.fill_(0.999 if still == "radius" else 40.0)  # beyond what a step leaves
        fixed.requires_grad_(False)
        kept, start = fixed.clone(), free.detach().clone()
        optimizer = torch.optim.SGD(optim.groups(module), lr=1e-3)
        optim.guard(optimizer, module, riemannian=True, boundary_damping=0.0, clip_norm=1.0)
        free.grad = torch.full_like(free, 1e6)
        optimizer.step()
        assert torch.equal(fixed, kept)
        assert (start - free.detach()).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_gradients_are_afterwards_what_backward_left() -> None:
    module = layer()
    optimizer = torch.optim.Adam(optim.groups(module), lr=0.1)
    optim.guard(optimizer, module, riemannian=True, weight_decay=0.5)
    module(torch.randn(4, 40)).square().sum().backward()
    kept = {name: p.grad for name, p in module.named_parameters()}
    values = {name: g.clone() for name, g in kept.items() if g is not None}
    optimizer.step()
    for name, p in module.named_parameters():
        assert p.grad is kept[name] and torch.equal(p.grad, values[name])


def test_gradients_are_freed_with_zero_grad() -> None:
    module = layer()
    optimizer = torch.optim.SGD(optim.groups(module), lr=0.1)
    optim.guard(optimizer, module)
    module(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    assert module.radius.grad is not None
    kept = weakref.ref(module.radius.grad)
    optimizer.zero_grad()
    assert kept() is None


@pytest.mark.parametrize("format", ["packed64", "packed128"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_seeds_stay_in_the_disk_under_wild_steps(format: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    module = layer(format)
    # The seeds alone: a scale or a bias may well go to infinity at such a rate.
    optimizer = make(optim.groups(module)[:1], lr=50.0)
    watch = optim.guard(optimizer, module, clip_norm=None)
    least, most = watch.points[0].least, watch.points[0].most
    for step in range(6):
        optimizer.zero_grad()
        module(torch.randn(4, 40)).square().sum().backward()
        optimizer.step()
        assert bool(((module.radius >= least) & (module.radius <= most)).all()), step
        assert bool(((module.angle >= -optim.seeds.TURNS) & (module.angle < optim.seeds.TURNS)).all())
    assert bool(module.weight.isfinite().all())


def test_wrap_keeps_every_cosine() -> None:
    angle = torch.linspace(-200, 200, 4001, dtype=torch.float64)
    wrapped = optim.wrap(angle)
    assert bool(((wrapped >= -10 * math.pi) & (wrapped < 10 * math.pi)).all())
    for k in (1, 2, 31):
        torch.testing.assert_close((k * wrapped).cos(), (k * angle).cos(), atol=1e-11, rtol=0)
    # By whole multiples of 20 pi and no other.
    assert optim.wrap(torch.tensor([35.0, -35.0])).tolist() == pytest.approx([35 - 20 * math.pi, 20 * math.pi - 35])
    inner = angle[angle.abs() < 31]
    assert torch.equal(optim.wrap(inner), inner)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("format", ["packed64", "packed128"])
def test_it_learns(format: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    """A layer of the same form with other radii and angles is found again, nearly."""
    target, module = layer(format, 1, bias=False), layer(format, 1, bias=False)
    with torch.no_grad():
        module.radius.mul_(0.6).add_(0.1)
        module.angle.add_(0.4)
        module.scale.copy_(target.scale)
    # At 0.5 packed128 is thrown far away first, and rounding decides when it is back.
    rate = 0.02 if make is torch.optim.Adam else {"packed64": 0.5, "packed128": 0.1}[format]
    optimizer = make(optim.groups(module)[:1], lr=rate)
    optim.guard(optimizer, module, riemannian=make is torch.optim.SGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.WarmupDecay(5, 0.1, 100.0))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(128, 40, generator=draw)
    with torch.no_grad():
        wanted = target(x)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - wanted).square().mean() / wanted.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("format", ["packed64", "packed128"])
def test_accumulation_over_the_batch_and_over_micro_batches_is_the_same(format: str) -> None:
    """One backward of the whole batch, one per sample, one per micro-batch: equal gradients and equal steps."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 40, generator=draw), torch.randn(12, 32, generator=draw)

    def train(parts: int) -> tuple[list[Tensor], list[Tensor]]:
        module = layer(format)
        optimizer = torch.optim.Adam(optim.groups(module), lr=0.01)
        optim.guard(optimizer, module, riemannian=True, weight_decay=1e-3)
        grads: list[Tensor] = []
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ((module(a) - b).square().sum() / len(x)).backward()
            grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            optimizer.step()
        return grads, [p.detach().clone() for p in module.parameters()]

    whole = train(1)
    for parts in (2, 3, 12):
        for ours, wanted in zip(train(parts), whole, strict=True):
            for a, b in zip(ours, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


def test_the_gradient_of_a_seed_is_the_sum_over_its_cells() -> None:
    """Neural-network layers, section 5.9.1: dL/ds = sum dL/dW dW/ds, with dL/dW made by torch from the dense weight."""
    module = layer("packed128")
    x = torch.randn(6, 40)
    weight = module.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, module.bias).square().sum().backward()
    radius, angle = (p.detach().double().requires_grad_() for p in (module.radius, module.angle))

    def decoded(r: Tensor, a: Tensor) -> Tensor:
        from rbe import formats

        blocks = formats.disk("packed128").values(module.code, r, a, module.spec) * module.scale.detach().double()
        rows, columns = module.spec.grid
        whole = blocks.reshape(rows, columns, 16, 16).transpose(1, 2).reshape(rows * 16, columns * 16)
        return whole[:32, :40]

    assert weight.grad is not None
    (decoded(radius, angle) * weight.grad.double()).sum().backward()
    module(x).square().sum().backward()
    for found, wanted in ((module.radius, radius), (module.angle, angle)):
        assert found.grad is not None and wanted.grad is not None
        torch.testing.assert_close(
            found.grad.double(), wanted.grad, rtol=2e-3, atol=2e-4 * float(wanted.grad.abs().max())
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundary_damping": -1.0}, "boundary_damping is -1"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"clip_value": 0.1}, "both given"),
        ({"boundary": 1.0}, "boundary is 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    module = layer()
    optimizer = torch.optim.SGD(optim.groups(module), lr=0.1)
    with pytest.raises(RbeError, match=message):
        optim.guard(optimizer, module, **settings)


def test_wrong_uses_are_named() -> None:
    module = layer()
    with pytest.raises(RbeError, match="no open seeds"):
        optim.guard(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), nn.Linear(2, 2))
    with pytest.raises(RbeError, match=r"weight_decay 0\.1 on seeds"):
        optim.guard(torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1), module)
    fine = torch.optim.AdamW(optim.groups(module, weight_decay=0.1), lr=0.1)
    optim.guard(fine, module)
    module(torch.randn(2, 40)).sum().backward()
    with pytest.raises(RbeError, match="closure"):
        fine.step(lambda: 0.0)
    with pytest.raises(RbeError, match="closure"):
        fine.step(closure=lambda: 0.0)


def test_a_removed_guard_does_nothing() -> None:
    module = layer()
    optimizer = torch.optim.SGD(optim.groups(module), lr=1.0)
    optim.guard(optimizer, module).remove()
    with_gradients(module, torch.tensor(0.5), 5.0, 0.0)
    optimizer.step()
    assert module.radius.mean().item() == pytest.approx(-4.5)
