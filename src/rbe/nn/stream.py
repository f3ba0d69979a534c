"""Layers whose matrix and bias are one stream of bits, trained as whole numbers: for ratios beyond 250:1."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.formats.stream import LARGEST
from rbe.kernels import stream
from rbe.kernels.sparse import Sparse
from rbe.kernels.tensors import unwatched

# Share of a matrix that is not 0 above which a dense product is faster than one of what is there.
DENSE = 0.4
# What a state dict says of a stream beside its tensors.
_ABOUT = "rbe.stream"


class _Rounded(torch.autograd.Function):
    """The nearest level, with the gradient of what was rounded (straight through)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round().clamp_(-LARGEST, LARGEST)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


class Stream(nn.Module):
    """A module around one matrix of the format `stream`: W = scale * levels, most of them 0, the bias a last column.

    It is in one of two states:

    * Open, to be trained: Parameters `latent`, whose rounded values are the levels, and `log_scale`, the natural
      logarithm of the scale. `rbe.optim.StreamAdam` weighs every level by the bits it costs.
    * Frozen, as files are: buffers `seed`, uint8 (bytes,), and `scale`, float32.

    >>> from rbe.nn import StreamLinear
    >>> layer = StreamLinear(32, 16)
    >>> isinstance(layer, Stream), layer.latent.shape, layer.freeze().seed.dtype
    (True, torch.Size([16, 33]), torch.uint8)

    Attributes:
        shape: (rows, columns) of the matrix, rows being outputs as in torch; the bias is not counted.
        cells: columns of one input channel.
        bias: whether there is one; it is in the seed.
        open_shape: (rows, columns) of the corner that may have weights; everything outside is 0 for ever, which costs
            next to no bits, and no time in training.
        slim: what is always 0 is left out of the outputs, where the next layer expects that. A layer takes inputs with
            all features or with those of its corner alone.
    """

    seed: Tensor
    scale: Tensor
    latent: Tensor
    log_scale: Tensor

    def __init__(
        self, shape: tuple[int, int], cells: int, bias: bool, spread: float, open_shape: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.shape, self.cells, self.bias, self.spread, self.slim = shape, cells, bias, spread, False
        self.open_shape = rows, columns = shape if open_shape is None else open_shape
        if not all(1 <= part <= whole for part, whole in zip(self.open_shape, shape, strict=True)):
            raise RbeError(f"{type(self).__name__}: the corner {self.open_shape} is not within the matrix {shape}")
        if not 0 < spread < math.inf:
            raise RbeError(f"{type(self).__name__}: spread is {spread}; it must be positive")
        deviation = (2 / columns) ** 0.5
        latent = torch.randn(rows, columns) / spread
        self.latent = nn.Parameter(functional.pad(latent, (0, 1)) if bias else latent)
        self.log_scale = nn.Parameter(torch.tensor(math.log(spread * deviation)))
        self._decoded: tuple[Tensor, Sparse] | None = None
        # What a frozen layer was cast to; its scale never is.
        self._dtype = torch.float32

    @torch.no_grad()
    def start(self, matrix: Tensor, bias: Tensor | None = None) -> Self:
        """Begin at given weights: the scale is `spread` times their root mean square, the latents are the weights.

        >>> layer = StreamLinear(20, 40, spread=0.25)
        >>> weight = torch.randn(40, 20)
        >>> _ = layer.start(weight)
        >>> bool((layer.weight - weight).abs().max() <= 0.15)
        True

        Args:
            matrix: (rows, columns), or a kernel with as many; what lies outside the open corner is left out.
            bias: (rows,), zeros when left out; of no meaning to a layer that has none.

        Raises:
            RbeError: the layer is frozen, or the weights have other sides or are not finite.
        """
        matrix = matrix.detach().flatten(1).float()
        given = torch.zeros(self.shape[0]) if bias is None else bias.detach().float()
        if not self.trainable:
            raise RbeError(f"{type(self).__name__}: a frozen stream cannot start anew; build an open one")
        if tuple(matrix.shape) != self.shape or given.shape != (self.shape[0],):
            raise RbeError(
                f"{type(self).__name__}: the weights to start at are {tuple(matrix.shape)} with a bias of "
                f"{tuple(given.shape)}; the layer is {self.shape}"
            )
        if not (matrix.isfinite().all() and given.isfinite().all()):
            raise RbeError(f"{type(self).__name__}: the weights to start at are not all finite; give others")
        rows, columns = self.open_shape
        matrix = matrix[:rows, :columns]
        size = float(matrix.square().mean().sqrt())
        if size:
            self.log_scale.fill_(math.log(self.spread * size))
        whole = torch.cat((matrix, given[:rows, None].to(matrix)), 1) if self.bias else matrix
        self.latent.copy_((whole / self.log_scale.exp()).clamp(-LARGEST, LARGEST))
        return self

    @property
    def trainable(self) -> bool:
        """Whether the layer is open."""
        return "latent" in self._parameters

    @property
    def levels(self) -> Tensor:
        """The whole numbers: int16 (rows, columns), or (rows, columns + 1) with a bias."""
        if not self.trainable:
            return stream.unpack(self.seed.cpu(), self.shape, cells=self.cells, bias=self.bias)
        with torch.no_grad():
            return self._whole(self.latent.round().clamp(-LARGEST, LARGEST)).to(torch.int16)

    def pack(self) -> Tensor:
        """The seed, uint8 (bytes,)."""
        if not self.trainable:
            return self.seed
        return stream.pack(self.levels.cpu(), cells=self.cells, bias=self.bias)

    def freeze(self) -> Self:
        """Pack the latents into the seed, in place: what files hold.

        Raises:
            RbeError: a latent or the scale is not finite.
        """
        if self.trainable:
            if not (self.latent.isfinite().all() and self.log_scale.exp().isfinite()):
                raise RbeError(
                    f"{type(self).__name__}: a latent or the scale is not finite; training has diverged, lower its rate"
                )
            seed, scale = self.pack().to(self.latent.device), self.log_scale.detach().exp()
            del self.latent, self.log_scale
            self.register_buffer("seed", seed)
            self.register_buffer("scale", scale)
        return self

    def shut(self) -> Self:
        """Be frozen and 0, in place, for a loader to fill."""
        for name in ("latent", "log_scale"):
            self._parameters.pop(name, None)
        self.register_buffer("seed", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(()))
        self._decoded = None
        return self

    def __getstate__(self) -> dict[str, object]:
        """Copies and files read the seed anew."""
        return {**self.__dict__, "_decoded": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "_decoded": None})  # type: ignore[no-untyped-call]

    @property
    def sides(self) -> tuple[int, ...]:
        """Shape of the weight as torch's layer has it."""
        return self.shape

    def _about(self) -> dict[str, object]:
        """What a seed is read by, and stays silent about."""
        return {"shape": self.shape, "cells": self.cells, "bias": self.bias, "open_shape": self.open_shape}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if about is not None:
            about[_ABOUT] = self._about()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, unexpected_keys: Any,
        error_msgs: list[str],
    ) -> None:  # fmt: skip
        seed = state_dict.get(f"{prefix}seed")
        stored = local_metadata.get(_ABOUT)
        # Another reading of the same bits makes other weights without a word.
        if stored is not None and stored != self._about():
            name, own = prefix.removesuffix(".") or type(self).__name__, self._about()
            error_msgs.append(f"{name}: the state is of a stream with {stored}, this one has {own}; build it as it was")
            return
        # The length of a seed is known only by the file.
        if seed is not None and not self.trainable:
            self.seed = torch.empty_like(seed, device=self.seed.device)
            self._decoded = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        new = self._buffers.get("scale")
        # .half() and .to(bfloat16) cast every float buffer; the scale keeps its exact value.
        if scale is not None and new is not None:
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
            self._buffers["scale"] = new if new.dtype == scale.dtype else scale.to(new.device)
        return self

    def stored(self) -> tuple[int, int]:
        """(weights that the matrix has, bytes of the seed); the scale is 4 bytes more."""
        return self.shape[0] * self.shape[1], len(self.pack())

    @property
    def weight(self) -> Tensor:
        """The dense matrix (rows, columns), made now and forgotten afterwards."""
        with torch.no_grad():
            return self._parts(self._whole(self.corner()))[0]

    def corner(self) -> Tensor:
        """What may have weights, the bias last: (open rows, open columns [+ 1]) float32, with gradients if open."""
        if self.trainable:
            rounded: Tensor = _Rounded.apply(self.latent)  # type: ignore[no-untyped-call]
            return rounded * self.log_scale.exp()
        return self._entries().decode().to(self.scale) * self.scale

    def _entries(self) -> Sparse:
        """Of a frozen seed: what the open corner has, read once and kept."""
        if self._decoded is None or self._decoded[0] is not self.seed:
            self._decoded = self.seed, self._read()
        return self._decoded[1]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self) -> Sparse:
        rows, columns = self.open_shape
        levels = self.levels[:rows]
        return Sparse(levels[:, :columns], levels[:, -1] if self.bias else None)

    def _alone(self, x: Tensor) -> bool:
        """Whether nobody watches what happens to x and the seed: no autograd, no compiler, no other device."""
        if torch.compiler.is_compiling() or not unwatched((x, self.seed)) or x._is_zerotensor():
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad))

    def multiplies(self, x: Tensor) -> bool:
        """Whether the layer is frozen and multiplies inputs like x without a dense matrix."""
        return self._fast(x) is not None

    def _fast(self, x: Tensor) -> Sparse | None:
        """What multiplies x without a dense matrix; None where autograd, a compiler or another device watches."""
        if self.trainable or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return None
        if not self._alone(x) or x.is_neg():
            return None
        entries = self._entries()
        return entries if entries.density <= DENSE else None

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(open corner, its bias or None), made now, with gradients if open."""
        return self._parts(self.corner().to(dtype))

    def _parts(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        return (matrix[:, :-1], matrix[:, -1]) if self.bias else (matrix, None)

    def _whole(self, corner: Tensor) -> Tensor:
        """The corner within zeros."""
        matrix, bias = self._parts(corner)
        down, right = self.shape[0] - matrix.shape[0], self.shape[1] - matrix.shape[1]
        whole = functional.pad(matrix, (0, right, 0, down))
        return whole if bias is None else torch.cat([whole, functional.pad(bias, (0, down))[:, None]], 1)


class StreamLinear(Stream):
    """y = W x + b with W and b in one stream of bits; constructor shapes like torch's.

    >>> layer = StreamLinear(20, 40)
    >>> layer(torch.randn(3, 20)).shape, sorted(layer.freeze().state_dict())
    (torch.Size([3, 40]), ['scale', 'seed'])

    Args:
        in_features, out_features, bias: as torch's.
        cells: columns that belong together, for instance the pixels of a row of an image.
        spread: the scale at the start, in deviations of fresh weights; 2 makes two thirds of the levels 0.
        open_shape: see `Stream`.

    Raises:
        RbeError: a number does not fit; on the forward pass, x has other features.

    Source: D. Oktay et al., arXiv 1906.06624, for entropy-penalised whole numbers; the code is `rbe.formats.stream`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        cells: int = 1,
        spread: float = 2.0,
        open_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__((out_features, in_features), cells, bias, spread, open_shape)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype."""
        if x.ndim < 1 or x.shape[-1] not in (self.in_features, self.open_shape[1]):
            raise RbeError(f"StreamLinear: x is {tuple(x.shape)}; its last side must be {self.in_features}")
        x = x[..., : self.open_shape[1]]
        entries = self._fast(x)
        if entries is not None:
            y = entries.matmul(x.float().reshape(-1, x.shape[-1]), float(self.scale))
            y = y.view(*x.shape[:-1], self.open_shape[0])
            y = y if x.dtype == torch.float32 else y.to(x.dtype)
        else:
            y = functional.linear(x, *self.matrix(x.dtype))
        return (
            y
            if self.slim or self.open_shape[0] == self.shape[0]
            else functional.pad(y, (0, self.out_features - self.open_shape[0]))
        )

    def extra_repr(self) -> str:
        """Shapes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias}"


class StreamConv2d(Stream):
    """Convolution over an image with kernel and bias in one stream of bits; constructor shapes like torch's.

    >>> StreamConv2d(4, 8, 3, padding=1)(torch.randn(2, 4, 7, 7)).shape
    torch.Size([2, 8, 7, 7])

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as torch's.
        spread, open_shape: as for `StreamLinear`; the matrix is (out_channels, in_channels * cells of the kernel).

    Raises:
        RbeError: a number does not fit; on the forward pass, x has other channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        spread: float = 2.0,
        open_shape: tuple[int, int] | None = None,
    ) -> None:
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        cells = kernel[0] * kernel[1]
        super().__init__((out_channels, in_channels * cells), cells, bias, spread, open_shape)
        if self.open_shape[1] % cells:
            raise RbeError(f"StreamConv2d: {self.open_shape[1]} open columns are no whole channels of {cells} cells")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (kernel[0], kernel[1])
        self.stride, self.padding = stride, padding

    @property
    def _window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Kernel, stride and padding of both sides."""
        stride, padding = ((s, s) if isinstance(s, int) else (s[0], s[-1]) for s in (self.stride, self.padding))
        return self.kernel_size, stride, padding

    @property
    def sides(self) -> tuple[int, ...]:
        """Shape of the kernel: (out_channels, in_channels, height, width)."""
        return self.out_channels, self.in_channels, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_channels, height, width), in x's dtype."""
        if x.ndim != 4 or x.shape[1] not in (self.in_channels, self.open_shape[1] // self.cells):
            raise RbeError(f"StreamConv2d: x is {tuple(x.shape)}; it must be (n, {self.in_channels}, height, width)")
        rows, columns = self.open_shape
        x = x[:, : columns // self.cells]
        entries = None if isinstance(self.padding, str) else self._fast(x)
        if entries is not None and entries.convolves(x, *self._window):
            y = entries.conv2d(x.float(), float(self.scale), *self._window).to(x.dtype)
        else:
            weight, bias = self.matrix(x.dtype)
            kernel = weight.reshape(rows, -1, *self.kernel_size)
            # Of the layouts the processors of today offer, the faster one for few channels.
            x = x.contiguous(memory_format=torch.channels_last)
            y = functional.conv2d(x, kernel, bias, self.stride, self.padding)
        return (
            y
            if self.slim or self.open_shape[0] == self.shape[0]
            else functional.pad(y, (0, 0, 0, 0, 0, self.out_channels - rows))
        )

    def extra_repr(self) -> str:
        """Shapes."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias}"
        )


class StreamEmbedding(Stream):
    """A table whose rows are in one stream of bits; constructor shapes like torch's.

    >>> table = StreamEmbedding(100, 32)
    >>> x = table(torch.tensor([[3, 5, 99]]))
    >>> x.shape, table.multiply(x).shape
    (torch.Size([1, 3, 32]), torch.Size([1, 3, 100]))

    Args:
        num_embeddings, embedding_dim: as torch's.
        spread: as for `StreamLinear`.

    Raises:
        RbeError: a number does not fit; on the forward pass, an index is outside the table or no whole number.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, spread: float = 2.0) -> None:
        super().__init__((num_embeddings, embedding_dim), 1, False, spread, None)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table, (*index.shape, embedding_dim) float32."""
        if index.dtype not in (torch.int32, torch.int64):
            raise RbeError(f"StreamEmbedding: the index is {index.dtype}; it must be int32 or int64")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_embeddings:
            raise RbeError(
                f"StreamEmbedding: indices are {int(index.min())} to {int(index.max())}, but the table has "
                f"{self.num_embeddings} rows"
            )
        if not self.trainable:
            # What was read of a seed is on the CPU.
            made = self._entries().rows(index.flatten().long().cpu(), float(self.scale))
            return made.view(*index.shape, self.embedding_dim).to(index.device, self._dtype)
        # Only the rows that are looked up are rounded.
        rows: Tensor = _Rounded.apply(functional.embedding(index, self.latent))  # type: ignore[no-untyped-call]
        return rows * self.log_scale.exp()

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., embedding_dim) against every row, as a tied output: (..., num_embeddings)."""
        if x.ndim < 1 or x.shape[-1] != self.embedding_dim:
            raise RbeError(f"StreamEmbedding: x is {tuple(x.shape)}; its last side must be {self.embedding_dim}")
        entries = self._fast(x)
        if entries is None:
            return functional.linear(x, self.corner().to(x.dtype))
        y: Tensor = entries.matmul(x.float().reshape(-1, x.shape[-1]), float(self.scale))
        return y.view(*x.shape[:-1], self.num_embeddings).to(x.dtype)

    def extra_repr(self) -> str:
        """Shapes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def streams(model: nn.Module) -> list[Stream]:
    """Every layer of a stream in a model, each once."""
    return [module for module in model.modules() if isinstance(module, Stream)]
