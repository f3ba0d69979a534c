"""`Linear`: the layer whose weight is generated inside the product."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.seeded import Seeded, SeededVector


class Linear(Seeded):
    """y = W x + b with W held as seeds; constructor shapes like torch's, random weights of the same variance.

    >>> layer = Linear(20, 40, bits=2)
    >>> layer(torch.randn(3, 20)).shape, sorted(layer.state_dict())
    (torch.Size([3, 40]), ['bias', 'scale', 'seeds'])

    With a format that has a radius and an angle the layer is open: they are Parameters, and training them trains the
    seeds; `freeze()` packs them.

    >>> layer = Linear(20, 40, bias="seed", format="packed128")
    >>> layer(torch.randn(3, 20)).sum().backward()
    >>> [name for name, p in layer.named_parameters() if p.grad is not None][:3]
    ['radius', 'angle', 'scale']

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        bias: True adds a dense bias Parameter, "seed" one that is made from a single seed, False none.
        bits, format, block, window, rotation, mode, precision, stages: as in `formats.make_spec`.
        row_scale: keep a float16 factor per output.
        device, dtype: where the tensors live; `dtype` is the bias's and the dtype of the virtual `weight`.

    Raises:
        RbeError: the format does not offer the specification.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | str = True,
        *,
        bits: float | None = None,
        format: str = "trellis",
        block: int | None = 16,
        window: int = 16,
        rotation: tuple[int, int] = (0, 0),
        mode: str | None = None,
        precision: int = 32,
        stages: int = 1,
        row_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = formats.make_spec(
            format,
            (out_features, in_features),
            bits=bits,
            block=block,
            window=window,
            rotation=rotation,
            mode=mode,
            precision=precision,
            stages=stages,
        )
        self._build(spec, bias, row_scale=row_scale, trainable=formats.is_disk(format), device=device, dtype=dtype)

    def _build(
        self,
        spec: SeedSpec,
        bias: bool | str,
        *,
        row_scale: bool = False,
        transposed: bool = False,
        trainable: bool = False,
        owner: Seeded | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if bias not in (True, False, "seed"):
            raise RbeError(f"Linear: bias {bias!r} is not offered; choose True (dense), 'seed' or False")
        super().__init__(
            spec,
            row_scale=row_scale,
            transposed=transposed,
            trainable=trainable,
            owner=owner,
            device=device,
            dtype=dtype,
        )
        self.out_features, self.in_features = spec.shape
        bound = spec.shape[1] ** -0.5
        values = torch.empty(spec.shape[0], device=device, dtype=dtype) if bias is True else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        if self.bias is not None and not self.bias.is_meta:
            nn.init.uniform_(self.bias, -bound, bound)
        self.bias_seed: SeededVector | None = None
        if bias == "seed":
            self.bias_seed = SeededVector(
                spec.shape[0],
                format=spec.format,
                mode=spec.mode,
                precision=spec.precision,
                stages=spec.stages,
                rms=bound / 3**0.5,
                device=device,
                dtype=dtype,
            )

    @classmethod
    def from_spec(
        cls,
        spec: SeedSpec,
        bias: bool = True,
        *,
        row_scale: bool = False,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An unfilled layer for a loader, usually on the meta device."""
        layer = cls.__new__(cls)
        layer._build(spec, bias, row_scale=row_scale, transposed=transposed, device=device, dtype=dtype)
        return layer

    @classmethod
    def from_matrix(
        cls,
        matrix: SeedMatrix,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer around an encoded matrix; the tensors are shared, not copied.

        >>> matrix = SeedMatrix.from_seeds(torch.zeros(2, 8, dtype=torch.int64), (32, 16), "trellis")
        >>> Linear.from_matrix(matrix, torch.zeros(32)).out_features
        32

        Args:
            bias: (rows,) or None; an `nn.Parameter` is kept as it is.
            transposed: the virtual `weight` shall look like (in, out), as in transformers' Conv1D.

        Raises:
            RbeError: the bias does not fit.
        """
        rows = matrix.spec.shape[0]
        if bias is not None and tuple(bias.shape) != (rows,):
            raise RbeError(f"Linear: bias is {tuple(bias.shape)}, but the matrix has {rows} rows")
        dtype = dtype or (None if bias is None else bias.dtype)
        layer = cls.from_spec(
            matrix.spec,
            False,
            row_scale=matrix.row_scale is not None,
            transposed=transposed,
            device="meta",
            dtype=dtype,
        )
        layer._adopt(matrix)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def tied(cls, owner: Seeded, bias: Tensor | None = None) -> Self:
        """An output head that multiplies by the matrix of another module, storing nothing but its bias."""
        layer = cls.__new__(cls)
        layer._build(owner.spec, False, transposed=owner.transposed, owner=owner, dtype=owner.weight_dtype)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype."""
        y = self.multiply(x)
        bias = self.bias if self.bias_seed is None else self.bias_seed()
        if bias is None:
            return y
        y = y + bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def held(self) -> Callable[[Tensor], Tensor]:
        """The layer as it is now, for many calls in a row.

        An open layer in training makes its matrix once and hands its seeds one gradient, instead of one a call; the
        matrix lives as long as the calls and their graph. Any other layer is returned itself.

        >>> layer = Linear(16, 8, format="outer128")
        >>> step, x = layer.held(), torch.randn(3, 16)
        >>> bool(torch.allclose(step(x), layer(x), atol=1e-6))
        True
        """
        if not (self.trainable and torch.is_grad_enabled()):
            return self
        weight, bias = self.dense(), self.bias if self.bias_seed is None else self.bias_seed()
        bias = None if bias is None else bias.to(weight.dtype)

        def step(x: Tensor) -> Tensor:
            return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

        return step

    def extra_repr(self) -> str:
        """Shapes and rate."""
        bias = "seed" if self.bias_seed is not None else self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._describe()}"
