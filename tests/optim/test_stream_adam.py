"""Training of streams under a number of bytes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.formats import stream
from rbe.nn import Linear, Stream, StreamLinear
from rbe.nn.stream import streams
from rbe.optim import HybridAdam, StreamAdam
from rbe.optim.stream import price


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Twenty of a thousand inputs' products with the outputs matter."""
    torch.manual_seed(0)
    x, truth = torch.randn(400, 50), torch.zeros(20, 50)
    truth[torch.randint(0, 6, (20,)), torch.randint(0, 50, (20,))] = 1.0
    return StreamLinear(50, 20, spread=1.0), x, x @ truth.T


def run(model: nn.Module, optimizer: StreamAdam, x: Tensor, y: Tensor, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return functional.mse_loss(model(x), y).item()


def test_a_sparse_truth_is_found_within_its_bytes() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 60, 600, 3e-2, dense_lr=3e-3)
    run(model, optimizer, x, y, 600)
    assert optimizer.fit() <= 60
    assert functional.mse_loss(model(x), y).item() < 0.05 * float(y.square().mean())


def test_the_pressure_leads_to_the_bytes() -> None:
    model, x, _ = problem()
    y = 5 * torch.randn(400, 20)  # nothing is to be learned: every level would be wanted, a little
    optimizer = StreamAdam(model, 100, 400, 3e-2)
    run(model, optimizer, x, y, 400)
    assert 70 < optimizer.count() < 120


def test_a_tight_number_of_bytes_is_kept() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 20, 100, 3e-2)
    run(model, optimizer, x, y, 100)
    assert not optimizer.settle() or optimizer.count() <= 20
    assert optimizer.fit() <= 20


def test_every_group_keeps_to_bytes_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(StreamLinear(30, 40, spread=1.0), nn.ReLU(), StreamLinear(40, 30, spread=1.0))
    first, second = streams(model)
    optimizer = StreamAdam(model, [([first], 90), ([second], 20)], 100, 3e-2)
    run(model, optimizer, torch.randn(400, 30), torch.randn(400, 30), 100)
    assert optimizer.settle()
    assert 45 < len(first.pack()) <= 90
    assert 10 < len(second.pack()) <= 20
    assert optimizer.count() == len(first.pack()) + len(second.pack()) == optimizer.fit()


@pytest.mark.parametrize("grouped", [False, True])
def test_training_goes_on_exactly_where_it_stopped(grouped: bool) -> None:
    model, x, y = problem()
    if grouped:
        model = nn.Sequential(model, StreamLinear(20, 20))

    def budget(model: nn.Module) -> int | list[tuple[list[Stream], int]]:
        return [([layer], 60) for layer in streams(model)] if grouped else 60

    optimizer = StreamAdam(model, budget(model), 80)
    run(model, optimizer, x, y, 33)
    second = copy.deepcopy(model)
    resumed = StreamAdam(second, budget(second), 80)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, x, y, 47)
    run(second, resumed, x, y, 47)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_the_same_optimizer_goes_back_to_a_state_exactly() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 60, 4000)  # costs are of every tenth step
    run(model, optimizer, x, y, 12)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, x, y, 13)
    wanted = [p.clone() for p in model.parameters()]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, x, y, 13)
    assert all(torch.equal(a, b) for a, b in zip(wanted, model.parameters(), strict=True))


def test_a_stream_may_get_its_first_gradient_late() -> None:
    layers = nn.ModuleList([StreamLinear(20, 20), StreamLinear(20, 20)])
    optimizer, x = StreamAdam(layers, 200, 4000), torch.randn(30, 20)

    def steps(model: nn.ModuleList, optimizer: StreamAdam, used: range) -> None:
        for k in used:
            optimizer.zero_grad()
            y = model[0](x)
            (model[1](y) if k > 4 else y).square().mean().backward()
            optimizer.step()

    steps(layers, optimizer, range(7))
    second = copy.deepcopy(layers)
    resumed = StreamAdam(second, 200, 4000)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(layers, optimizer, range(7, 20))
    steps(second, resumed, range(7, 20))
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), second.parameters(), strict=True))


def test_gradients_are_as_backward_left_them() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 60, 600)
    functional.mse_loss(model(x), y).backward()
    grad = model.latent.grad
    value = grad.clone()
    for _ in range(2):
        optimizer.step()
    assert model.latent.grad is grad
    assert torch.equal(grad, value)


def test_the_state_of_another_model_or_optimizer_is_refused() -> None:
    model, x, y = problem()
    optimizer, other = StreamAdam(model, 60, 600), StreamLinear(50, 21)
    run(model, optimizer, x, y, 3)
    different = StreamAdam(other, 60, 600)
    other(x).sum().backward()
    different.step()
    plain = torch.optim.Adam(model.parameters()).state_dict()
    for state, message in ((different.state_dict(), "another model"), (plain, "groups"), ({}, "no state")):
        with pytest.raises(RbeError, match=message):
            optimizer.load_state_dict(state)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["pressure"]
    with pytest.raises(RbeError, match="another optimizer"):
        optimizer.load_state_dict(state)


def test_a_whole_run_as_the_documents_have_it() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 60, 40, 3e-2)
    run(model, optimizer, x, y, 40)
    assert optimizer.freeze() == len(model.seed) <= 60
    assert not model.trainable
    with pytest.raises(RbeError, match="StreamAdam"):
        HybridAdam(nn.Sequential(Linear(16, 16, format="outer128"), StreamLinear(16, 4)))


def test_copies_of_model_and_optimizer_go_on_alike() -> None:
    model, x, y = problem()
    optimizer = StreamAdam(model, 60, 600)
    run(model, optimizer, x, y, 3)
    twin, its = copy.deepcopy((model, optimizer))
    assert run(model, optimizer, x, y, 20) == run(twin, its, x, y, 20)
    assert its.fit() == optimizer.fit()
    assert torch.equal(model.latent, twin.latent)


def _steps(model: nn.Module, x: Tensor, y: Tensor, parts: int = 1, forward: nn.Module | None = None) -> None:
    optimizer = StreamAdam(model, 60, 40, 3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (functional.mse_loss((forward or model)(a), b) / parts).backward()
        optimizer.step()
    optimizer.fit()


def _alike(one: nn.Module, two: dict[str, Tensor]) -> None:
    """As nearly as sums in another order can: a rounding error turns few levels."""
    for name, value in one.state_dict().items():
        if value.is_floating_point():
            assert (value - two[name]).abs().mean() < 1e-3 * value.abs().mean(), name


def test_micro_batches_are_as_good_as_the_whole_batch() -> None:
    (whole, x, y), (parts, *_) = problem(), problem()
    _steps(whole, x, y)
    _steps(parts, x, y, parts=4)
    _alike(whole, parts.state_dict())


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, x, y = problem()
    spread = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    _steps(model, x.chunk(2)[rank], y.chunk(2)[rank], forward=spread)
    torch.save(model.state_dict(), f"{folder}/state{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_bit_for_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    model, x, y = problem()
    _steps(model, x, y)
    _alike(model, one)


def test_the_price_is_near_the_bits_of_the_stream() -> None:
    torch.manual_seed(0)
    latent = torch.randn(60, 200) * (torch.rand(60, 1) * torch.rand(200)) * 2
    bits, each = price(latent)
    assert 0.8 < 8 * len(stream.pack(latent.round().int())) / bits < 1.2
    # A level costs more where there are few.
    rows = latent.round().ne(0).sum(1)
    first = torch.where(latent.abs() < 1, each, torch.inf)
    assert first[rows.argmin()].min() > first[rows.argmax()].min()


def test_bad_numbers_and_models_are_refused() -> None:
    with pytest.raises(RbeError, match="bytes"):
        StreamAdam(StreamLinear(4, 4), 0, 10)
    with pytest.raises(RbeError, match="no open streams"):
        StreamAdam(nn.Linear(4, 4), 10, 10)
    model = nn.Sequential(StreamLinear(4, 4), StreamLinear(4, 4))
    first, second = streams(model)
    for parts in ([first], [first, first], [first, second, second]):
        with pytest.raises(RbeError, match="every open stream once"):
            StreamAdam(model, [(parts, 10)], 10)
