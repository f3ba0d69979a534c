"""`HybridAdam` turning discrete bits: flips by the rule of state transitions and beams, accepted on the real loss."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rbe.formats import make_spec, outer128, packed128
from rbe.nn import Linear
from rbe.optim import HybridAdam, transitions
from rbe.optim.transitions import neighbours
from rbe.search.blocks import cut

FORMATS = ["packed64", "packed128", "outer128"]


def planted(format: str) -> tuple[Linear, Callable[..., Tensor], Tensor]:
    """A layer that differs from its teacher in some bits only; the closure takes other inputs too."""
    torch.manual_seed(3)
    teacher = Linear(48, 48, False, format=format)
    student = copy.deepcopy(teacher)
    code = teacher.read_code().clone()
    masks = neighbours(teacher.spec, ("quadrant", "geo_amp"))
    wrong = torch.arange(len(code)) % 2 == 0
    code[wrong, 0] ^= masks[-1 if format == "packed128" else 5]
    student.write_code(code)
    x = torch.randn(512, 48)
    return student, lambda x=x: (student(x) - teacher(x).detach()).square().mean(), teacher.read_code()


@pytest.mark.parametrize("format", ["packed128", "outer128"])
def test_flips_recover_planted_bits(format: str) -> None:
    student, closure, right = planted(format)
    optimizer = HybridAdam(student, seed=1)
    assert (student.read_code() != right).any()
    losses, fresh = [closure().item()], torch.randn(512, 48)
    true_loss = closure(fresh).item()
    for _ in range(40):
        outcome = optimizer.flip(closure, share=0.5, temperature=0.05)
        assert outcome.after <= outcome.before
        assert closure().item() == pytest.approx(outcome.after, rel=1e-5, abs=1e-9)
        losses.append(outcome.after)
    assert losses[-1] < 0.1 * losses[0]
    assert closure(fresh).item() < 0.1 * true_loss  # on inputs that no flip has seen
    if format == "outer128":  # of packed128, several codes make the same block or nearly so
        assert torch.equal(student.read_code(), right)


@pytest.mark.parametrize("format", ["packed128", "outer128"])
def test_adam_starts_anew_where_a_code_changed(format: str) -> None:
    student, closure, _ = planted(format)
    optimizer = HybridAdam(student, lr=1e-3, method="polar", seed=1)
    for _ in range(300):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    before = student.read_code().clone()
    assert optimizer.flip(closure, share=0.5, temperature=0.05, tolerance=1.0).accepted
    changed = student.read_code() != before
    state = optimizer.state[student.radius]
    assert not state["mean"][changed].any()
    assert state["mean"][~changed].any()
    if format == "outer128":
        assert not optimizer.state[student.latent]["mean"][changed].any()
    # The first step after that is that of a fresh optimizer: the rate, against the gradient.
    radius = student.radius.detach().clone()
    optimizer.zero_grad()
    student.radius.grad, student.angle.grad = torch.ones_like(radius), torch.ones_like(radius)
    optimizer.step()
    inside = changed & (radius > 0.01)  # where the rim and the origin do not stop it
    torch.testing.assert_close(
        (radius - student.radius)[inside], torch.full_like(radius, 1e-3)[inside], rtol=1e-2, atol=0
    )


def test_an_interrupted_trial_leaves_no_bits_behind() -> None:
    student, closure, _ = planted("outer128")
    before, calls = student.read_code().clone(), 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        HybridAdam(student, seed=1).flip(interrupted, share=1.0)
    assert torch.equal(student.read_code(), before)


def test_bits_of_padded_rows_are_forecast_to_change_nothing() -> None:
    layer = Linear(16, 4, False, format="outer128", block=16)
    masks = neighbours(layer.spec, ())
    gradient = cut(torch.randn(4, 16), layer.spec)
    scores = transitions._scores(layer, torch.tensor([0]), gradient, masks)[0]
    code = layer.read_code()
    same = [
        torch.equal(outer128.values(code ^ m, layer.radius, layer.angle, layer.spec)[0, :4], now)
        for now in [outer128.values(code, layer.radius, layer.angle, layer.spec)[0, :4]]
        for m in masks
    ]
    assert sum(same) == 24  # 12 of 16 rows, of two terms
    assert not scores[torch.tensor(same)].any()
    assert (scores[~torch.tensor(same)] != 0).all()


def test_a_beam_changes_several_bits_at_once_where_single_ones_are_refused() -> None:
    """Planted: four bits of every amplitude are wrong, and some single ones are right only together."""
    torch.manual_seed(5)
    teacher = Linear(48, 48, False, format="packed128")
    parts = packed128.fields(teacher.read_code())
    amplitudes = torch.full_like(parts["geo_amp"], 3000)
    teacher.write_code(packed128.code_of(**{**parts, "geo_amp": amplitudes}))
    student = copy.deepcopy(teacher)
    student.write_code(packed128.code_of(**{**parts, "geo_amp": amplitudes ^ 0b11110000}))
    x = torch.randn(512, 48)
    wanted = teacher(x).detach()

    def closure() -> Tensor:
        return (student(x) - wanted).square().mean()

    optimizer = HybridAdam(student)
    before = student.read_code().clone()
    losses = [closure().item()]
    for _ in range(20):
        outcome = optimizer.beam(closure, share=1.0)
        assert outcome.accepted <= outcome.proposed
        assert outcome.after <= outcome.before == pytest.approx(losses[-1], rel=1e-5)
        assert closure().item() == pytest.approx(outcome.after, rel=1e-5, abs=1e-12)
        losses.append(outcome.after)
    turned = before ^ student.read_code()
    assert max(bin(word & (1 << 64) - 1).count("1") for word in turned.flatten().tolist()) > 1
    assert losses[-1] < 0.02 * losses[0]


def test_the_beam_looks_for_the_block_that_the_forecast_names() -> None:
    """Of all codes within two bits of the old one, by brute force, none has a better forecast."""
    torch.manual_seed(6)
    layer = Linear(16, 16, False, format="packed128")
    x, wanted = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = HybridAdam(layer)
    names = ("quadrant", "geo_amp")
    weight = layer.dense().detach().requires_grad_()
    (nn.functional.linear(x, weight) - wanted).square().mean().backward()
    scale = layer.scale.item()
    gradient = weight.grad.double() * scale  # by the unscaled weights
    old = layer.read_code().clone()
    point = layer.radius.detach().double(), layer.angle.detach().double()

    def made(code: Tensor) -> Tensor:
        return packed128.values(code, *point, layer.spec)[0]

    now = made(old)
    h = gradient.norm() / now.norm()

    def forecast(code: Tensor) -> float:
        change = made(code) - now
        return ((gradient * change).sum() + h / 2 * change.square().sum()).item()

    masks = neighbours(layer.spec, names)
    every = {int(old ^ a ^ b) for a in masks for b in masks} | {int(old ^ a) for a in masks}
    best = min(forecast(torch.tensor([[code]])) for code in every)
    optimizer.beam(
        lambda: (layer(x) - wanted).square().mean(), share=1.0, width=99, rounds=2, fields=names, tolerance=1e9
    )
    assert forecast(layer.read_code()) == pytest.approx(best, rel=1e-6)
    assert best < 0


def test_a_tolerance_is_spent_once() -> None:
    """However many parts are accepted, the loss is at most so much worse."""
    torch.manual_seed(7)
    layer = Linear(64, 64, False, format="packed128")
    x = torch.randn(64, 64)
    wanted = layer(x).detach()
    optimizer = HybridAdam(layer)
    for _ in range(10):
        outcome = optimizer.flip(
            lambda: (layer(x) - wanted).square().mean() + 0.0 * layer.scale,
            share=0.5,
            temperature=100.0,
            tolerance=0.05,
        )
        assert outcome.after <= outcome.before + 0.05
    assert outcome.after > 0


@pytest.mark.parametrize("how", ["flip", "beam"])
def test_trials_leave_running_statistics_and_dropout_alone(how: str) -> None:
    torch.manual_seed(8)
    model = nn.Sequential(Linear(32, 32, format="packed128"), nn.BatchNorm1d(32), nn.Dropout(0.5))
    x = torch.randn(64, 32)
    before = {name: value.clone() for name, value in model[1].named_buffers()}
    optimizer = HybridAdam(model)
    seen: list[float] = []

    def closure() -> Tensor:
        out = model(x)
        seen.append(float((out == 0).double().mean()))
        return (out - 1).square().mean()

    outcome = getattr(optimizer, how)(closure, share=1.0)
    assert len(seen) > 1 and len(set(seen)) == 1  # the same units are dropped in every trial
    assert outcome.after <= outcome.before
    for name, value in model[1].named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("how", ["step", "flip", "beam"])
def test_micro_batches_are_as_good_as_the_whole_batch(how: str) -> None:
    """Gradients summed over parts, and a closure that sums over parts, do what the whole batch does."""
    x, y = torch.randn(64, 16), torch.randn(64, 8)

    def after(parts: int) -> dict[str, Tensor]:
        torch.manual_seed(9)
        model = nn.Sequential(Linear(16, 32, format="packed128"), nn.Tanh(), Linear(32, 8, format="packed128"))
        optimizer = HybridAdam(model, clip_norm=0.1)

        def closure() -> Tensor:
            losses = [nn.functional.mse_loss(model(a), b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]
            return torch.stack(losses).mean()

        for _ in range(2):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.mse_loss(model(a), b) / parts).backward()
                if how != "step" and parts == 1:
                    break
            optimizer.step()
            if how == "flip":
                optimizer.flip(closure, share=0.5)
            if how == "beam":
                optimizer.beam(closure, share=0.5, width=4, rounds=2)
        return model.state_dict()

    whole, parts = after(1), after(4)
    for name, value in whole.items():
        if value.dtype == torch.int64:
            assert torch.equal(value, parts[name]), name
        else:
            torch.testing.assert_close(value, parts[name], rtol=1e-4, atol=1e-5)


def test_gradients_summed_so_far_survive_a_change_of_bits() -> None:
    student, closure, _ = planted("packed128")
    optimizer = HybridAdam(student)
    closure().backward()
    kept = student.radius.grad
    value = kept.clone()
    assert optimizer.beam(closure, share=0.5).accepted > 0
    assert optimizer.flip(closure, share=0.5).proposed > 0
    assert student.radius.grad is kept
    assert torch.equal(kept, value)


def test_refused_flips_leave_everything_as_it_was() -> None:
    student, _, right = planted("packed128")
    student.write_code(right)
    x = torch.randn(64, 48)
    wanted = student(x).detach()
    optimizer = HybridAdam(student)
    student.radius.grad = torch.ones_like(student.radius)

    def closure() -> Tensor:  # the loss is as low as it gets
        return (student(x) - wanted).square().mean() + 0.0 * student.scale

    outcome = optimizer.flip(closure, share=1.0)
    assert outcome.accepted == 0
    assert torch.equal(student.read_code(), right)
    assert torch.equal(student.radius.grad, torch.ones_like(student.radius))
    assert student._listener is None


def test_moments_start_anew_where_a_code_changed() -> None:
    student, closure, _ = planted("packed128")
    optimizer = HybridAdam(student, lr=1e-6)
    closure().backward()
    optimizer.step()
    before = student.read_code().clone()
    optimizer.flip(closure, share=0.5, temperature=0.05)
    moved = (student.read_code() != before)[:, 0]
    mean = optimizer.state[student.radius]["mean"]
    assert moved.any()
    assert (mean[moved] == 0).all()
    assert (mean[~moved] != 0).any()


def test_neighbours_are_the_bits_of_the_fields() -> None:
    spec = make_spec("packed128", (16, 16))
    assert len(neighbours(spec, ("quadrant", "hyp_freq", "geo_amp"))) == 26
    assert len(neighbours(spec, ("cordic_seq",))) == packed128.STEPS
    one = torch.zeros(1, dtype=torch.int64)
    turned = [packed128.fields(one ^ m)["basis_sel"].item() for m in neighbours(spec, ("basis_sel",))]
    assert turned == [1, 2, 4, 8, 16, 32]
    small = make_spec("outer128", (8, 8), block=8)
    for mask in neighbours(small, ()):
        changed = outer128.sign_bits(one ^ mask, small) != outer128.sign_bits(one, small)
        u, v = outer128.vectors(changed.float(), small)
        assert u.sum() + v.sum() == 1
