"""Layers of a stream against torch's own, in both states, and through files."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.nn import Stream, StreamConv2d, StreamLinear, count


def layers(bias: bool, corner: bool) -> list[tuple[Stream, torch.Tensor]]:
    torch.manual_seed(0)
    linear = StreamLinear(12, 6, bias, cells=4, spread=1.0, open_shape=(4, 8) if corner else None)
    conv = StreamConv2d(4, 6, 3, 2, 1, bias, spread=1.0, open_shape=(5, 18) if corner else None)
    made: list[tuple[Stream, torch.Tensor]] = [(linear, torch.randn(5, 12)), (conv, torch.randn(2, 4, 7, 7))]
    for layer, _ in made:
        nn.init.normal_(layer.latent)
    return made


def by_torch(layer: Stream, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    whole = layer.levels * scale
    weight, bias = (whole[:, :-1], whole[:, -1]) if layer.bias else (whole, None)
    if isinstance(layer, StreamConv2d):
        return functional.conv2d(x, weight.view(6, 4, 3, 3), bias, 2, 1)
    return functional.linear(x, weight, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("corner", [False, True])
def test_both_states_are_torchs_layer_of_the_levels(bias: bool, corner: bool) -> None:
    for layer, x in layers(bias, corner):
        open_output = layer(x)
        torch.testing.assert_close(open_output, by_torch(layer, x, layer.log_scale.exp()), atol=1e-5, rtol=1e-5)
        weight, levels = layer.weight, layer.levels
        layer.freeze()
        assert sorted(layer.state_dict()) == ["scale", "seed"]
        assert torch.equal(layer.levels, levels)
        torch.testing.assert_close(layer.weight, weight)
        torch.testing.assert_close(layer(x), open_output)


def test_gradients_pass_the_rounding_and_reach_the_scale() -> None:
    for layer, x in layers(bias=True, corner=False):
        weight = (layer.latent.detach().round() * layer.log_scale.detach().exp()).requires_grad_()
        layer(x).square().sum().backward()
        if isinstance(layer, StreamConv2d):
            y = functional.conv2d(x, weight[:, :-1].view(6, 4, 3, 3), weight[:, -1], 2, 1)
        else:
            y = functional.linear(x, weight[:, :-1], weight[:, -1])
        y.square().sum().backward()
        assert weight.grad is not None
        scale = layer.log_scale.exp()
        torch.testing.assert_close(layer.latent.grad, weight.grad * scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.log_scale.grad, (weight.grad * weight).sum(), rtol=1e-4, atol=1e-3)


def test_a_slim_layer_leaves_out_what_is_always_zero() -> None:
    first = StreamLinear(8, 6, spread=1.0, open_shape=(3, 8))
    second = StreamLinear(6, 2, spread=1.0, open_shape=(2, 3))
    x = torch.randn(4, 8)
    whole = second(first(x).relu())
    first.slim = True
    assert first(x).shape == (4, 3)
    torch.testing.assert_close(second(first(x).relu()), whole)


def test_frozen_layers_go_through_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(StreamConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), StreamLinear(36, 3, cells=9))
    x = torch.randn(2, 1, 5, 5)
    expected = model(x)
    for module in model.modules():
        if isinstance(module, Stream):
            module.freeze()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(1)
    again = nn.Sequential(StreamConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), StreamLinear(36, 3, cells=9))
    for module in again.modules():
        if isinstance(module, Stream):
            module.freeze()
    again(x)  # decoded once, of other seeds
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(again(x), expected)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(RbeError, match="not within"):
        StreamLinear(4, 4, open_shape=(5, 4))
    with pytest.raises(RbeError, match="spread"):
        StreamLinear(4, 4, spread=0.0)
    with pytest.raises(RbeError, match="whole channels"):
        StreamConv2d(4, 4, 3, open_shape=(4, 10))
    with pytest.raises(RbeError, match="last side"):
        StreamLinear(4, 4)(torch.randn(2, 5))
    with pytest.raises(RbeError, match="must be"):
        StreamConv2d(4, 4, 3)(torch.randn(2, 3, 5, 5))


def test_bytes_are_counted_whole() -> None:
    layer = StreamLinear(30, 20)
    found = count(layer)
    assert (found.matrix_weights, found.vector_weights, found.dense_weights) == (600, 20, 0)
    assert found.seed_bytes == len(layer.pack())
    assert found.whole_bytes == found.seed_bytes + 4 == count(layer.freeze()).whole_bytes
