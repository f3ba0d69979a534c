"""Positional encodings: sine and cosine, computed when needed, and a learnt table from seeds."""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn.embedding import Embedding
from rbe.nn.options import Options, for_matrices


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """PE[p, 2i] = sin(p / 10000^(2i/d)), PE[p, 2i+1] = cos(p / 10000^(2i/d)).

    >>> sinusoids(torch.tensor([0, 1]), 4).round(decimals=3).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.841, 0.54, 0.01, 1.0]]

    Args:
        positions: integers (n,).
        d_model: features; an odd number ends with a sine.

    Returns:
        float64 (n, d_model).

    Source: 000 section 5.7.1.
    """
    even = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * torch.exp(even * (-math.log(10000.0) / d_model))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]


def _span(x: Tensor, d_model: int, batch_first: bool, start: int) -> Tensor:
    """The positions along x (sequence, d), (batch, sequence, d) or (sequence, batch, d)."""
    if x.ndim not in (2, 3) or x.shape[-1] != d_model:
        raise RbeError(f"positional encoding: x is {tuple(x.shape)}; it must be 2-D or 3-D with {d_model} features")
    if not x.is_floating_point():
        raise RbeError(f"positional encoding: x is {x.dtype}; convert it to a float dtype, such as torch.float32")
    if start < 0:
        raise RbeError(f"positional encoding: start {start} is negative; the first position is 0")
    length = x.shape[1] if x.ndim == 3 and batch_first else x.shape[0]
    return torch.arange(start, start + length, device=x.device)


def _added(x: Tensor, encoding: Tensor, batch_first: bool) -> Tensor:
    encoding = encoding.to(x.dtype)
    return x + (encoding[:, None] if x.ndim == 3 and not batch_first else encoding)


class SinusoidalEncoding(nn.Module):
    """x plus sines and cosines of its positions; nothing is stored, and no length is too long.

    >>> SinusoidalEncoding(8, batch_first=True)(torch.zeros(2, 5, 8))[0, 0].tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]

    Args:
        d_model: features.
        dropout: probability with which sums are dropped in training.
        batch_first: x is (batch, sequence, features) instead of (sequence, batch, features).

    Raises:
        RbeError: there are no features; on the forward pass, x does not fit.

    Source: 000 section 5.7.1.
    """

    def __init__(self, d_model: int, dropout: float = 0.0, batch_first: bool = False) -> None:
        super().__init__()
        if d_model < 1:
            raise RbeError(f"SinusoidalEncoding: {d_model} features; there must be 1 at least")
        self.d_model, self.batch_first = d_model, batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x with the encodings of positions start, start + 1, ... added; `start` is for stepwise decoding."""
        positions = _span(x, self.d_model, self.batch_first, start)
        y: Tensor = self.dropout(_added(x, sinusoids(positions, self.d_model), self.batch_first))
        return y

    def extra_repr(self) -> str:
        """Shapes."""
        return f"{self.d_model}, batch_first={self.batch_first}"


class SeededEncoding(nn.Module):
    """x plus rows of a table (max_length, d_model) that is held as seeds and learnt.

    >>> layer = SeededEncoding(100, 8, format="packed64", block=None)
    >>> layer(torch.zeros(5, 8)).shape, layer.table.freeze().seeds.numel() * 8
    (torch.Size([5, 8]), 8)

    Args:
        max_length: rows of the table, the number of positions.
        d_model: features.
        dropout: probability with which sums are dropped in training.
        batch_first: x is (batch, sequence, features) instead of (sequence, batch, features).
        options: as in `Embedding`.

    Raises:
        RbeError: the format does not offer the options; on the forward pass, x is longer than the table.

    Source: 000 section 5.7.2.
    """

    def __init__(
        self,
        max_length: int,
        d_model: int,
        dropout: float = 0.0,
        batch_first: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self.table = Embedding(max_length, d_model, **for_matrices(options))
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x with the rows start, start + 1, ... added; `start` is for stepwise decoding."""
        length, d_model = self.table.spec.shape
        positions = _span(x, d_model, self.batch_first, start)
        if start + positions.numel() > length:
            raise RbeError(
                f"SeededEncoding: positions {start} to {start + positions.numel() - 1} are asked for, but the table "
                f"has {length}; build it longer"
            )
        y: Tensor = self.dropout(_added(x, self.table(positions), self.batch_first))
        return y

    def extra_repr(self) -> str:
        """Layout."""
        return f"batch_first={self.batch_first}"
