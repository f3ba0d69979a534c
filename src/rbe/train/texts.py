"""Networks for text, as torch has their layers; symbols in and out share one table, except in the LSTM."""

import math
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.nn import Seeded, StreamEmbedding
from rbe.nn.position import sinusoids
from rbe.train.config import Config, Model


class CharacterLSTM(nn.Module):
    """A table of characters, LSTM layers and a linear layer."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(model.vocabulary, model.size)
        self.lstm: Any = nn.LSTM(model.size, model.size, model.layers, batch_first=True, dropout=model.dropout)
        self.dropout = nn.Dropout(model.dropout)
        self.linear = nn.Linear(model.size, model.vocabulary)

    def read(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Characters (n, length) to (n, length, vocabulary), and the state after them."""
        y, state = self.lstm(self.embed(x), state)
        return self.linear(self.dropout(y)), state

    def forward(self, x: Tensor) -> Tensor:
        """Characters (n, length) to (n, length, vocabulary), from an empty state."""
        return self.read(x)[0]


# Keys and values of the positions before the one that is next, by attention of a block; and by the number of the block,
# for blocks can be one and the same.
KeptOfBlock: TypeAlias = dict[nn.Module, tuple[Tensor, Tensor]]
Kept: TypeAlias = dict[int, KeptOfBlock]


class Attention(nn.Module):
    """Attention of several heads, to the same sequence or to another."""

    def __init__(self, size: int, heads: int, crosses: bool = False) -> None:
        super().__init__()
        self.heads = heads
        if crosses:
            self.q, self.kv = nn.Linear(size, size), nn.Linear(size, 2 * size)
        else:
            self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        kept: KeptOfBlock | None = None,
    ) -> Tensor:
        """x (n, length, size) to the same; mask (n, 1, 1, length of the memory) is True where there is something.

        Where something is kept, x is one position after those before it, which it attends to.
        """
        if memory is None:
            q, k, v = self.qkv(x).chunk(3, -1)
            if kept is not None:
                if self in kept:
                    k, v = (torch.cat((before, now), 1) for before, now in zip(kept[self], (k, v), strict=True))
                kept[self], causal = (k, v), False
        elif kept is None:
            q, (k, v) = self.q(x), self.kv(memory).chunk(2, -1)
        else:
            kept[self] = k, v = kept[self] if self in kept else self.kv(memory).chunk(2, -1)
            q = self.q(x)
        slow = x.device.type == "cpu"
        # As x also under autocast: in bfloat16 torch's derivative for CPUs takes several times longer.
        q, k, v = (part.to(x.dtype) if slow else part for part in (q, k, v))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        with torch.autocast("cpu", enabled=False) if slow else nullcontext():
            y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, in a decoder also to a memory, and two linear layers, each after a norm and added to its input."""

    def __init__(self, model: Model, crosses: bool = False) -> None:
        super().__init__()
        size = model.size
        self.norm1, self.attention = nn.LayerNorm(size), Attention(size, model.heads)
        self.norm_cross = nn.LayerNorm(size) if crosses else None
        self.cross = Attention(size, model.heads, True) if crosses else None
        self.norm2 = nn.LayerNorm(size)
        self.inner, self.outer = nn.Linear(size, model.inner), nn.Linear(model.inner, size)
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        kept: KeptOfBlock | None = None,
    ) -> Tensor:
        """x (n, length, size); the mask is that of the memory where there is one; `kept` as in `Attention`."""
        own = mask if memory is None else None
        x = x + self.dropout(self.attention(self.norm1(x), mask=own, causal=causal, kept=kept))
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), memory, mask, kept=kept))
        y = functional.gelu(self.inner(self.norm2(x)), approximate="tanh")
        out: Tensor = x + self.dropout(self.outer(y))
        return out


def scores(table: nn.Module, x: Tensor) -> Tensor:
    """x (..., size) against every row of an embedding, dense or of seeds."""
    if isinstance(table, Seeded | StreamEmbedding):
        return table.multiply(x)
    return functional.linear(x, table.weight)  # type: ignore[arg-type]


class Translator(nn.Module):
    """A Transformer of an encoder and a decoder; the table serves both languages and the output."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(model.vocabulary, model.size)
        nn.init.normal_(self.embed.weight, std=model.size**-0.5)
        self.encoder = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.decoder = nn.ModuleList(Block(model, True) for _ in range(model.layers))
        self.norm_in, self.norm_out = nn.LayerNorm(model.size), nn.LayerNorm(model.size)
        self.dropout = nn.Dropout(model.dropout)

    def _enter(self, x: Tensor, at: int = 0) -> Tensor:
        y: Tensor = self.embed(x)
        y = y * math.sqrt(y.shape[-1])
        places = sinusoids(torch.arange(at, at + x.shape[1], device=x.device), y.shape[-1]).to(y.dtype)
        out: Tensor = self.dropout(y + places)
        return out

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols (n, length), 0 where there is none, to a memory (n, length, size) and its mask."""
        there = (source != 0)[:, None, None]
        x = self._enter(source)
        for block in self.encoder:
            x = block(x, mask=there)
        return self.norm_in(x), there

    def decode(self, target: Tensor, memory: Tensor, there: Tensor) -> Tensor:
        """Symbols (n, length) to the scores of what comes after each, (n, length, vocabulary)."""
        x = self._enter(target)
        for block in self.decoder:
            x = block(x, memory, there, causal=True)
        return scores(self.embed, self.norm_out(x))

    def follow(self, symbol: Tensor, at: int, memory: Tensor, there: Tensor, kept: Kept) -> Tensor:
        """Symbols (n,) at a position to the scores of what comes after them, (n, vocabulary).

        Args:
            kept: of the positions before; empty at the first. It is added to.
        """
        x = self._enter(symbol[:, None], at)
        for number, block in enumerate(self.decoder):
            x = block(x, memory, there, kept=kept.setdefault(number, {}))
        return scores(self.embed, self.norm_out(x[:, 0]))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Both sequences to the scores of what comes after each symbol of the target."""
        return self.decode(target, *self.encode(source))


class Gpt(nn.Module):
    """A language model in the shape of GPT-2; places are learned, and the table is also the output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.embed = nn.Embedding(model.vocabulary, model.size)
        self.place = nn.Embedding(config.data.length, model.size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.size)
        self.dropout = nn.Dropout(model.dropout)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                narrow = name.endswith(("out.weight", "outer.weight"))
                nn.init.normal_(p, std=0.02 / (2 * model.layers) ** 0.5 if narrow else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, length) to the scores of what comes after each, (n, length, vocabulary)."""
        y = self.dropout(self.embed(x) + self.place(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            y = block(y, causal=True)
        return scores(self.embed, self.norm(y))
