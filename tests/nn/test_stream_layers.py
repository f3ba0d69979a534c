"""Layers of a stream against torch's own, in both states, and through files."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from elsewhere import NAME, elsewhere
from torch import nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.kernels.sparse import Sparse
from rbe.nn import Stream, StreamConv2d, StreamEmbedding, StreamLinear, StreamLSTM, count


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frozen_products_make_no_dense_matrix_unless_gradients_are_asked_for(dtype: torch.dtype) -> None:
    near = {"atol": 0.03, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for layer, x in layers(bias=True, corner=True):
        with torch.no_grad():
            layer.latent *= 0.4  # a fifth is not 0
        layer.freeze()
        expected = by_torch(layer, x, layer.scale).to(dtype)
        with patch.object(Sparse, "decode", side_effect=AssertionError):
            if dtype != torch.float64:
                torch.testing.assert_close(layer(x.to(dtype)), expected, **near)
        x = x.to(dtype).requires_grad_()
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(y.detach(), expected, **near)
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        with torch.no_grad(), patch.object(Sparse, "decode", wraps=layer._entries().decode) as decode:
            torch.testing.assert_close(layer(x), expected, **near)
            assert decode.called == (dtype == torch.float64)


def test_levels_beyond_the_largest_count_as_it_before_and_after_freezing() -> None:
    layer = StreamLinear(4, 3, bias=False, spread=1.0)
    table = StreamEmbedding(3, 4)
    with torch.no_grad():
        layer.latent.fill_(300.0)
        table.latent.fill_(-300.0)
    x = torch.ones(2, 4)
    y, rows = layer(x), table(torch.tensor([1, 2]))
    torch.testing.assert_close(layer.freeze()(x), y)
    torch.testing.assert_close(table.freeze()(torch.tensor([1, 2])), rows)


def test_a_full_stream_is_multiplied_dense() -> None:
    layer = StreamLinear(16, 8, bias=False)
    with torch.no_grad():
        layer.latent.fill_(2.0)
    layer.freeze()
    x = torch.randn(3, 16)
    with patch.object(Sparse, "matmul", side_effect=AssertionError):
        torch.testing.assert_close(layer(x), by_torch(layer, x, layer.scale))


def test_a_used_model_can_be_copied() -> None:
    model = nn.Sequential(StreamLinear(16, 8).freeze(), nn.ReLU(), StreamLinear(8, 4).freeze())
    x = torch.randn(3, 16)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_compilers_and_transforms_see_frozen_layers() -> None:
    layer, x = StreamLinear(16, 8), torch.randn(3, 16)
    nn.init.normal_(layer.latent, std=0.4)
    layer.freeze()
    y = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(torch.vmap(layer)(x), y)
    gradient = torch.func.grad(lambda v: layer(v).sum())(x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, 16))


def test_unusual_inputs_of_frozen_layers() -> None:
    layer, table = StreamLinear(16, 8), StreamEmbedding(9, 4)
    for one in (layer, table):
        nn.init.normal_(one.latent, std=0.4)
        one.freeze()
    x, index = torch.randn(9, 16), torch.tensor([[1, 8], [0, 0]])
    y, rows = layer(x), table(index)
    torch.testing.assert_close(layer(torch._neg_view(x)), -y + 2 * layer(torch.zeros(1, 16)))
    torch.testing.assert_close(layer(torch._efficientzerotensor((9, 16))), layer(torch.zeros(9, 16)))
    torch.testing.assert_close(torch.compile(table, backend="eager")(index), rows)
    assert layer(torch.zeros(0, 16)).shape == (0, 8)
    layer.scale.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.scale.grad, y.sum() / layer.scale.detach(), rtol=1e-4, atol=1e-4)
    again = pickle.loads(pickle.dumps(table))
    torch.testing.assert_close(again(index), rows)
    assert again._decoded is not table._decoded


def test_images_that_torch_refuses_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Kernel size"):
        StreamConv2d(4, 8, 3).freeze()(torch.randn(1, 4, 2, 2))
    with pytest.raises(RuntimeError, match="stride"):
        StreamConv2d(4, 8, 3, 0).freeze()(torch.randn(1, 4, 9, 9))


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_a_recurrent_layer_is_torchs_of_the_levels(bias: bool, both: bool) -> None:
    torch.manual_seed(0)
    layer = StreamLSTM(5, 6, 2, bias, batch_first=True, bidirectional=both, spread=0.5).eval()
    dense = nn.LSTM(5, 6, 2, bias, batch_first=True, bidirectional=both).eval()
    for p in layer.parameters():
        if p.ndim:
            nn.init.normal_(p)  # biases too
    with torch.no_grad():
        for name, p in dense.named_parameters():
            kind, _, part = name.partition("_")
            stream = layer.get_submodule(part)
            assert isinstance(stream, StreamLinear)
            whole = stream.levels * stream.log_scale.exp()
            if kind == "weight":
                p.copy_(whole[:, :-1] if stream.bias else whole)
            else:
                p.copy_(whole[:, -1] if part.startswith("ih") else torch.zeros(24))
    x, state = torch.randn(3, 7, 5), (torch.randn(4 if both else 2, 3, 6), torch.randn(4 if both else 2, 3, 6))
    y, (h, c) = layer(x, state)
    wanted, (wanted_h, wanted_c) = dense(x, state)
    for one, two in ((y, wanted), (h, wanted_h), (c, wanted_c)):
        torch.testing.assert_close(one, two)
    layer(x)[0].square().sum().backward()
    dense(x)[0].square().sum().backward()
    for name in ("ih_l0", "hh_l1"):
        stream, gradient = layer.get_submodule(name), dense.get_parameter(f"weight_{name}").grad
        assert isinstance(stream, StreamLinear)
        assert gradient is not None
        found = stream.latent.grad[:, : gradient.shape[1]]  # type: ignore[index]
        torch.testing.assert_close(found, gradient * stream.log_scale.detach().exp(), rtol=1e-4, atol=1e-5)
    for module in layer.modules():
        if isinstance(module, Stream):
            module.freeze()
    torch.testing.assert_close(layer(x, state)[0], wanted)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_frozen_recurrent_layers_walk_as_torch_does(both: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = StreamLSTM(15, 12, 2, True, batch_first=batch_first, dropout=0.5, bidirectional=both).eval()
    for module in layer.modules():
        if isinstance(module, Stream):
            nn.init.normal_(module.latent, std=0.4)
            module.freeze()
    x = torch.randn(3, 7, 15)
    state = (
        torch.randn(4 if both else 2, 3 if batch_first else 7, 12),
        torch.randn(4 if both else 2, 3 if batch_first else 7, 12),
    )
    with patch("torch.lstm", side_effect=AssertionError):
        ours = [layer(x, state), layer(x)]
    with patch.object(StreamLSTM, "_sparse", return_value=False):
        for (y, (h, c)), start in zip(ours, (state, None), strict=True):
            wanted, (wanted_h, wanted_c) = layer(x, start)
            for one, two in ((y, wanted), (h, wanted_h), (c, wanted_c)):
                torch.testing.assert_close(one, two)
    assert not layer._sparse(x.double(), *state)
    assert not layer._sparse(x.clone().requires_grad_(), *state)
    assert not layer.train()._sparse(x, *state)  # something is dropped


def test_a_table_gives_rows_and_serves_as_the_output() -> None:
    torch.manual_seed(0)
    table = StreamEmbedding(9, 4, spread=0.5)
    index, x = torch.tensor([[3, 0, 3], [8, 1, 0]]), torch.randn(2, 3, 4)
    weight = (table.levels * table.log_scale.detach().exp()).requires_grad_()
    rows, scores = table(index), table.multiply(x)
    wanted = functional.embedding(index, weight), functional.linear(x, weight)
    torch.testing.assert_close((rows, scores), wanted)
    (rows.square().sum() + scores.square().sum()).backward()
    (wanted[0].square().sum() + wanted[1].square().sum()).backward()
    scale = table.log_scale.detach().exp()
    torch.testing.assert_close(table.latent.grad, weight.grad * scale, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(table.log_scale.grad, (weight.grad * weight.detach()).sum())  # type: ignore[operator]
    table.freeze()
    torch.testing.assert_close((table(index), table.multiply(x)), wanted)


@pytest.mark.parametrize("corner", [False, True])
def test_a_layer_starts_at_given_weights(corner: bool) -> None:
    for layer, _ in layers(bias=True, corner=corner):
        layer.spread = 0.1
        rows, columns = layer.open_shape
        shape = (6, 4, 3, 3) if isinstance(layer, StreamConv2d) else layer.shape
        weight, bias = torch.randn(shape) * 0.3, torch.randn(6)
        layer.start(weight, bias)
        scale = layer.log_scale.detach().exp()
        torch.testing.assert_close(scale, 0.1 * weight.flatten(1)[:rows, :columns].square().mean().sqrt())
        made = layer.corner().detach()
        torch.testing.assert_close(made[:, :-1], weight.flatten(1)[:rows, :columns], rtol=0, atol=0.51 * float(scale))
        torch.testing.assert_close(made[:, -1], bias[:rows], rtol=0, atol=0.51 * float(scale))
        layer.start(torch.zeros(shape))  # has no scale of its own
        torch.testing.assert_close(layer.log_scale.detach().exp(), scale)
        assert not layer.levels.any()


def test_weights_to_start_at_are_checked() -> None:
    layer = StreamLinear(4, 3)
    with pytest.raises(RbeError, match=r"the layer is \(3, 4\)"):
        layer.start(torch.ones(4, 3))
    with pytest.raises(RbeError, match="with a bias of"):
        layer.start(torch.ones(3, 4), torch.ones(4))
    with pytest.raises(RbeError, match="not all finite"):
        layer.start(torch.full((3, 4), torch.nan))
    with pytest.raises(RbeError, match="frozen"):
        layer.freeze().start(torch.ones(3, 4))


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
    with pytest.raises(RbeError, match="indices are -1 to 4"):
        StreamEmbedding(4, 4)(torch.tensor([-1, 4]))
    with pytest.raises(RbeError, match="float32"):
        StreamEmbedding(4, 4)(torch.ones(1))
    with pytest.raises(RbeError, match="last side"):
        StreamEmbedding(4, 4).multiply(torch.ones(2, 3))
    with pytest.raises(RbeError, match="hidden_size 0"):
        StreamLSTM(4, 0)
    with pytest.raises(RbeError, match="no probability"):
        StreamLSTM(4, 4, dropout=2.0)
    with pytest.raises(RbeError, match="3-D with 4 features"):
        StreamLSTM(4, 4)(torch.ones(2, 3, 5))
    with pytest.raises(RbeError, match="a state is"):
        StreamLSTM(4, 4)(torch.ones(2, 3, 4), (torch.ones(1, 2, 4), torch.ones(1, 3, 4)))


def test_bytes_are_counted_whole() -> None:
    layer = StreamLinear(30, 20)
    found = count(layer)
    assert (found.matrix_weights, found.vector_weights, found.dense_weights) == (600, 20, 0)
    assert found.seed_bytes == len(layer.pack())
    assert found.whole_bytes == found.seed_bytes + 4 == count(layer.freeze()).whole_bytes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"cells": 1}, {"cells": 4}),
        ({"cells": 4}, {"cells": 8}),
        ({}, {"open_shape": (8, 16)}),
        ({"bias": False}, {"bias": True}),
    ],
)
def test_the_state_of_another_stream_is_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    state = StreamLinear(16, 32, **one).freeze().state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for given in (state, torch.load(file)):
        with pytest.raises(RuntimeError, match="the state is of a stream with"):
            StreamLinear(16, 32, **other).freeze().load_state_dict(given)
        same = StreamLinear(16, 32, **one).freeze()
        same.load_state_dict(given)
        assert torch.equal(same.seed, state["seed"])


def test_a_state_may_be_changed_and_may_have_no_values() -> None:
    one, two = StreamLinear(16, 32).freeze(), StreamLinear(16, 32).freeze()
    state = one.state_dict()
    state.update(two.state_dict())
    one.load_state_dict(state)
    assert torch.equal(one.weight, two.weight)
    assert sorted(one.to("meta").state_dict()) == ["scale", "seed"]


@pytest.mark.parametrize("part", ["latent", "log_scale"])
def test_numbers_that_are_not_finite_are_not_frozen(part: str) -> None:
    layer = StreamLinear(16, 32)
    with torch.no_grad():
        getattr(layer, part).view(-1)[0] = float("nan")
    with pytest.raises(RbeError, match="training has diverged"):
        layer.freeze()
    assert layer.trainable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_keep_the_scale_and_the_dtype_of_what_comes_out(dtype: torch.dtype) -> None:
    model = nn.Sequential(StreamEmbedding(9, 16).freeze(), nn.LayerNorm(16), StreamLinear(16, 8).freeze())
    index, weight = torch.tensor([[1, 8], [0, 3]]), model[2].weight
    with torch.no_grad():
        y = model(index)
        model.to(dtype)
        z = model(index)
        assert z.dtype == dtype
        torch.testing.assert_close(z.float(), y, rtol=0.05, atol=0.05)
        assert torch.equal(model[2].weight, weight)
        assert copy.deepcopy(model)(index).dtype == dtype
        assert model.float()(index).dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (StreamLinear(5, 4), torch.randn(3, 5)),
        (StreamConv2d(2, 3, 3, padding=1), torch.randn(2, 2, 4, 4)),
        (StreamEmbedding(6, 4), torch.tensor([[0, 5], [2, 2]])),
        (StreamLSTM(3, 4), torch.randn(5, 2, 3)),
    ],
    ids=["linear", "convolution", "table", "recurrent"],
)
def test_another_device_computes_the_same(layer: nn.Module, x: torch.Tensor) -> None:
    def first(y: Any) -> torch.Tensor:
        out: torch.Tensor = y[0] if isinstance(y, tuple) else y
        return out

    y = first(layer(x))
    with elsewhere():
        there = copy.deepcopy(layer).to(NAME)
        made = first(there(x.to(NAME)))
        torch.testing.assert_close(made.cpu(), y)
        made.square().sum().backward()
        assert all(p.grad.device.type == NAME for p in there.parameters() if p.grad is not None)
        for module in there.modules():
            if isinstance(module, Stream):
                module.freeze()
        assert all(t.device.type == NAME for t in there.state_dict().values())
        torch.testing.assert_close(first(there(x.to(NAME))).cpu(), y)
        torch.testing.assert_close(first(there.cpu()(x)), y)
