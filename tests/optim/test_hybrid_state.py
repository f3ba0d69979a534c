"""HybridAdam: exact resumption, states of other models, two processes, layouts of memory, copies."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn import Linear
from rbe.optim import HybridAdam
from rbe.optim.motion import METHODS, Method


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
