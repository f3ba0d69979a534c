"""`TransformerBlock`, and the stacks of an encoder and a decoder."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn.attention import KeyValues, MultiheadAttention
from rbe.nn.feedforward import FeedForward
from rbe.nn.norm import LayerNorm, RMSNorm
from rbe.nn.options import Options

NORMS = ("layer", "rms")


@dataclass
class BlockCache:
    """What one block keeps between the steps of decoding: its own keys and values, and those of the memory.

    >>> import torch
    >>> block = TransformerBlock(8, 2, 12, batch_first=True, format="packed128", block=4).eval()
    >>> cache = BlockCache()
    >>> for _ in range(3):
    ...     y = block(torch.randn(1, 1, 8), cache=cache)
    >>> cache.length
    3
    """

    own: KeyValues = field(default_factory=KeyValues)
    cross: KeyValues = field(default_factory=lambda: KeyValues(fixed=True))

    @property
    def length(self) -> int:
        """Positions seen."""
        return self.own.length


class TransformerBlock(nn.Module):
    """Self-attention, attention to a memory in a decoder, and a feed-forward network, each with residual and norm.

    >>> import torch
    >>> from rbe.nn.count import count
    >>> block = TransformerBlock(64, 4, 256, bias="seed", format="packed64", block=None)
    >>> block(torch.randn(5, 2, 64)).shape, count(block).seed_bytes == (3 * 4 + 9) * 8
    (torch.Size([5, 2, 64]), True)

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first: as torch's, the activation by
            name. The norm stands after the residual, as printed, unless `norm_first`.
        bias: True for dense biases and norms; "seed" for what the paper prints: seeds for the biases of the
            feed-forward network and for the norms, and an attention without biases; False for no biases.
        attention_bias: of the attentions alone, where it differs.
        norm: "layer" or "rms"; norm_parameters: "dense" or "seed", where it differs from what `bias` says.
        cross_attention: attend to a memory too, as a decoder does.
        options: as in `Linear`.

    Raises:
        RbeError: a choice is not offered, or the format does not offer the options.

    Source: 000 section 5.8.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool | str = True,
        *,
        attention_bias: bool | str | None = None,
        norm: str = "layer",
        norm_parameters: str | None = None,
        cross_attention: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise RbeError(f"TransformerBlock: norm {norm!r} is not offered; choose one of {', '.join(NORMS)}")
        if attention_bias is None:
            attention_bias = False if bias == "seed" else bias
        parameters = norm_parameters or ("seed" if bias == "seed" else "dense")
        self.norm_first, self.batch_first = norm_first, batch_first

        def attention() -> MultiheadAttention:
            return MultiheadAttention(d_model, nhead, dropout, attention_bias, batch_first=batch_first, **options)

        def normalisation() -> LayerNorm | RMSNorm:
            if norm == "rms":
                return RMSNorm(d_model, layer_norm_eps, parameters=parameters, **options)
            return LayerNorm(d_model, layer_norm_eps, True, bias is not False, parameters=parameters, **options)

        self.attention = attention()
        self.norm1 = normalisation()
        self.cross = attention() if cross_attention else None
        self.norm_cross = normalisation() if cross_attention else None
        self.feedforward = FeedForward(d_model, dim_feedforward, activation, dropout, bias, **options)
        self.norm2 = normalisation()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """x (sequence, batch, d_model), batch first if the block is so, or (sequence, d_model), to the same shape.

        Args:
            memory: what a decoder's block attends to; with a cache only the first call reads it.
            mask, key_padding_mask, is_causal: of the self-attention, as in `MultiheadAttention`.
            memory_mask, memory_key_padding_mask: of the attention to the memory.
            cache: from `new_cache` of a stack, or a `BlockCache`; x then follows the positions in it.

        Raises:
            RbeError: a shape does not fit, or a memory is missing, or nobody would attend to it.
        """
        if (memory is None) != (self.cross is None):
            raise RbeError(
                "TransformerBlock: a block with cross_attention=True needs a memory, "
                f"and no other takes one; this has {'none' if self.cross is None else 'it'}"
            )

        def attend(y: Tensor) -> Tensor:
            own = None if cache is None else cache.own
            z = self.attention(y, y, y, key_padding_mask, False, mask, is_causal=is_causal, cache=own)[0]
            return self.dropout(z)  # type: ignore[no-any-return]

        def look_back(y: Tensor) -> Tensor:
            assert self.cross is not None
            seen = None if cache is None else cache.cross
            z = self.cross(y, memory, memory, memory_key_padding_mask, False, memory_mask, cache=seen)[0]
            return self.dropout(z)  # type: ignore[no-any-return]

        def feed(y: Tensor) -> Tensor:
            return self.dropout(self.feedforward(y))  # type: ignore[no-any-return]

        steps = [(attend, self.norm1), (feed, self.norm2)]
        if self.norm_cross is not None:
            steps.insert(1, (look_back, self.norm_cross))
        for step, norm in steps:
            x = x + step(norm(x)) if self.norm_first else norm(x + step(x))
        return x

    def extra_repr(self) -> str:
        """Order of the norm."""
        return f"norm_first={self.norm_first}, batch_first={self.batch_first}"


def _stack(
    name: str, layer: TransformerBlock | Sequence[TransformerBlock], num_layers: int | None, crosses: bool
) -> nn.ModuleList:
    if isinstance(layer, TransformerBlock):
        if num_layers is None or num_layers < 1:
            raise RbeError(f"{name}: num_layers {num_layers} is not positive; one block is copied so often")
        layers = [copy.deepcopy(layer) for _ in range(num_layers)]
        for block in layers[1:]:
            # Children first: a printed norm turns its gain positive after its vector has drawn new seeds.
            for module in reversed(list(block.modules())):
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
    else:
        layers = list(layer)
        if not layers or num_layers not in (None, len(layers)):
            raise RbeError(f"{name}: {len(layers)} blocks are given, but num_layers is {num_layers}")
    if any((block.cross is not None) != crosses for block in layers):
        raise RbeError(f"{name}: its blocks must be made with cross_attention={crosses}")
    return nn.ModuleList(layers)


class TransformerEncoder(nn.Module):
    """A stack of blocks; with is_causal and a cache also the body of a decoder-only language model.

    >>> import torch
    >>> block = TransformerBlock(32, 2, 64, norm_first=True, batch_first=True, format="packed128")
    >>> stack = TransformerEncoder(block, 2, LayerNorm(32)).eval()
    >>> x, cache = torch.randn(1, 4, 32), stack.new_cache()
    >>> steps = [stack(x[:, t : t + 1], is_causal=True, cache=cache) for t in range(4)]
    >>> bool((torch.cat(steps, 1) - stack(x, is_causal=True)).abs().max() < 1e-5)
    True

    Args:
        encoder_layer: a block, of which `num_layers` copies are made, each after the first with fresh seeds of its own;
            or the blocks themselves.
        num_layers: number of copies.
        norm: applied at the end; usual where norms come first.

    Raises:
        RbeError: there is no block, or one of them attends to a memory.
    """

    def __init__(
        self,
        encoder_layer: TransformerBlock | Sequence[TransformerBlock],
        num_layers: int | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = _stack("TransformerEncoder", encoder_layer, num_layers, False)
        self.norm = norm

    def new_cache(self) -> list[BlockCache]:
        """An empty cache for every block, for stepwise decoding."""
        return [BlockCache() for _ in self.layers]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: list[BlockCache] | None = None,
    ) -> Tensor:
        """src as in `TransformerBlock`, to the same shape."""
        x = src
        for k, layer in enumerate(self.layers):
            own = None if cache is None else cache[k]
            x = layer(x, mask=mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal, cache=own)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(nn.Module):
    """A stack of blocks that attend to a memory too.

    >>> import torch
    >>> block = TransformerBlock(32, 2, 64, cross_attention=True, format="packed128")
    >>> TransformerDecoder(block, 2)(torch.randn(4, 3, 32), torch.randn(7, 3, 32), tgt_is_causal=True).shape
    torch.Size([4, 3, 32])

    Args:
        decoder_layer: a block with cross_attention=True, copied as in `TransformerEncoder`; or the blocks themselves.
        num_layers: number of copies.
        norm: applied at the end; usual where norms come first.

    Raises:
        RbeError: there is no block, or one of them does not attend to a memory.
    """

    def __init__(
        self,
        decoder_layer: TransformerBlock | Sequence[TransformerBlock],
        num_layers: int | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = _stack("TransformerDecoder", decoder_layer, num_layers, True)
        self.norm = norm

    def new_cache(self) -> list[BlockCache]:
        """An empty cache for every block, for stepwise decoding."""
        return [BlockCache() for _ in self.layers]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        cache: list[BlockCache] | None = None,
    ) -> Tensor:
        """tgt as in `TransformerBlock`, to the same shape; memory is what an encoder returned."""
        x = tgt
        for k, layer in enumerate(self.layers):
            x = layer(
                x,
                memory,
                mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal,
                memory_mask=memory_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                cache=None if cache is None else cache[k],
            )
        return x if self.norm is None else self.norm(x)
