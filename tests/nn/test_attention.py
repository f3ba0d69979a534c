"""`MultiheadAttention`: torch's given the decoded weights, its masks, its seeds per head, and the cache."""

from typing import Any

import pytest
import torch
from layer_cases import EVERY, OPEN, close
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn import KeyValues, MultiheadAttention


def stacked(parts: nn.ModuleList, what: str) -> Tensor:
    return torch.cat([getattr(part, what).detach() for part in parts])


def torchs(layer: MultiheadAttention) -> nn.MultiheadAttention:
    """Torch's layer with our decoded weights."""
    biased = layer.o.bias is not None
    twin = nn.MultiheadAttention(
        layer.embed_dim, layer.num_heads, bias=biased, kdim=layer.kdim, vdim=layer.vdim, batch_first=layer.batch_first
    )
    weights = [stacked(parts, "weight") for parts in (layer.q, layer.k, layer.v)]
    state = {"out_proj.weight": layer.o.weight}
    if twin.in_proj_weight is not None:
        state["in_proj_weight"] = torch.cat(weights)
    else:
        state |= {f"{name}_proj_weight": w for name, w in zip("qkv", weights, strict=True)}
    if biased:
        state["in_proj_bias"] = torch.cat([stacked(parts, "bias") for parts in (layer.q, layer.k, layer.v)])
        state["out_proj.bias"] = layer.o.bias.detach()  # type: ignore[union-attr]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_equals_torchs_layer_with_gradients(format: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2, batch_first=batch_first, **EVERY[format])
    twin = torchs(layer)
    q, k, v = (torch.randn(3, 3, 8, requires_grad=True) for _ in range(3))
    for weighted in (False, True):
        y, weights = layer(q, k, v, need_weights=weighted)
        expected, theirs = twin(q, k, v, need_weights=weighted)
        g = torch.randn_like(y)
        assert close(y, expected)
        assert (weights is None) == (theirs is None) and (weights is None or close(weights, theirs))
        mine = torch.autograd.grad(y, (q, k, v), g)
        for one, other in zip(mine, torch.autograd.grad(expected, (q, k, v), g), strict=True):
            assert close(one, other, 1e-4)


MASKS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding_mask": torch.tensor([[False, False, True, True, False], [False] * 5])},
    "padding-float": {"key_padding_mask": torch.tensor([[0.0, -1.0, 2.0, 0.0, 0.0], [0.0] * 5])},
    "mask": {"attn_mask": torch.ones(4, 5).triu(2).bool()},
    "mask-float": {"attn_mask": torch.arange(20.0).square().sin().reshape(4, 5)},
    "mask-heads": {"attn_mask": torch.arange(80.0).square().sin().reshape(4, 4, 5)},
    "both": {
        "attn_mask": torch.ones(4, 5).triu(2).bool(),
        "key_padding_mask": torch.tensor([[False] * 3 + [True] * 2, [False] * 5]),
    },
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("averaged", [True, False])
def test_masks_are_torchs(name: str, averaged: bool) -> None:
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True, **OPEN["radial"])
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 5)
    y, weights = torchs(layer)(q, k, v, average_attn_weights=averaged, **MASKS[name])
    assert close(layer(q, k, v, **MASKS[name])[0], y)
    mine, theirs = layer(q, k, v, need_weights=True, average_attn_weights=averaged, **MASKS[name])
    assert close(mine, y) and close(theirs, weights)


def test_inputs_without_a_batch() -> None:
    layer = MultiheadAttention(8, 2, **OPEN["radial"])
    q, padding = torch.randn(4, 8), torch.tensor([False, True, False, False])
    y, weights = layer(q, key_padding_mask=padding, need_weights=True)
    expected, theirs = torchs(layer)(q, q, q, key_padding_mask=padding)
    assert close(y, expected) and close(weights, theirs)


def test_a_causal_layer_sees_no_later_position() -> None:
    layer = MultiheadAttention(8, 2, batch_first=True, **OPEN["radial"])
    x = torch.randn(2, 5, 8)
    y = layer(x, is_causal=True)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert close(y, torchs(layer)(x, x, x, attn_mask=mask, is_causal=True)[0])
    x = torch.cat((x[:, :3], torch.randn(2, 2, 8)), 1)
    assert close(layer(x, is_causal=True)[0][:, :3], y[:, :3])


@pytest.mark.parametrize("format", ["radial", "trellis"])
@pytest.mark.parametrize("steps", [[1] * 6, [3, 1, 2]])
def test_steps_with_a_cache_equal_the_full_pass(format: str, steps: list[int]) -> None:
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2, batch_first=True, **EVERY[format])
    x = torch.randn(2, 6, 8)
    padding = torch.tensor([[True] + [False] * 5, [False] * 6])
    cache, parts = KeyValues(), []
    for part in x.split(steps, 1):
        seen = cache.length + part.shape[1]
        parts.append(layer(part, is_causal=True, key_padding_mask=padding[:, :seen], cache=cache)[0])
    whole = layer(x, is_causal=True, key_padding_mask=padding)[0]
    assert cache.length == 6
    rows = torch.stack([~padding] * 8, -1)
    assert close(torch.cat(parts, 1)[rows], whole[rows])


def test_fixed_keys_are_projected_once() -> None:
    layer = MultiheadAttention(8, 2, batch_first=True, **OPEN["radial"])
    x, memory, cache = torch.randn(2, 3, 8), torch.randn(2, 5, 8), KeyValues(fixed=True)
    whole = layer(x, memory)[0]
    steps = [layer(x[:, t : t + 1], memory * (t == 0), cache=cache)[0] for t in range(3)]
    assert close(torch.cat(steps, 1), whole) and cache.length == 5


@pytest.mark.parametrize("block", [4, None, 3])
def test_every_head_has_seeds_of_its_own(block: int | None) -> None:
    """Where heads fall on block borders one matrix holds them all; either way no block is shared."""
    layer = MultiheadAttention(8, 2, format="packed128", block=block)
    assert len(layer.q) == (1 if block == 4 else 2)
    before = layer.head_matrix("q", 1).detach()
    with torch.no_grad():
        if block == 4:
            layer.q[0].angle[:2] += 0.3  # the block row of head 0
        else:
            layer.q[0].angle += 0.3
    assert torch.equal(layer.head_matrix("q", 1), before)


def test_matrices_of_heads_are_as_printed() -> None:
    """000 section 5.3.3 restores (d_model, d_k) and multiplies x from the left; layers hold (d_k, d_model)."""
    for block in (4, None):
        layer = MultiheadAttention(8, 2, bias=False, format="packed64", block=block)
        x = torch.randn(3, 8)
        heads = [x @ layer.head_matrix("k", head) for head in range(2)]
        assert layer.head_matrix("k", 0).shape == (8, 4)
        assert close(torch.cat(heads, -1), torch.cat([part(x) for part in layer.k], -1))


def test_bytes_of_the_paper() -> None:
    """000 section 5.3.2: (3h + 1) x 8 bytes; for GPT-2 small 31,882 to 1, without scales and biases."""
    count = rbe.nn.count(MultiheadAttention(768, 12, bias=False, format="packed64", block=None))
    assert count.seed_bytes == (3 * 12 + 1) * 8 and count.whole_bytes == (3 * 12 + 1) * (8 + 4)
    assert int(count.printed_ratio) == 31_882
    assert count.printed_ratio == 16 * 12 * 768 * 64 / (8 * (3 * 12 + 1))


def test_dropout_is_for_training() -> None:
    layer = MultiheadAttention(8, 2, dropout=0.5, **OPEN["radial"])
    x = torch.randn(6, 8)
    for weighted in (False, True):
        assert not torch.equal(layer.train()(x, need_weights=weighted)[0], layer(x, need_weights=weighted)[0])
        assert torch.equal(layer.eval()(x, need_weights=weighted)[0], layer(x, need_weights=weighted)[0])


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(RbeError, match="3 heads do not divide embed_dim 8"):
        MultiheadAttention(8, 3)
    with pytest.raises(RbeError, match="dropout"):
        MultiheadAttention(8, 2, dropout=1.5)
    with pytest.raises(RbeError, match="trellis"):
        MultiheadAttention(8, 2, bias="seed")
    layer = MultiheadAttention(8, 2, kdim=6, batch_first=True, format="packed128", block=4)
    x = torch.randn(2, 3, 8)
    with pytest.raises(RbeError, match="key have 6 features"):
        layer(x)
    with pytest.raises(RbeError, match="equally long"):
        layer(x, torch.randn(2, 4, 6), torch.randn(2, 5, 8))
    layer = MultiheadAttention(8, 2, batch_first=True, format="packed128", block=4)
    with pytest.raises(RbeError, match=r"key_padding_mask is \(3, 2\); it must be \(2, 3\)"):
        layer(x, key_padding_mask=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(RbeError, match=r"attn_mask is \(2, 2\)"):
        layer(x, attn_mask=torch.zeros(2, 2))
    with pytest.raises(RbeError, match="head_matrix: 'o'"):
        layer.head_matrix("o", 0)
    part = rbe.nn.Linear(8, 8)
    with pytest.raises(RbeError, match="'v'"):
        MultiheadAttention.from_linears({"q": [part], "k": [part], "o": [part]}, 2)
    with pytest.raises(RbeError, match="k has"):
        MultiheadAttention.from_linears({"q": [part], "k": [part] * 2, "v": [part], "o": [part]}, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_masks_are_refused(dtype: torch.dtype) -> None:
    layer, x = rbe.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 3, 16)
    with pytest.raises(RbeError, match=r"attn_mask is torch.*bool"):
        layer(x, attn_mask=torch.ones(3, 3, dtype=dtype))
    with pytest.raises(RbeError, match=r"key_padding_mask is torch.*bool"):
        layer(x, key_padding_mask=torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_that_is_none_is_refused_by_the_format(block: int) -> None:
    with pytest.raises(RbeError, match=r"block"):
        rbe.nn.MultiheadAttention(16, 2, format="packed128", block=block)
