"""`Conv1d` and `Conv2d`: convolutions whose kernel is generated when it is needed."""

from collections.abc import Callable
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.options import Options, factory, for_matrices, seeded_vector
from rbe.nn.recording import made_again
from rbe.nn.seeded import Seeded, SeededVector

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Sides = int | tuple[int, ...]


class Convolution(Seeded):
    """What `Conv1d` and `Conv2d` share: the matrix is (out_channels, in_channels / groups * kernel cells).

    A kernel of one cell without groups is a product with the matrix, in which no weight is stored. Any other kernel is
    decoded for the call and dropped after it, and decoded again for the backward pass.
    """

    bias: Tensor | None
    bias_seed: SeededVector | None
    sides = 0  # of an image, beside batch and channels

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        bias: bool | str = True,
        padding_mode: str = "zeros",
        **options: Unpack[Options],
    ) -> None:
        kernel = self._sides("kernel_size", kernel_size, 1)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise RbeError(
                f"{type(self).__name__}: groups {groups} must divide both {in_channels} input and {out_channels} "
                "output channels"
            )
        cells = in_channels // groups
        for side in kernel:
            cells *= side
        choices: dict[str, Any] = {**for_matrices(options)}
        device, dtype = choices.pop("device", None), choices.pop("dtype", None)
        spec = formats.make_spec(choices.pop("format", "trellis"), (out_channels, cells), **choices)
        super().__init__(spec, trainable=formats.is_disk(spec.format), device=device, dtype=dtype)
        self._arrange(in_channels, kernel, stride, padding, dilation, groups, padding_mode)
        self._add_bias(bias, {**options, "format": spec.format})

    def _sides(self, name: str, value: Any, least: int) -> tuple[int, ...]:
        sides = (value,) * self.sides if isinstance(value, int) else tuple(value)
        if len(sides) != self.sides or min(sides) < least:
            raise RbeError(
                f"{type(self).__name__}: {name} {value!r} is not one number, or {self.sides}, of at least {least}"
            )
        return sides

    def _arrange(
        self,
        in_channels: int,
        kernel: tuple[int, ...],
        stride: Sides,
        padding: Sides | str,
        dilation: Sides,
        groups: int,
        padding_mode: str,
    ) -> None:
        """Everything but the tensors."""
        name = type(self).__name__
        if padding_mode not in PADDING_MODES:
            raise RbeError(f"{name}: padding_mode {padding_mode!r} is not offered; choose one of {PADDING_MODES}")
        self.in_channels, self.out_channels, self.groups = in_channels, self.spec.shape[0], groups
        self.kernel_size = kernel
        self.stride = self._sides("stride", stride, 1)
        self.dilation = self._sides("dilation", dilation, 1)
        self.padding_mode = padding_mode
        self.padding = padding if isinstance(padding, str) else self._sides("padding", padding, 0)
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise RbeError(f"{name}: padding {self.padding!r} is not offered; give numbers, 'same' or 'valid'")
            if self.padding == "same" and set(self.stride) != {1}:
                raise RbeError(f"{name}: padding 'same' has no meaning with stride {self.stride}; give numbers")
        ends = []  # (before, after) of every side
        for k, side in enumerate(kernel):
            if isinstance(self.padding, str):
                total = self.dilation[k] * (side - 1) if self.padding == "same" else 0
                ends.append((total // 2, total - total // 2))
            else:
                ends.append((self.padding[k], self.padding[k]))
        self._ends = tuple(ends)

    def _add_bias(self, bias: bool | str, options: Options) -> None:
        if bias not in (True, False, "seed"):
            raise RbeError(f"{type(self).__name__}: bias {bias!r} is not offered; choose True (dense), 'seed' or False")
        bound = self.spec.shape[1] ** -0.5
        values = torch.empty(self.out_channels, **factory(options)) if bias is True else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        if self.bias is not None and not self.bias.is_meta:
            nn.init.uniform_(self.bias, -bound, bound)
        seed = seeded_vector(self.out_channels, options, bound / 3**0.5) if bias == "seed" else None
        self.register_module("bias_seed", seed)

    @classmethod
    def from_spec(
        cls,
        spec: SeedSpec,
        in_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        row_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An unfilled layer for a loader, usually on the meta device.

        Raises:
            RbeError: the matrix is not (out_channels, in_channels / groups * kernel cells).
        """
        layer = cls.__new__(cls)
        Seeded.__init__(layer, spec, row_scale=row_scale, device=device, dtype=dtype)
        kernel = layer._sides("kernel_size", kernel_size, 1)
        layer._arrange(in_channels, kernel, stride, padding, dilation, groups, padding_mode)
        cells = in_channels
        for side in kernel:
            cells *= side
        if groups < 1 or spec.shape[0] % groups or spec.shape[1] * groups != cells:
            raise RbeError(
                f"{cls.__name__}: the matrix is {spec.shape}, but {in_channels} channels in {groups} groups with a "
                f"kernel of {kernel} take ({spec.shape[0]}, {cells // max(groups, 1)})"
            )
        layer._add_bias(bias, {"device": device, "dtype": dtype})
        return layer

    @classmethod
    def from_matrix(
        cls,
        matrix: SeedMatrix,
        bias: Tensor | None,
        in_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer around an encoded matrix; the tensors are shared, not copied.

        Args:
            matrix: torch's kernel with all sides but the first flattened.
            bias: (out_channels,) or None; an `nn.Parameter` is kept as it is.

        Raises:
            RbeError: the matrix or the bias does not fit.
        """
        if bias is not None and tuple(bias.shape) != matrix.shape[:1]:
            raise RbeError(f"{cls.__name__}: bias is {tuple(bias.shape)}, but the matrix has {matrix.shape[0]} rows")
        layer = cls.from_spec(
            matrix.spec,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            False,
            padding_mode,
            row_scale=matrix.row_scale is not None,
            device="meta",
            dtype=dtype or (None if bias is None else bias.dtype),
        )
        layer._adopt(matrix)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of torch's kernel: (out_channels, in_channels / groups, *kernel_size)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """The dense kernel in torch's shape, decoded now and forgotten afterwards; read-only."""
        dense = super().weight.reshape(self.weight_shape)
        dense._is_hf_initialized = True  # type: ignore[attr-defined]  # as in Seeded
        return dense

    def _convolve(self, x: Tensor) -> Tensor:
        """x (n, in_channels, *sides) or (in_channels, *sides)."""
        name, channel = type(self).__name__, -1 - self.sides
        if x.ndim - self.sides not in (1, 2) or x.shape[channel] != self.in_channels:
            raise RbeError(
                f"{name}: x is {tuple(x.shape)}; it must have {self.sides} sides after {self.in_channels} channels, "
                "and may have a batch before them"
            )
        if not x.is_floating_point():
            raise RbeError(f"{name}: x is {x.dtype}; convert it to a float dtype, such as torch.float32")
        padding = tuple(before for before, _ in self._ends)
        if self.padding_mode != "zeros" or any(before != after for before, after in self._ends):
            around = [end for ends in reversed(self._ends) for end in ends]
            x = nn.functional.pad(x, around, "constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0,) * self.sides
        bias = self.bias if self.bias_seed is None else self.bias_seed()
        if self.groups == 1 and set(self.kernel_size) == {1} and not any(padding):
            product = self.multiply(self._strided(x).movedim(channel, -1))
            return (product if bias is None else (product + bias).to(product.dtype)).movedim(-1, channel)
        generate, shape, dtype = self.generator(), self.weight_shape, x.dtype

        def make() -> Tensor:
            return generate().reshape(shape).to(dtype)

        kernel = make()
        function: Callable[..., Tensor] = nn.functional.conv1d if self.sides == 1 else nn.functional.conv2d
        bias = None if bias is None else bias.to(x.dtype)
        with made_again(kernel, make):
            return function(x, kernel, bias, self.stride, padding, self.dilation, self.groups)

    def _strided(self, x: Tensor) -> Tensor:
        """The cells that a kernel of one cell sees."""
        if set(self.stride) == {1}:
            return x
        down, *right = self.stride
        return x[..., ::down, :: right[0]] if right else x[..., ::down]

    def extra_repr(self) -> str:
        """Shapes and rate."""
        bias = "seed" if self.bias_seed is not None else self.bias is not None
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={bias}, {self._describe()}"
        )


class Conv1d(Convolution):
    """Convolution over a length; constructor shapes like torch's.

    >>> Conv1d(4, 8, 3, stride=2, padding=1, format="packed128")(torch.randn(2, 4, 20)).shape
    torch.Size([2, 8, 10])

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as torch's.
        bias: True adds a dense bias Parameter, "seed" one that is made from a single seed, False none.
        options: as in `Linear`; the matrix is (out_channels, in_channels / groups * kernel_size).

    Raises:
        RbeError: a number does not fit; on the forward pass, x has other channels.

    Source: 002, convolutional layers.
    """

    sides = 1

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_channels, length) or (in_channels, length), in x's dtype."""
        return self._convolve(x)


class Conv2d(Convolution):
    """Convolution over an image; constructor shapes like torch's.

    >>> Conv2d(4, 8, 3, padding="same", groups=2, format="packed128")(torch.randn(2, 4, 7, 7)).shape
    torch.Size([2, 8, 7, 7])

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as torch's.
        bias: True adds a dense bias Parameter, "seed" one that is made from a single seed, False none.
        options: as in `Linear`; the matrix is (out_channels, in_channels / groups * kernel height * kernel width).

    Raises:
        RbeError: a number does not fit; on the forward pass, x has other channels.

    Source: 002, convolutional layers.
    """

    sides = 2

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_channels, height, width) or (in_channels, height, width), in x's dtype."""
        return self._convolve(x)
