"""HybridAdam: each way of moving points against its formula, bits by transitions, exact resumption, two processes."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.nn import Linear
from rbe.optim import HybridAdam, total_entropy
from rbe.optim.motion import METHODS, Method

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


def train(model: nn.Module, optimizer: HybridAdam, x: Tensor, y: Tensor, steps: range) -> None:
    for step in steps:
        batch = slice(16 * (step % 4), 16 * (step % 4) + 16)

        def closure(part: slice = batch) -> Tensor:
            return nn.functional.mse_loss(model(x[part]), y[part])

        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        if step % 3 == 2:
            optimizer.flip(closure, share=0.5)
        if step % 4 == 1:
            optimizer.beam(closure, share=0.5, width=4, rounds=2)
        if step == 5:
            optimizer.hold(0.5)


def two_layers() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(Linear(16, 32, format="packed128"), nn.Tanh(), Linear(32, 8, format="outer128", block=8))


def test_angles_keep_to_their_period() -> None:
    layer = layer_with_gradient("packed128", 0.5, 31.4, (0.0, -1.0))
    HybridAdam(layer, lr=0.1, method="polar", eps=0.0).step()
    assert layer.angle.item() == pytest.approx(31.5 - 20 * math.pi, abs=1e-4)  # Adam's first step is lr


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_bit_for_bit(method: Method) -> None:
    x, y = torch.randn(64, 16), torch.randn(64, 8)
    whole = two_layers()
    train(whole, HybridAdam(whole, method=method), x, y, range(12))
    model = two_layers()
    optimizer = HybridAdam(model, method=method)
    train(model, optimizer, x, y, range(7))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = two_layers()
    model.load_state_dict(saved["model"])
    optimizer = HybridAdam(model, method=method)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, x, y, range(7, 12))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_moments_take_the_memory_layout_of_their_parameters() -> None:
    def model() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3)

    plain, last = model(), model().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    first, second = HybridAdam(plain), HybridAdam(last)
    for k in range(6):
        for one, optimizer in ((plain, first), (last, second))[: 1 if k < 3 else 2]:
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        if k == 2:
            last.load_state_dict(plain.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(plain.weight, last.weight)


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


def _steps(optimizer: HybridAdam, forward: nn.Module, x: Tensor, y: Tensor) -> None:
    for step in range(6):

        def closure() -> Tensor:
            return nn.functional.mse_loss(forward(x), y)

        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        if step % 3 == 2:
            optimizer.flip(closure, share=0.5)
            optimizer.beam(closure, share=0.5, width=4, rounds=2)
            # With the gradients of before the bits changed.
            optimizer.step()


def _problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(64, 16, generator=g), torch.randn(64, 8, generator=g)


def _worker(rank: int, folder: str, views: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = two_layers()
    spread = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    x, y = (part[32 * rank : 32 * rank + 32] for part in _problem())
    _steps(HybridAdam(model), spread, x, y)
    torch.save(model.state_dict(), f"{folder}/state{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("views", [False, True])
def test_two_processes_agree_bit_for_bit(tmp_path: Path, views: bool) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path), views), nprocs=2)
    one, two = (torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    # And with one process that has the whole batch, as nearly as sums in another order can.
    model = two_layers()
    _steps(HybridAdam(model), model, *_problem())
    for name, value in model.state_dict().items():
        if value.dtype == torch.int64:
            assert torch.equal(value, one[name]), name
        else:
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)


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


def three(out: int = 9, format: str = "outer128") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(16, 16, format=format, block=8), nn.Tanh(), Linear(16, out, format=format, block=8))


def stepped(model: nn.Module, **settings: Any) -> HybridAdam:
    optimizer = HybridAdam(model, **settings)
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_the_state_of_another_model_or_optimizer_is_refused_before_anything_changes() -> None:
    model = three(16)
    optimizer = stepped(model)
    optimizer.flip(lambda: model(torch.ones(2, 16)).square().sum(), share=1.0)
    before = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam(three(16).parameters()).state_dict()
    wrong = [
        (stepped(three(9)).state_dict(), r"mean of a parameter \(16,\) is \(9,\)"),
        (stepped(three(16, "packed128")).state_dict(), "groups"),
        (stepped(three(16), method="riemannian").state_dict(), "another model or method"),
        (stepped(three(16), method="polar").state_dict(), "of method polar, here it is tangent"),
        (plain, "groups"),
        ({"param_groups": before["param_groups"], "state": before["state"]}, "no draws"),
        ({"state": {}}, "no state of it"),
    ]
    for state, message in wrong:
        with pytest.raises(RbeError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert torch.equal(after["generator"], before["generator"])
    for index, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][name]))
                   for name, value in state.items())  # fmt: skip
    again = HybridAdam(three(16))
    again.load_state_dict(before)
    with pytest.raises(RbeError, match="cannot be added"):
        optimizer.add_param_group({"role": "dense", "params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced", "turned later"])
def test_gradients_and_parameters_of_any_layout_take_the_same_steps(how: str) -> None:
    torch.manual_seed(0)
    grads = torch.randn(3, 6, 4, 2, 2)
    plain, other = nn.Conv2d(4, 6, 2, bias=False), nn.Conv2d(4, 6, 2, bias=False)
    other.load_state_dict(plain.state_dict())
    if how == "sliced":
        other.weight = nn.Parameter(torch.cat([plain.weight.detach()] * 2, 3)[..., :2])
        assert not other.weight.is_contiguous()
    optimizers = [HybridAdam(plain, lr=0.01), HybridAdam(other, lr=0.01)]
    for k, grad in enumerate(grads):
        grad = grad[:1, :1, :1, :1].expand_as(grad) if how == "expanded" else grad
        plain.weight.grad = grad.contiguous()
        other.weight.grad = grad.transpose(0, 3).contiguous().transpose(0, 3) if how == "transposed" else grad
        if how == "turned later" and k == 1:
            other.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(other.weight, plain.weight)


def test_copies_of_model_and_optimizer_go_on_alike() -> None:
    model = three()
    optimizer = stepped(model)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer)), torch.load(file, weights_only=False)]
    for one, its in pairs:
        its.zero_grad()
        loss = one(torch.ones(2, 16)).sum()
        loss.backward()
        its.step()
        its.flip(lambda one=one: one(torch.ones(2, 16)).square().sum(), share=1.0)
    for one, _ in pairs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), one.parameters(), strict=True))
