"""`MultiheadAttention` with seeds of its own for every head, and the cache of keys and values for stepwise decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rbe.errors import RbeError
from rbe.nn.linear import Linear
from rbe.nn.options import Options, for_matrices
from rbe.nn.recording import transformed


@dataclass
class KeyValues:
    """Keys and values that an attention has seen: (batch, heads, positions, features of a head), None at first.

    >>> cache = KeyValues()
    >>> layer = MultiheadAttention(16, 2, batch_first=True)
    >>> for token in torch.randn(4, 1, 1, 16):
    ...     _ = layer(token, is_causal=True, cache=cache)
    >>> cache.length
    4

    Attributes:
        fixed: the first keys and values stay, as those of an encoder's memory do; later calls project none.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    fixed: bool = False

    @property
    def length(self) -> int:
        """Positions seen."""
        return 0 if self.key is None else self.key.shape[-2]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), -2), torch.cat((self.value, value), -2)
        self.key, self.value = key, value
        return key, value


class MultiheadAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_k)) V for several heads, joined by an output matrix; constructor shapes like torch's.

    >>> layer = MultiheadAttention(64, 4, bias=False, batch_first=True, format="packed64", block=None)
    >>> x = torch.randn(2, 5, 64)
    >>> layer(x, x, x)[0].shape, sum(m.matrix.seeds.numel() * 8 for m in layer.modules() if isinstance(m, Linear))
    (torch.Size([2, 5, 64]), 104)

    Every head has seeds of its own: with block=None one seed for each of its query, key and value matrices, which are
    (3h + 1) x 8 bytes with packed64. Where the heads fall on block borders, one matrix holds the seeds of all of them
    in its rows, and its product is one call. Matrices are (out, in) as everywhere in torch, also those of a head, which
    the papers print as (d_model, d_k) and multiply from the right: `head_matrix` gives them as printed.

    Args:
        embed_dim: features of the query and of the output.
        num_heads: must divide embed_dim.
        dropout: probability with which attention weights are dropped in training.
        bias: True for dense biases, "seed" for one seed a matrix, False for none, as printed.
        kdim, vdim: features of key and value, embed_dim where None.
        batch_first: x is (batch, sequence, features) instead of (sequence, batch, features).
        options: as in `Linear`.

    Raises:
        RbeError: the heads do not divide, or the format does not offer the options.

    Source: 000 section 5.3.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool | str = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._arrange(embed_dim, num_heads, dropout, kdim, vdim, batch_first)
        block, rotation = options.get("block", 16), options.get("rotation", (0, 0))
        together = block is not None and block > 0 and self.head_dim % block == 0 and not rotation[0]
        parts = 1 if together else num_heads
        options = for_matrices(options)
        for name, columns in (("q", embed_dim), ("k", self.kdim), ("v", self.vdim)):
            heads = (Linear(columns, embed_dim // parts, bias, **options) for _ in range(parts))
            setattr(self, name, nn.ModuleList(heads))
        self.o = Linear(embed_dim, embed_dim, bias, **options)

    q: nn.ModuleList
    k: nn.ModuleList
    v: nn.ModuleList
    o: Linear

    def _arrange(
        self, embed_dim: int, num_heads: int, dropout: float, kdim: int | None, vdim: int | None, batch_first: bool
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise RbeError(f"MultiheadAttention: {num_heads} heads do not divide embed_dim {embed_dim}")
        if not 0.0 <= dropout <= 1.0:
            raise RbeError(f"MultiheadAttention: dropout {dropout} is no probability; give 0 to 1")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first

    @classmethod
    def from_linears(
        cls,
        parts: Mapping[str, Sequence[Linear]],
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> Self:
        """A layer around matrices that exist already.

        Args:
            parts: for each of "q", "k" and "v" either one layer for all heads or one a head, and for "o" one layer.

        Raises:
            RbeError: a part is missing, or its sides do not fit.
        """
        missing = sorted({"q", "k", "v", "o"} - set(parts))
        if missing or len(parts.get("o", ())) != 1:
            raise RbeError(f"MultiheadAttention: {missing or 'one layer for o'} missing; give q, k, v and o")
        embed_dim = parts["o"][0].spec.shape[0]
        layer = cls.__new__(cls)
        kdim, vdim = (parts[name][0].spec.shape[1] for name in ("k", "v"))
        layer._arrange(embed_dim, num_heads, dropout, kdim, vdim, batch_first)
        for name, columns in (("q", embed_dim), ("k", kdim), ("v", vdim), ("o", embed_dim)):
            count = len(parts[name])
            wanted = (embed_dim // count, columns)
            if count not in (1, num_heads) or any(part.spec.shape != wanted for part in parts[name]):
                shapes = [part.spec.shape for part in parts[name]]
                raise RbeError(
                    f"MultiheadAttention: {name} has {shapes}; it takes one matrix ({embed_dim}, {columns}) or "
                    f"{num_heads} of {embed_dim // num_heads} rows"
                )
            setattr(layer, name, parts[name][0] if name == "o" else nn.ModuleList(parts[name]))
        return layer

    def head_matrix(self, name: str, head: int) -> Tensor:
        """The matrix of one head as printed, (features, d_k), decoded now: x is multiplied by it from the right.

        Args:
            name: "q", "k" or "v".

        Raises:
            RbeError: there is no such matrix.
        """
        if name not in ("q", "k", "v") or not 0 <= head < self.num_heads:
            raise RbeError(f"head_matrix: {name!r} of head {head} is not there; q, k and v have {self.num_heads} heads")
        parts: nn.ModuleList = getattr(self, name)
        if len(parts) > 1:
            return parts[head].dense().T  # type: ignore[operator, no-any-return]
        whole: Tensor = parts[0].dense()  # type: ignore[operator]
        return whole[head * self.head_dim : (head + 1) * self.head_dim].T

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        cache: KeyValues | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments of torch's layer, but `need_weights` is off unless asked for, as it costs memory.

        Args:
            query: (sequence, batch, embed_dim), batch first if the layer is so, or (sequence, embed_dim).
            key, value: likewise with the source's length; None is the query, and None for value is the key.
            key_padding_mask: (batch, source), True where a key is left out, or floats to add.
            attn_mask: (target, source) or (batch * heads, target, source), True where nobody looks, or floats to add.
            is_causal: let no position see a later one; needs no attn_mask. With a cache the positions of the query
                follow those in it.
            cache: keys and values of earlier calls, which this call extends; sources are then all of them.

        Returns:
            the output in the query's shape; the weights (batch, target, source), or with all heads where
            average_attn_weights is off, or None.

        Raises:
            RbeError: a shape or a dtype does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value)
        batched = query.ndim == 3
        q, k, v = (self._in(x, batched) for x in (query, key, value))
        heads = self._project("q", q)
        if cache is not None and cache.fixed and cache.key is not None and cache.value is not None:
            keys, values = cache.key, cache.value
        else:
            keys, values = self._project("k", k), self._project("v", v)
            if cache is not None:
                keys, values = cache.extend(keys, values)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.reshape(1, -1)
        mask = self._mask(heads, keys.shape[-2], key_padding_mask, attn_mask, is_causal)
        y, weights = self._attend(heads, keys, values, mask, need_weights)
        y = self.o(y.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return (y[0] if not batched else y if self.batch_first else y.transpose(0, 1)), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != width:
                raise RbeError(
                    f"MultiheadAttention: {name} is {tuple(x.shape)} beside a query {tuple(query.shape)}; all must be "
                    f"2-D or all 3-D, and {name} have {width} features"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise RbeError(
                f"MultiheadAttention: key is {tuple(key.shape)} and value {tuple(value.shape)}; they must be equally "
                "long"
            )

    def _in(self, x: Tensor, batched: bool) -> Tensor:
        """x as (batch, sequence, features)."""
        return x[None] if not batched else x if self.batch_first else x.transpose(0, 1)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """(batch, heads, sequence, d_k)."""
        parts: nn.ModuleList = getattr(self, name)
        y = parts[0](x) if len(parts) == 1 else torch.cat([part(x) for part in parts], -1)
        return y.reshape(*y.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, heads: Tensor, source: int, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """What is added to the scores, (batch or 1, heads or 1, target or 1, source); None for nothing."""
        batch, target = heads.shape[0], heads.shape[-2]
        parts = []
        for name, given in (("key_padding_mask", padding), ("attn_mask", mask)):
            if given is not None and given.dtype != torch.bool and not given.is_floating_point():
                raise RbeError(
                    f"MultiheadAttention: {name} is {given.dtype}; give torch.bool, True where nobody looks, or floats "
                    "to add"
                )
        if padding is not None:
            if padding.shape != (batch, source):
                raise RbeError(
                    f"MultiheadAttention: key_padding_mask is {tuple(padding.shape)}; it must be {(batch, source)}"
                )
            parts.append(_added(padding, heads)[:, None, None])
        if mask is not None:
            if mask.shape not in ((target, source), (batch * self.num_heads, target, source)):
                raise RbeError(
                    f"MultiheadAttention: attn_mask is {tuple(mask.shape)}; it must be {(target, source)} or "
                    f"{(batch * self.num_heads, target, source)}"
                )
            added = _added(mask, heads)
            parts.append(added.reshape(batch, self.num_heads, target, source) if added.ndim == 3 else added)
        if is_causal and target > 1:
            later = torch.ones(target, source, dtype=torch.bool, device=heads.device).triu(source - target + 1)
            parts.append(_added(later, heads))
        total = None
        for part in parts:
            total = part if total is None else total + part
        return total

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = nn.functional.dropout(weights, dropout) if dropout else weights
            return weights @ v, weights
        if mask is not None and mask.ndim < 4:
            mask = mask.expand(1, 1, *mask.shape)
        if transformed():
            # The fused backends know neither forward derivatives nor vmap.
            with sdpa_kernel(SDPBackend.MATH):
                return scaled_dot_product_attention(q, k, v, mask, dropout), None
        return scaled_dot_product_attention(q, k, v, mask, dropout), None

    def extra_repr(self) -> str:
        """Shapes."""
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
