"""The regularisers against their printed formulas, in plain Python, with the entropy's sign put right."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.nn import Linear
from rbe.optim import HybridAdam, hyperbolic_penalty, state_entropy, total_entropy
from rbe.optim.penalties import entropy_changes


def printed_entropy(states: list[int]) -> float:
    shares = [count / len(states) for count in Counter(states).values()]
    return -sum(p * math.log(p) for p in shares)


def test_the_hyperbolic_penalty_is_the_printed_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(32, 16, format="packed128"), nn.Linear(16, 16), Linear(16, 16, format="packed64"))
    radii = [r for layer in (model[0], model[2]) for r in layer.radius.flatten().tolist()]
    wanted = sum(math.atanh(r) ** 2 for r in radii)
    assert hyperbolic_penalty(model).item() == pytest.approx(wanted, rel=1e-5)


def test_the_pull_of_the_optimizer_is_its_gradient() -> None:
    torch.manual_seed(1)
    layer = Linear(32, 32, False, format="packed128")
    (0.3 * hyperbolic_penalty(layer)).backward()
    wanted = layer.radius.grad.clone()
    layer.radius.grad, layer.angle.grad = torch.zeros_like(layer.radius), torch.zeros_like(layer.angle)
    optimizer = HybridAdam(layer, method="polar", pull=0.3, betas=(0.0, 0.0))
    optimizer.step()
    mean = optimizer.state[layer.radius]["mean"]
    torch.testing.assert_close(mean[..., 0], wanted, rtol=1e-4, atol=1e-6)
    assert (mean[..., 1] == 0).all()


def test_the_entropy_is_the_printed_one_and_each_change_of_it_exact() -> None:
    torch.manual_seed(2)
    layer = Linear(64, 96, False, format="packed128")
    code = layer.read_code()
    states = packed128.fields(code)["quadrant"].flatten().tolist()
    assert state_entropy(code) == pytest.approx(printed_entropy(states), rel=1e-12)
    table = entropy_changes(code)
    for a in range(4):
        for b in range(4):
            if a == b:
                assert table[a, b] == 0
                continue
            moved = list(states)
            moved[moved.index(a)] = b
            wanted = printed_entropy(moved) - printed_entropy(states)
            assert table[a, b].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert state_entropy(code[:1]) == 0.0
    both = nn.Sequential(layer, Linear(16, 16, format="packed128"), Linear(16, 16, format="outer128"))
    assert total_entropy(both) == pytest.approx(state_entropy(code) + 0.0)


def test_the_reward_for_variety_raises_the_entropy_and_a_fine_would_not() -> None:
    """Minimised is -lambda H: with nothing else to say, flips go to quadrants that are seldom."""
    torch.manual_seed(3)
    layer = Linear(64, 64, False, format="packed128")
    parts = packed128.fields(layer.read_code())
    rare = (torch.arange(16) % 8 == 0).long()[:, None]
    layer.write_code(packed128.code_of(**{**parts, "quadrant": rare}))
    before = total_entropy(layer)
    x = torch.randn(8, 64)
    optimizer = HybridAdam(layer)
    optimizer.flip(lambda: 1e-9 * layer(x).square().mean(), share=0.5, fields=("quadrant",), tolerance=1e9, variety=9.0)
    assert total_entropy(layer) > before


def test_a_model_without_points_has_no_penalty() -> None:
    with pytest.raises(RbeError, match="no open seeds"):
        hyperbolic_penalty(nn.Linear(2, 2))
