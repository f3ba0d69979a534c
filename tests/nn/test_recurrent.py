"""LSTM and GRU: torch's given the decoded weights, in every form of input."""

from itertools import product
from typing import Any

import pytest
import torch
from layer_cases import EVERY, OPEN, close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rbe.nn
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix

KINDS: list[tuple[Any, Any]] = [(rbe.nn.LSTM, nn.LSTM), (rbe.nn.GRU, nn.GRU)]


def torchs(layer: Any) -> Any:
    """Torch's layer with our decoded weights."""
    kind = nn.LSTM if isinstance(layer, rbe.nn.LSTM) else nn.GRU
    twin = kind(
        layer.input_size, layer.hidden_size, layer.num_layers, layer.ih_l0.bias is not None
        or layer.ih_l0.bias_seed is not None, layer.batch_first, 0.0, layer.bidirectional,
    )  # fmt: skip
    state = {}
    for name, part in layer.named_children():
        state[f"weight_{name}"] = part.weight
        bias = part.bias if part.bias_seed is None else part.bias_seed()
        if bias is not None:
            state[f"bias_{name}"] = bias
    twin.load_state_dict(state)
    return twin


def states(layer: Any, batch: int, batched: bool = True) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sides = (count, batch, layer.hidden_size) if batched else (count, layer.hidden_size)
    made = tuple(torch.randn(sides) for _ in range(layer.states))
    return made if len(made) == 2 else made[0]


def check(layer: Any, x: Tensor, start: Any) -> None:
    twin = torchs(layer)
    x = x.requires_grad_()
    (y, end), (expected, their_end) = layer(x, start), twin(x, start)
    assert close(y, expected)
    for one, other in zip(*(e if isinstance(e, tuple) else (e,) for e in (end, their_end)), strict=True):
        assert close(one, other)
    g = torch.randn_like(y)
    assert close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0], 1e-4)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    ("layers", "batch_first", "bidirectional"), list(product([1, 2], [False, True], [False, True]))
)
def test_they_equal_torchs(kind: int, layers: int, batch_first: bool, bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](3, 4, layers, "seed", batch_first=batch_first, bidirectional=bidirectional, **OPEN["radial"])
    x = torch.randn(2, 5, 3)
    check(layer, x, None)
    check(layer, x, states(layer, 2 if batch_first else 5))
    check(layer, x[0], states(layer, 0, batched=False))
    check(layer, x[0], None)
    layer.flatten_parameters()  # models call it before they run


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("format", EVERY)
def test_every_format(kind: int, format: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](3, 4, bias=format != "radial", **EVERY[format])
    check(layer, torch.randn(3, 2, 3), None)
    for part in layer.children():
        part.freeze()
    check(layer, torch.randn(3, 2, 3), None)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("lengths", [[2, 5, 1, 5], [3, 3, 3, 3], [4, 3, 2, 1]])
@pytest.mark.parametrize("given", [False, True])
def test_packed_inputs(kind: int, lengths: list[int], given: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](3, 4, 2, bidirectional=True, **OPEN["radial"])
    twin = torchs(layer)
    x = torch.randn(5, 4, 3)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    start = states(layer, 4) if given else None
    (y, end), (expected, their_end) = layer(packed, start), twin(packed, start)
    assert isinstance(y, PackedSequence) and close(y.data, expected.data)
    assert close(pad_packed_sequence(y)[0], pad_packed_sequence(expected)[0])
    for one, other in zip(*(e if isinstance(e, tuple) else (e,) for e in (end, their_end)), strict=True):
        assert close(one, other)


def test_dropout_is_between_layers_and_for_training() -> None:
    x = torch.randn(3, 2, 3)
    deep = rbe.nn.GRU(3, 16, 2, dropout=0.5, **OPEN["radial"])
    assert not torch.equal(deep(x)[0], deep(x)[0])
    assert torch.equal(deep.eval()(x)[0], deep(x)[0])
    flat = rbe.nn.GRU(3, 16, 1, dropout=0.5, **OPEN["radial"])
    assert torch.equal(flat(x)[0], flat(x)[0])


def test_layers_around_matrices() -> None:
    made = rbe.nn.LSTM(3, 4, bidirectional=True, **OPEN["radial"])
    twin = torchs(made)
    matrices: dict[str, SeedMatrix] = {f"weight_{n}": part.matrix for n, part in made.named_children()}
    biases = {n: p.detach() for n, p in twin.named_parameters() if n.startswith("bias_")}
    layer = rbe.nn.LSTM.from_matrices(matrices, biases, bidirectional=True)
    x = torch.randn(3, 2, 3)
    assert close(layer(x)[0], twin(x)[0])
    assert sorted(n for n, _ in layer.named_parameters()) == [
        f"{part}_l0{suffix}.bias" for part in ("hh", "ih") for suffix in ("", "_reverse")
    ]
    with pytest.raises(RbeError, match="these settings take"):
        rbe.nn.LSTM.from_matrices(matrices)
    with pytest.raises(RbeError, match="ih_l0 and hh_l0 are needed"):
        rbe.nn.GRU.from_matrices({})
    with pytest.raises(RbeError, match="but must be"):
        rbe.nn.GRU.from_matrices(matrices, bidirectional=True)
    with pytest.raises(RbeError, match="begin with weight_ih_l"):
        rbe.nn.LSTM.from_matrices({"ih_l0": made.ih_l0.matrix})


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(RbeError, match="num_layers 0"):
        rbe.nn.LSTM(3, 4, 0)
    with pytest.raises(RbeError, match="dropout"):
        rbe.nn.LSTM(3, 4, dropout=-1.0)
    with pytest.raises(RbeError, match="trellis"):
        rbe.nn.GRU(3, 4, bias="seed")
    layer = rbe.nn.GRU(3, 4, format="packed128")
    with pytest.raises(RbeError, match="3 features"):
        layer(torch.randn(5, 2, 4))
    with pytest.raises(RbeError, match="no step"):
        layer(torch.randn(0, 2, 3))
    with pytest.raises(RbeError, match=r"a state is \(1, 3, 4\); it must be \(1, 2, 4\)"):
        layer(torch.randn(5, 2, 3), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, "seed"])
def test_open_layers_train_in_every_dtype(dtype: torch.dtype, bias: bool | str) -> None:
    for make in (rbe.nn.LSTM, rbe.nn.GRU):
        layer = make(4, 5, bias=bias, format="packed128", block=4).to(dtype)
        y = layer(torch.randn(3, 2, 4, dtype=dtype))[0]
        y.float().sum().backward()
        assert y.dtype == dtype and all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_a_state_of_the_other_layer_is_refused() -> None:
    x, h = torch.randn(4, 2, 8), torch.zeros(1, 2, 16)
    gru, lstm = rbe.nn.GRU(8, 16, format="packed128"), rbe.nn.LSTM(8, 16, format="packed128")
    for layer, state in ((gru, (h,)), (gru, (h, h)), (lstm, h), (lstm, (h,)), (lstm, (h, None))):
        with pytest.raises(RbeError, match="the state is not"):
            layer(x, state)
