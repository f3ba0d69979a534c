"""`Linear`: the layer whose weight is generated inside the product."""

from typing import Self

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.seeded import Seeded


class Linear(Seeded):
    """y = W x + b with W held as seeds; constructor shapes like torch's, random weights of the same variance.

    >>> layer = Linear(20, 40, bits=2)
    >>> layer(torch.randn(3, 20)).shape, sorted(layer.state_dict())
    (torch.Size([3, 40]), ['bias', 'scale', 'seeds'])

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        bias: add a dense bias Parameter.
        bits, format, block, window, rotation: as in `SeedSpec`.
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
        bias: bool = True,
        *,
        bits: float = 2,
        format: str = "trellis",
        block: int = 16,
        window: int = 16,
        rotation: tuple[int, int] = (0, 0),
        row_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = SeedSpec(format, (out_features, in_features), float(bits), block, window, rotation)
        self._build(spec, bias, row_scale=row_scale, device=device, dtype=dtype)

    def _build(
        self,
        spec: SeedSpec,
        bias: bool,
        *,
        row_scale: bool = False,
        transposed: bool = False,
        owner: Seeded | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, row_scale=row_scale, transposed=transposed, owner=owner, device=device, dtype=dtype)
        self.out_features, self.in_features = spec.shape
        values = torch.empty(spec.shape[0], device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        if self.bias is not None and not self.bias.is_meta:
            nn.init.uniform_(self.bias, -(spec.shape[1] ** -0.5), spec.shape[1] ** -0.5)

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
        y = self._ready().matmul(x, self.activations)
        if self.bias is None:
            return y
        y = y + self.bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Shapes and rate."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + self._describe()
        )
