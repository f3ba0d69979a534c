"""`FeedForward` and the activations by name."""

import pytest
import torch
from layer_cases import EVERY, close
from torch import nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn.feedforward import ACTIVATIONS, named_activation

TORCHS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
}


def test_every_name_is_torchs_function() -> None:
    x = torch.linspace(-8, 8, 65)
    assert set(TORCHS) == set(ACTIVATIONS)
    for name, module in TORCHS.items():
        assert torch.equal(named_activation(name)(x), module(x)), name


def test_hardswish_has_no_jump() -> None:
    """002 prints (x + 3) / 6 for the middle piece, which is 1 just below 3, and 3 there."""
    x = torch.tensor([-3.0, 2.999, 3.0])
    assert torch.allclose(named_activation("hardswish")(x), torch.tensor([0.0, 2.999 * 5.999 / 6, 3.0]))


@pytest.mark.parametrize("format", EVERY)
def test_it_equals_torchs_layers(format: str) -> None:
    torch.manual_seed(0)
    layer = rbe.nn.FeedForward(6, 10, "gelu", **EVERY[format])
    dense = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    for mine, theirs in ((layer.linear1, dense[0]), (layer.linear2, dense[2])):
        theirs.load_state_dict({"weight": mine.weight, "bias": mine.bias})
    x = torch.randn(2, 3, 6, requires_grad=True)
    y, expected = layer(x), dense(x)
    g = torch.randn_like(y)
    assert close(y, expected)
    assert close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0], 1e-4)


def test_bytes_of_the_paper() -> None:
    """000 section 5.5.2: four seeds."""
    layer = rbe.nn.FeedForward(768, 3072, bias="seed", format="packed64", block=None)
    assert rbe.nn.count(layer).seed_bytes == 4 * 8
    assert rbe.nn.count(layer).whole_bytes == 4 * (8 + 4)


def test_dropout_is_for_training() -> None:
    layer = rbe.nn.FeedForward(6, 64, dropout=0.5, format="packed128", block=4)
    x = torch.randn(3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(RbeError, match="'swish' is not offered; choose one of gelu"):
        rbe.nn.FeedForward(6, 10, "swish")
    with pytest.raises(RbeError, match=r"\(2, 7\)"):
        rbe.nn.FeedForward(6, 10)(torch.randn(2, 7))
