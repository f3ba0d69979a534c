"""Transformer blocks and stacks: torch's given the decoded weights, decoding in steps, and the bytes of the papers."""

import pytest
import torch
from layer_cases import EVERY, NO_VECTORS, OPEN, close
from torch import nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn import TransformerBlock, TransformerDecoder, TransformerEncoder


def attention_state(layer: rbe.nn.MultiheadAttention, prefix: str) -> dict[str, torch.Tensor]:
    parts = [*layer.q, *layer.k, *layer.v]
    return {
        f"{prefix}.in_proj_weight": torch.cat([part.weight for part in parts]),
        f"{prefix}.in_proj_bias": torch.cat([part.bias for part in parts]),
        f"{prefix}.out_proj.weight": layer.o.weight,
        f"{prefix}.out_proj.bias": layer.o.bias,
    }


def torchs(block: TransformerBlock, activation: str) -> nn.Module:
    """Torch's block with our decoded weights."""
    kind = nn.TransformerEncoderLayer if block.cross is None else nn.TransformerDecoderLayer
    feed = block.feedforward
    twin = kind(8, 2, 12, 0.0, activation, norm_first=block.norm_first, batch_first=True)
    norms = [block.norm1, block.norm2]
    state = attention_state(block.attention, "self_attn")
    if block.cross is not None and block.norm_cross is not None:
        norms.insert(1, block.norm_cross)
        state |= attention_state(block.cross, "multihead_attn")
    for k, norm in enumerate(norms, 1):
        state |= {f"norm{k}.weight": norm.gain(), f"norm{k}.bias": norm.shift()}
    for name, part in (("linear1", feed.linear1), ("linear2", feed.linear2)):
        offset = part.bias if part.bias_seed is None else part.bias_seed()
        state |= {f"{name}.weight": part.weight, f"{name}.bias": offset}
    twin.load_state_dict(state)
    return twin


def block(format: str, norm_first: bool, cross: bool, activation: str = "gelu") -> TransformerBlock:
    bias = True if format in NO_VECTORS or cross else "seed"
    return TransformerBlock(
        8, 2, 12, 0.0, activation, batch_first=True, norm_first=norm_first, bias=bias, attention_bias=True,
        cross_attention=cross, norm_parameters="seed" if format == "radial" else "dense", **EVERY[format],
    )  # fmt: skip


@pytest.mark.parametrize("format", [f for f in EVERY if f != "faithful"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_blocks_equal_torchs_with_gradients(format: str, norm_first: bool, cross: bool) -> None:
    torch.manual_seed(0)
    ours = block(format, norm_first, cross, "relu" if cross else "gelu")
    twin = torchs(ours, "relu" if cross else "gelu")
    x, memory = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    padding = torch.tensor([[False, False, False, True], [False] * 4])
    mask = torch.ones(4, 4).triu(1).bool()
    inputs = (x, memory) if cross else (x,)
    if cross:
        seen = torch.tensor([[False] * 5, [True] + [False] * 4])
        y = ours(x, memory, mask=mask, key_padding_mask=padding, memory_key_padding_mask=seen)
        expected = twin(x, memory, tgt_mask=mask, tgt_key_padding_mask=padding, memory_key_padding_mask=seen)
    else:
        y = ours(x, is_causal=True, key_padding_mask=padding)
        expected = twin(x, src_mask=mask, src_key_padding_mask=padding)
    g = torch.randn_like(y)
    assert close(y, expected)
    mine, theirs = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)
    assert all(close(one, other, 1e-3) for one, other in zip(mine, theirs, strict=True))


def test_the_printed_block() -> None:
    """000 section 5.8.1: norm after the residual, ReLU, no biases in the attention, everything from seeds."""
    torch.manual_seed(0)
    ours = TransformerBlock(8, 2, 12, 0.0, bias="seed", format="packed64", block=None, mode="faithful").eval()
    x = torch.randn(5, 8)
    y = ours.norm1(x + ours.attention(x)[0])
    y = ours.norm2(y + ours.feedforward.linear2(ours.feedforward.linear1(y).relu()))
    assert close(ours(x), y)
    assert not any(p.ndim == 1 for p in ours.parameters()) and ours.norm1.printed


def test_bytes_of_the_paper() -> None:
    """000 section 5.8.2: 8 (3h + 9) bytes; for GPT-2 small 78,643 to 1, biases, norms and scales not counted."""
    gpt2 = TransformerBlock(768, 12, 3072, bias="seed", format="packed64", block=None)
    count = rbe.nn.count(gpt2)
    assert count.seed_bytes == 8 * (3 * 12 + 9) == rbe.nn.count(gpt2.attention).seed_bytes + 4 * 8 + 4 * 8
    assert int(count.printed_ratio) == 78_643
    assert count.matrix_weights == 4 * 768**2 + 2 * 768 * 3072
    assert count.vector_weights == 3072 + 768 + 4 * 768 and count.dense_weights == 0
    assert count.whole_bytes == (3 * 12 + 9) * (8 + 4)
    assert count.ratio == 4 * count.weights / count.whole_bytes
    stack = rbe.nn.count(TransformerEncoder(gpt2, 2))
    assert (stack.weights, stack.whole_bytes) == (2 * count.weights, 2 * count.whole_bytes)


def test_the_count_is_the_size_of_a_frozen_state() -> None:
    model = TransformerEncoder(block("radial", True, False), 2, rbe.nn.LayerNorm(8))
    count = rbe.nn.count(model)
    for module in model.modules():
        if isinstance(module, rbe.nn.Seeded):
            module.freeze()
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert count.whole_bytes == stored and count == rbe.nn.count(model)


@pytest.mark.parametrize("format", ["radial", "trellis"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_steps_of_stacks_equal_the_full_pass(format: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(block(format, norm_first, False), 2, rbe.nn.LayerNorm(8)).eval()
    decoder = TransformerDecoder(block(format, norm_first, True), 2).eval()
    x, source = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        cache = encoder.new_cache()
        steps = [encoder(x[:, t : t + 1], is_causal=True, cache=cache) for t in range(4)]
        assert close(torch.cat(steps, 1), encoder(x, is_causal=True))
        memory, cache = encoder(source), decoder.new_cache()
        steps = [decoder(x[:, t : t + 1], memory, tgt_is_causal=True, cache=cache) for t in range(4)]
        assert close(torch.cat(steps, 1), decoder(x, memory, tgt_is_causal=True))
        assert (cache[1].length, cache[1].cross.length) == (4, 3)


def test_copies_of_a_block_draw_seeds_of_their_own() -> None:
    torch.manual_seed(0)
    first, second = TransformerEncoder(block("radial", False, False), 2).layers
    assert not torch.equal(first.attention.q[0].radius, second.attention.q[0].radius)
    assert bool((second.norm1.gain() - 1).abs().max() < 0.1)
    printed = TransformerBlock(8, 2, 12, bias="seed", **OPEN["faithful"])
    assert all(bool(copy.norm1.gain().sum() > 0) for copy in TransformerEncoder(printed, 8).layers)
    given = [block("radial", False, False), block("radial", False, False)]
    assert list(TransformerEncoder(given).layers) == given


def test_rms_norms_and_no_biases() -> None:
    ours = TransformerBlock(8, 2, 12, norm="rms", bias=False, **OPEN["radial"])
    assert isinstance(ours.norm1, rbe.nn.RMSNorm)
    assert [n for n, _ in ours.named_parameters() if "bias" in n] == []
    assert ours(torch.randn(3, 8)).shape == (3, 8)


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(RbeError, match="norm 'group' is not offered; choose one of layer, rms"):
        TransformerBlock(8, 2, norm="group")
    with pytest.raises(RbeError, match="trellis"):
        TransformerBlock(8, 2, bias="seed")
    with pytest.raises(RbeError, match="memory"):
        TransformerBlock(8, 2, 12)(torch.randn(3, 8), torch.randn(3, 8))
    crossing = TransformerBlock(8, 2, 12, cross_attention=True)
    with pytest.raises(RbeError, match="memory"):
        crossing(torch.randn(3, 8))
    with pytest.raises(RbeError, match="cross_attention=False"):
        TransformerEncoder(crossing, 2)
    with pytest.raises(RbeError, match="cross_attention=True"):
        TransformerDecoder(TransformerBlock(8, 2, 12), 2)
    with pytest.raises(RbeError, match="num_layers 0"):
        TransformerEncoder(TransformerBlock(8, 2, 12), 0)
    with pytest.raises(RbeError, match="0 blocks"):
        TransformerEncoder([])
