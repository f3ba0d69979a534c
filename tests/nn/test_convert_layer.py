"""`convert_layer`: blocks of one weight lose nothing, so that the seed layer computes what torch's computes."""

import copy
from typing import Any

import pytest
import torch
from elsewhere import NAME, elsewhere
from layer_cases import close, first
from torch import nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn import convert_layer

EXACT: dict[str, Any] = {"format": "packed64", "block": 1}


def scrambled(layer: nn.Module) -> nn.Module:
    """Biases, gains and running statistics unlike fresh ones."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return layer.eval()


def block(**settings: Any) -> dict[str, Any]:
    return {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True, **settings}


@pytest.mark.parametrize(
    ("layer", "sides"),
    [
        (nn.Linear(5, 3), (2, 5)),
        (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular", bias=False), (2, 4, 5, 5)),
        (nn.LSTM(3, 4, 2, bidirectional=True), (5, 2, 3)),
        (nn.GRU(3, 4, bias=False, batch_first=True), (2, 5, 3)),
        (nn.LayerNorm(6, bias=False), (3, 6)),
        (nn.RMSNorm((2, 3), eps=0.1), (3, 2, 3)),
        (nn.BatchNorm1d(6), (3, 6)),
        (nn.BatchNorm2d(6, affine=False), (3, 6, 2, 2)),
        (nn.TransformerEncoderLayer(**block(activation="gelu", norm_first=True)), (2, 3, 8)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(**block(bias=False)), 2, nn.LayerNorm(8), False), (2, 3, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_seed_layer_computes_the_same(layer: nn.Module, sides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scrambled(layer)
    new = convert_layer(layer, **EXACT)
    x = torch.randn(sides)
    with torch.no_grad():
        assert not new.training and close(first(new(x)), first(layer(x)), 1e-4)
    with elsewhere(), torch.no_grad():
        there = convert_layer(copy.deepcopy(layer).to(NAME), **EXACT)
        assert close(first(there(x.to(NAME))).cpu(), first(new(x)), 1e-4)
    assert not any(isinstance(m, rbe.nn.Seeded) and m.trainable for m in new.modules())


@pytest.mark.parametrize("encoding", [EXACT, {"bits": 4.0, "effort": "fast"}, {"format": "packed128", "block": None}])
def test_attention_and_embedding(encoding: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lossless = encoding is EXACT
    layer = scrambled(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    q, k, v = torch.randn(3, 2, 8), torch.randn(5, 2, 6), torch.randn(5, 2, 4)
    new = convert_layer(layer, **encoding)
    assert len(new.q) == (2 if encoding.get("block", 16) is None else 1)  # type: ignore[arg-type]
    assert close(new(q, k, v)[0], layer(q, k, v)[0], 1e-4) or not lossless
    table = nn.Embedding(9, 6, padding_idx=2)
    rows = convert_layer(table, **encoding)
    index = torch.tensor([2, 8, 0])
    assert rows.padding_idx == 2 and (close(rows(index), table(index)) or not lossless)


def test_decoders_attend_to_their_memory() -> None:
    torch.manual_seed(0)
    layer = scrambled(nn.TransformerDecoder(nn.TransformerDecoderLayer(**block(activation=nn.SiLU())), 2))
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    new = convert_layer(layer, **EXACT)
    assert close(new(x, memory, tgt_is_causal=True), layer(x, memory, tgt_mask=mask, tgt_is_causal=True), 1e-4)


def test_the_original_stays_alone() -> None:
    layer = nn.Linear(5, 3)
    new = convert_layer(layer, **EXACT)
    assert new.training
    before = layer(torch.ones(5)).detach().clone()
    with torch.no_grad():
        new.bias.add_(1.0)  # type: ignore[union-attr, operator]
    assert torch.equal(layer(torch.ones(5)), before)


def test_what_has_no_counterpart_is_refused() -> None:
    for layer, message in [
        (nn.Bilinear(2, 2, 2), "Bilinear has no seed layer; torch's Linear, Embedding"),
        (nn.LSTM(3, 4, proj_size=2), "proj_size 2"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.TransformerEncoderLayer(**block(activation=torch.tanh)), "activation"),
    ]:
        with pytest.raises(RbeError, match=message):
            convert_layer(layer, **EXACT)
