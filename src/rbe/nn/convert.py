"""From torch's layers to ours: `convert_layer` encodes the matrices of one layer, whatever its kind."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe import search
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.nn.attention import MultiheadAttention
from rbe.nn.conv import Conv1d, Conv2d
from rbe.nn.embedding import Embedding
from rbe.nn.linear import Linear
from rbe.nn.norm import BatchNorm1d, BatchNorm2d, LayerNorm, RMSNorm
from rbe.nn.recurrent import GRU, LSTM
from rbe.nn.transformer import TransformerBlock, TransformerDecoder, TransformerEncoder

Encoding = dict[str, Any]


def convert_layer(layer: nn.Module, **encoding: Any) -> nn.Module:
    """The seed layer that stands for one of torch's, its matrices encoded and frozen, its biases and norms dense.

    >>> layer = convert_layer(nn.LSTM(16, 32), format="packed128", block=8)
    >>> type(layer).__name__, layer.hh_l0.spec.shape
    ('LSTM', (128, 32))

    Args:
        layer: Linear, Embedding, Conv1d, Conv2d, LSTM, GRU, MultiheadAttention, LayerNorm, RMSNorm, BatchNorm1d,
            BatchNorm2d, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder or TransformerDecoder of
            torch; it stays as it is, and shares its biases' memory with nothing.
        encoding: as for `rbe.encode`. An embedding is rotated on its feature side only.

    Returns:
        a layer of this package with the same inputs and outputs, device and mode (training or not).

    Raises:
        RbeError: there is no such seed layer, or the layer uses a setting that ours does not have.
    """
    if type(layer) not in _CONVERTERS:
        known = ", ".join(kind.__name__ for kind in _CONVERTERS)
        raise RbeError(f"convert_layer: {type(layer).__name__} has no seed layer; torch's {known} have")
    new = _CONVERTERS[type(layer)](layer, encoding)
    # Encoded on the CPU, wherever the weights are.
    like = next(layer.parameters(), None)
    return (new if like is None else new.to(like.device)).train(layer.training)


def _encode(weight: Tensor, encoding: Encoding) -> SeedMatrix:
    return search.encode(weight.detach().flatten(1), **encoding)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _linear(layer: Any, encoding: Encoding) -> Linear:
    return Linear.from_matrix(_encode(layer.weight, encoding), _copy(layer.bias), dtype=layer.weight.dtype)


def _embedding(layer: Any, encoding: Encoding) -> Embedding:
    if layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq:
        raise RbeError("convert_layer: an Embedding with max_norm, sparse or scale_grad_by_freq changes its own table")
    if encoding.get("format", "trellis") == "trellis":
        encoding = {"row_scale": True, **encoding, "rotate": "in" if encoding.get("rotate", True) else False}
    return Embedding.from_matrix(_encode(layer.weight, encoding), layer.padding_idx, dtype=layer.weight.dtype)


def _conv(layer: Any, encoding: Encoding) -> nn.Module:
    kind = Conv1d if isinstance(layer, nn.Conv1d) else Conv2d
    return kind.from_matrix(
        _encode(layer.weight, encoding),
        _copy(layer.bias),
        layer.in_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        dtype=layer.weight.dtype,
    )


def _recurrent(layer: Any, encoding: Encoding) -> nn.Module:
    if layer.proj_size:
        raise RbeError(f"convert_layer: proj_size {layer.proj_size} is not offered; only an LSTM without projection is")
    kind = LSTM if isinstance(layer, nn.LSTM) else GRU
    named = dict(layer.named_parameters())
    return kind.from_matrices(
        {name: _encode(w, encoding) for name, w in named.items() if name.startswith("weight_")},
        {name: b.detach().clone() for name, b in named.items() if name.startswith("bias_")},
        layer.num_layers,
        layer.batch_first,
        layer.dropout,
        layer.bidirectional,
    )


def _attention(layer: Any, encoding: Encoding) -> MultiheadAttention:
    if layer.bias_k is not None or layer.add_zero_attn:
        raise RbeError("convert_layer: a MultiheadAttention with add_bias_kv or add_zero_attn is not offered")
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    block = encoding.get("block", 16)
    # A trellis' rotation mixes the heads anyway; else every head has seeds of its own, in one matrix where it can be.
    together = encoding.get("format", "trellis") == "trellis" or (block is not None and layer.head_dim % block == 0)
    count = 1 if together else layer.num_heads

    def cut(weight: Tensor, bias: Tensor | None) -> Iterator[Linear]:
        offsets = (None,) * count if bias is None else bias.chunk(count)
        for w, b in zip(weight.chunk(count), offsets, strict=True):
            yield Linear.from_matrix(_encode(w, encoding), _copy(b), dtype=w.dtype)

    parts = {name: list(cut(w, b)) for name, w, b in zip("qkv", weights, biases, strict=True)}
    parts["o"] = [_linear(layer.out_proj, encoding)]
    return MultiheadAttention.from_linears(parts, layer.num_heads, layer.dropout, layer.batch_first)


def _norm(layer: Any, encoding: Encoding) -> nn.Module:
    new: nn.Module
    if isinstance(layer, nn.LayerNorm):
        new = LayerNorm(layer.normalized_shape, layer.eps, layer.elementwise_affine, layer.bias is not None)
    elif isinstance(layer, nn.RMSNorm):
        new = RMSNorm(layer.normalized_shape, layer.eps, layer.elementwise_affine)
    else:
        kind = BatchNorm1d if isinstance(layer, nn.BatchNorm1d) else BatchNorm2d
        new = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    tensors = [*layer.parameters(), *layer.buffers()]
    if tensors:
        new.to(tensors[0].device, tensors[0].dtype)
    new.load_state_dict(layer.state_dict())
    return new


_ACTIVATIONS: dict[Callable[..., Tensor], str] = {
    functional.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
    functional.leaky_relu: "leaky_relu",
    functional.relu6: "relu6",
    functional.hardswish: "hardswish",
    functional.sigmoid: "sigmoid",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
}


def _block(layer: Any, encoding: Encoding) -> TransformerBlock:
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid"}
    if isinstance(layer.activation, nn.GELU):
        activation = "gelu_tanh" if layer.activation.approximate == "tanh" else "gelu"
    else:
        activation = names.get(type(layer.activation)) or _ACTIVATIONS.get(layer.activation, "")
    if not activation:
        raise RbeError(f"convert_layer: the activation {layer.activation} of this block has no name here")
    crosses = isinstance(layer, nn.TransformerDecoderLayer)
    block = TransformerBlock(
        layer.linear1.in_features,
        layer.self_attn.num_heads,
        layer.linear1.out_features,
        layer.dropout.p,
        activation,
        layer.norm1.eps,
        layer.self_attn.batch_first,
        layer.norm_first,
        layer.linear1.bias is not None,
        cross_attention=crosses,
        format="packed64",
        device="meta",  # a frame: what is inside is replaced now
    )
    block.attention = _attention(layer.self_attn, encoding)
    block.feedforward.linear1 = _linear(layer.linear1, encoding)
    block.feedforward.linear2 = _linear(layer.linear2, encoding)
    norms = [layer.norm1, layer.norm2, layer.norm3] if crosses else [layer.norm1, layer.norm2]
    converted: list[Any] = [convert_layer(norm) for norm in norms]
    block.norm1, block.norm2 = converted[0], converted[-1]
    if crosses:
        block.cross = _attention(layer.multihead_attn, encoding)
        block.norm_cross = converted[1]
    return block


def _stack(layer: Any, encoding: Encoding) -> nn.Module:
    kind = TransformerDecoder if isinstance(layer, nn.TransformerDecoder) else TransformerEncoder
    blocks: list[Any] = [convert_layer(block, **encoding) for block in layer.layers]
    norm = None if layer.norm is None else convert_layer(layer.norm)
    return kind(blocks, norm=norm)


_CONVERTERS: dict[type[nn.Module], Callable[[Any, Encoding], nn.Module]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.TransformerEncoderLayer: _block,
    nn.TransformerDecoderLayer: _block,
    nn.TransformerEncoder: _stack,
    nn.TransformerDecoder: _stack,
}
