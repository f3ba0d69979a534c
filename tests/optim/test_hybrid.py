"""HybridAdam: each way of moving points against its formula, bits by transitions, exact resumption, two processes."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.nn import Linear
from rbe.optim import HybridAdam, total_entropy
from rbe.optim.motion import METHODS

FORMATS = ["packed64", "packed128", "outer128"]


def layer_with_gradient(format: str, radius: float, angle: float, g: tuple[float, float]) -> Linear:
    layer = Linear(16, 16, False, format=format)
    with torch.no_grad():
        layer.radius.fill_(radius)
        layer.angle.fill_(angle)
    layer.radius.grad = torch.full_like(layer.radius, g[0])
    layer.angle.grad = torch.full_like(layer.angle, g[1])
    return layer


def test_tangent_steps_are_adam_on_the_vector_of_the_tangent_plane() -> None:
    radius, angle, g = 0.6, 0.8, (0.7, -0.4)
    layer = layer_with_gradient("packed128", radius, angle, g)
    optimizer = HybridAdam(layer, lr=0.05, eps=0.0)
    v = torch.tensor([2 * math.atanh(radius) * f(angle) for f in (math.cos, math.sin)], dtype=torch.float64)
    v.requires_grad_()
    # The same function of v: its gradient by autograd, through r = tanh(|v| / 2) and theta = atan2.
    loss = g[0] * torch.tanh(v.norm() / 2) + g[1] * torch.atan2(v[1], v[0])
    (gradient,) = torch.autograd.grad(loss, v)
    expected = v.detach() - 0.05 * gradient.sign()  # Adam's first step
    optimizer.step()
    assert layer.radius.item() == pytest.approx(math.tanh(expected.norm().item() / 2), rel=1e-5)
    assert layer.angle.item() == pytest.approx(math.atan2(expected[1], expected[0]), rel=1e-5)


def test_riemannian_steps_cover_the_distance_lr_along_the_gradient() -> None:
    from rbe import disk

    radius, angle, g = 0.7, -1.2, (0.3, 0.5)
    layer = layer_with_gradient("packed128", radius, angle, g)
    HybridAdam(layer, lr=0.05, method="riemannian", eps=0.0).step()
    x, y = (disk.to_cartesian(torch.tensor(r), torch.tensor(a)).double() for r, a in
            ((radius, angle), (layer.radius.item(), layer.angle.item())))  # fmt: skip
    # The first step of Adam with one second moment a point has length lr, here measured by the metric.
    assert disk.distance(x, y).item() == pytest.approx(0.05, rel=1e-3)
    outward, around = -g[0], -g[1] / radius
    slope = torch.tensor([outward * math.cos(angle) - around * math.sin(angle),
                          outward * math.sin(angle) + around * math.cos(angle)])  # fmt: skip
    start = disk.log(x, y).float()
    assert torch.allclose(start / start.norm(), slope / slope.norm(), atol=1e-3)


def test_polar_steps_are_those_of_adam_itself() -> None:
    layer = layer_with_gradient("packed128", 0.5, 0.3, (0.2, -0.9))
    other = copy.deepcopy(layer)
    other.radius.grad, other.angle.grad = layer.radius.grad.clone(), layer.angle.grad.clone()
    adam = torch.optim.Adam([other.radius, other.angle], 0.01)
    optimizer = HybridAdam(layer, lr=0.01, method="polar")
    for _ in range(3):
        adam.step()
        optimizer.step()
        for mine, theirs in ((layer.radius, other.radius), (layer.angle, other.angle)):
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_everything_else_moves_as_in_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(16, 16, format="packed128"), nn.Linear(16, 3))
    other = copy.deepcopy(model)
    x = torch.randn(4, 16)
    adam = torch.optim.AdamW(other[1].parameters(), 0.02, weight_decay=0.1)
    optimizer = HybridAdam(model, lr=0.0, dense_lr=0.02, weight_decay=0.1)
    for _ in range(4):
        with torch.no_grad():  # the seeds' own scale and bias are dense parameters too: keep them alike
            for name in ("scale", "bias"):
                getattr(other[0], name).copy_(getattr(model[0], name))
        for net, how in ((model, optimizer), (other, adam)):
            net.zero_grad()
            net(x).square().sum().backward()
            how.step()
    assert torch.allclose(model[1].weight, other[1].weight, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_method_learns_and_stays_in_the_disk(format: str, method: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(128, 32)
    wanted = Linear(32, 32, False, format=format)(x).detach()
    layer = Linear(32, 32, False, format=format)
    optimizer = HybridAdam(layer, lr=0.02, method=method, pull=1e-4, clip_norm=10.0)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert ((layer.radius >= 0) & (layer.radius < 1)).all()
    optimizer.freeze()
    assert not layer.trainable


def test_the_pull_is_the_derivative_of_artanh_squared() -> None:
    layer = layer_with_gradient("packed128", 0.9, 0.0, (0.0, 0.0))
    optimizer = HybridAdam(layer, lr=1.0, method="polar", pull=0.01)
    optimizer.step()
    r = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    (0.01 * torch.atanh(r).square()).backward()
    assert optimizer.state[layer.radius]["mean"][0, 0, 0].item() == pytest.approx(0.1 * r.grad.item(), rel=1e-5)


def test_clipping_shortens_all_seeds_together() -> None:
    layer = layer_with_gradient("packed128", 0.5, 0.3, (3.0, 4.0))
    optimizer = HybridAdam(layer, lr=0.01, method="polar", clip_norm=0.5)
    optimizer.step()
    assert optimizer.state[layer.radius]["mean"].norm().item() == pytest.approx(0.1 * 0.5, rel=1e-5)


def test_the_pull_is_clipped_with_the_rest() -> None:
    layer = layer_with_gradient("packed128", 0.99, 0.0, (3.0, 4.0))
    optimizer = HybridAdam(layer, lr=0.01, method="polar", pull=0.01, clip_norm=0.5)
    optimizer.step()
    state = optimizer.state[layer.radius]
    assert state["mean"].norm().item() == pytest.approx(0.1 * 0.5, rel=1e-5)
    # What does not move is not pulled.
    layer = layer_with_gradient("packed128", 0.99, 0.0, (0.0, 0.3))
    layer.radius.grad = None
    optimizer = HybridAdam(layer, lr=0.01, method="polar", pull=1e3, clip_norm=100.0)
    assert optimizer._clipping() == 1.0


def test_angles_keep_to_their_period() -> None:
    layer = layer_with_gradient("packed128", 0.5, 31.4, (0.0, -1.0))
    HybridAdam(layer, lr=0.1, method="polar", eps=0.0).step()
    assert layer.angle.item() == pytest.approx(31.5 - 20 * math.pi, abs=1e-4)  # Adam's first step is lr


def test_signs_held_stay_and_are_the_most_certain() -> None:
    torch.manual_seed(10)
    model = nn.Sequential(Linear(32, 32, format="outer128"), nn.Tanh(), Linear(32, 16, format="outer128"))
    x, y = torch.randn(64, 32), torch.randn(64, 16)
    optimizer = HybridAdam(model, lr=0.05)

    def closure() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
            optimizer.flip(closure, share=1.0, temperature=10.0, tolerance=1.0)

    steps(3)
    assert optimizer.hold(0.5) == sum(m.latent.numel() // 2 for m in (model[0], model[2]))
    held = [optimizer.state[m.latent]["free"] == 0 for m in (model[0], model[2])]
    before = [m.latent.detach().clone() for m in (model[0], model[2])]
    for mark, latent in zip(held, before, strict=True):
        assert latent.abs()[mark].min() >= latent.abs()[~mark].max()
    steps(5)
    for mark, latent, module in zip(held, before, (model[0], model[2]), strict=True):
        assert torch.equal(module.latent[mark], latent[mark])
        assert (module.latent[~mark] != latent[~mark]).any()
    optimizer.hold(0.75)
    for mark, module in zip(held, (model[0], model[2]), strict=True):
        assert (optimizer.state[module.latent]["free"][mark] == 0).all()
    optimizer.hold(1.0)
    before = [m.latent.detach().clone() for m in (model[0], model[2])]
    steps(2)
    assert all(torch.equal(a, m.latent) for a, m in zip(before, (model[0], model[2]), strict=True))
    optimizer.hold(0.0)
    steps(2)
    assert all((a != m.latent).any() for a, m in zip(before, (model[0], model[2]), strict=True))


def test_a_smaller_share_lets_go_of_the_least_certain() -> None:
    layer = Linear(64, 64, False, format="outer128")
    optimizer = HybridAdam(layer)
    optimizer.hold(0.5)
    count = optimizer.hold(0.25)
    held, certain = optimizer.state[layer.latent]["free"] == 0, layer.latent.detach().abs()
    assert int(held.sum()) == count
    assert certain[held].min() >= certain[~held].max()


@pytest.mark.parametrize("method", METHODS)
def test_half_of_a_point_can_be_fixed(method: str) -> None:
    for fixed, moving in (("angle", "radius"), ("radius", "angle")):
        layer = Linear(16, 16, False, format="packed128")
        getattr(layer, fixed).requires_grad_(False)
        before = {name: getattr(layer, name).detach().clone() for name in (fixed, moving)}
        optimizer = HybridAdam(layer, method=method)
        layer(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        assert torch.equal(getattr(layer, fixed), before[fixed])
        assert not torch.equal(getattr(layer, moving), before[moving])


def test_a_latent_of_zero_can_turn() -> None:
    layer = Linear(16, 16, False, format="outer128")
    with torch.no_grad():
        layer.latent.zero_()
    code = torch.full_like(layer.read_code(), 0x0123_4567_89AB_CDEF)
    layer.write_code(code)
    assert torch.equal(layer.read_code(), code)


def test_components_are_clipped_instead_of_the_norm() -> None:
    layer = layer_with_gradient("packed128", 0.5, 0.3, (3.0, -0.04))
    optimizer = HybridAdam(layer, lr=0.01, method="polar", clip_value=0.1)
    optimizer.step()
    assert optimizer.state[layer.radius]["mean"].flatten().tolist() == pytest.approx([0.1 * 0.1, 0.1 * -0.04], rel=1e-5)


def test_modules_side_by_side_move_as_each_alone() -> None:
    """Points of all layers take one step together, of layers with fewer gradients so far too."""
    torch.manual_seed(11)
    both = nn.ModuleList([Linear(16, 32, False, format="packed128"), Linear(32, 16, False, format="outer128"),
                          Linear(16, 16, False, format="packed128")])  # fmt: skip
    alone = copy.deepcopy(both)
    together, single = HybridAdam(both, lr=0.05), [HybridAdam(m, lr=0.05) for m in alone]
    for step in range(4):
        for a, b in zip(both, alone, strict=True):
            a.radius.grad, a.angle.grad = torch.randn_like(a.radius), torch.randn_like(a.angle)
            b.radius.grad, b.angle.grad = a.radius.grad.clone(), a.angle.grad.clone()
        if step == 1:
            both[2].radius.grad = both[2].angle.grad = alone[2].radius.grad = alone[2].angle.grad = None
        together.step()
        for one in single:
            one.step()
    for a, b in zip(both, alone, strict=True):
        assert torch.equal(a.radius, b.radius)
        assert torch.equal(a.angle, b.angle)


def test_a_reward_for_variety_spreads_the_quadrants() -> None:
    torch.manual_seed(4)
    layer = Linear(64, 64, False, format="packed128")
    parts = packed128.fields(layer.read_code())
    layer.write_code(packed128.code_of(**{**parts, "quadrant": torch.zeros_like(parts["quadrant"])}))
    optimizer = HybridAdam(layer)
    x = torch.randn(8, 64)

    def loss() -> Tensor:
        return 1e-3 * layer(x).square().mean()

    first, least = loss().item(), total_entropy(layer)
    for _ in range(5):
        outcome = optimizer.flip(loss, share=0.5, fields=("quadrant",), variety=100.0)
        assert outcome.after <= outcome.before
        assert outcome.after == pytest.approx(loss().item() - 100 * total_entropy(layer), rel=1e-5)
    assert len(packed128.fields(layer.read_code())["quadrant"].unique()) >= 3
    assert total_entropy(layer) > least
    assert loss().item() > first  # the reward was worth some loss


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"lr": math.nan}, {"method": "spiral"}, {"betas": (0.9, 1.0)}, {"latent_limit": 0.0},
     {"clip_norm": 0.0}, {"pull": -1.0}, {"clip_value": 0.0}, {"clip_norm": 1.0, "clip_value": 0.1}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(RbeError, match="HybridAdam"):
        HybridAdam(Linear(16, 16, format="packed128"), **wrong)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(RbeError, match="no parameters"):
        HybridAdam(Linear(16, 16, False, format="packed128").freeze())
    model = nn.Sequential(Linear(16, 16, format="packed64"))
    with pytest.raises(RbeError, match="no open layer has discrete bits"):
        HybridAdam(model).flip(lambda: model(torch.ones(1, 16)).sum())
    layer = Linear(16, 16, format="packed128")
    with pytest.raises(RbeError, match="fields"):
        HybridAdam(layer).flip(lambda: layer(torch.ones(1, 16)).sum(), fields=("colour",))
    with pytest.raises(RbeError, match="fields"):
        HybridAdam(layer).beam(lambda: layer(torch.ones(1, 16)).sum(), fields=("colour",), share=1.0)
    with pytest.raises(RbeError, match="width"):
        HybridAdam(layer).beam(lambda: layer(torch.ones(1, 16)).sum(), width=0)
    signs = Linear(16, 16, format="outer128")
    with pytest.raises(RbeError, match="packed128"):
        HybridAdam(signs).beam(lambda: signs(torch.ones(1, 16)).sum())
    with pytest.raises(RbeError, match=r"share is 1\.5"):
        HybridAdam(signs).hold(1.5)
    with pytest.raises(RbeError, match="no open layer has latents"):
        HybridAdam(layer).hold(0.5)
    with pytest.raises(RbeError, match="no open layer has the quadrants"):
        HybridAdam(signs).flip(lambda: signs(torch.ones(1, 16)).sum(), variety=1.0)
    with pytest.raises(RbeError, match=r"share is 0\.0"):
        HybridAdam(layer).flip(lambda: layer(torch.ones(1, 16)).sum(), share=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_point_at_the_origin_moves_and_stays_a_number(method: str) -> None:
    """At r = 0 an angle has no derivative, and no division by the length of its vector may happen."""
    layer = layer_with_gradient("outer128", 0.0, 0.0, (-1.0, 0.0))
    HybridAdam(layer, lr=0.1, method=method).step()
    assert torch.isfinite(layer.radius).all()
    assert torch.isfinite(layer.angle).all()
    assert (layer.radius > 0).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_scale_moves_by_its_logarithm(size: float) -> None:
    layer = Linear(16, 16, bias=False, format="outer128")
    with torch.no_grad():
        layer.scale.fill_(size)
    optimizer = HybridAdam(layer, lr=0.01)
    layer.scale.grad = torch.tensor(5.0)
    optimizer.step()
    assert layer.scale.item() == pytest.approx(size * math.exp(-0.01), rel=1e-5)


@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_clipping_is_of_the_norm_over_latents_angles_and_the_radii_that_train(pull: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(16, 32, format="outer128", block=8), Linear(32, 16, format="outer128", block=8))
    model[1].radius.requires_grad_(False)
    model(torch.randn(4, 16)).square().sum().backward()
    assert model[1].radius.grad is None
    optimizer = HybridAdam(model, clip_norm=0.01, pull=pull, betas=(0.0, 0.999))
    r = model[0].radius.detach().double()
    parts = [m.latent.grad.double() for m in model] + [m.angle.grad.double() for m in model]
    parts.append(model[0].radius.grad.double() + 2 * pull * r.atanh() / (1 - r * r))
    norm = torch.cat([part.flatten() for part in parts]).norm()
    optimizer.step()
    for layer in model:
        mean = optimizer.state[layer.latent]["mean"]
        torch.testing.assert_close(mean, layer.latent.grad * float(0.01 / norm), rtol=1e-4, atol=0.0)
