"""`SeedMatrix`: a matrix held as seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rbe import formats, kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.outliers import Outliers


@dataclass(frozen=True, eq=False)
class SeedMatrix:
    """A (rows, columns) matrix stored as seeds and generated where it is used.

    >>> m = SeedMatrix.from_seeds(torch.zeros(6, 8, dtype=torch.int64), shape=(40, 20), format="trellis", block=16)
    >>> m.decode().shape, m.matmul(torch.randn(3, 20)).shape, m.spec.bits
    (torch.Size([40, 20]), torch.Size([3, 40]), 2.0)

    Attributes:
        spec: format, shape and the other values that are not tensors.
        seeds: int64 (blocks, words), blocks in row-major order of the block grid.
        scale: float32, 0-d, multiplies every weight.
        row_scale: float16 (rows,) or None, multiplies every row.
        outliers: single weights that are added to what the seeds make, or None.

    Source: design sections 3 and 5.
    """

    spec: SeedSpec
    seeds: Tensor
    scale: Tensor
    row_scale: Tensor | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        definition = formats.get(self.spec.format)
        definition.check(self.spec)
        expected = formats.seeds_shape(self.spec)
        if self.seeds.dtype != torch.int64 or tuple(self.seeds.shape) != expected:
            raise RbeError(
                f"SeedMatrix: seeds are {self.seeds.dtype} {tuple(self.seeds.shape)}, but a {self.spec.shape} matrix "
                f"in {self.spec.format} at {self.spec.bits:g} bits takes int64 {expected}"
            )
        if self.scale.dtype != torch.float32 or self.scale.ndim != 0:
            raise RbeError(
                f"SeedMatrix: scale is {self.scale.dtype} {tuple(self.scale.shape)}; it must be one 0-d float32"
            )
        if self.row_scale is not None and (
            self.row_scale.dtype != torch.float16 or tuple(self.row_scale.shape) != self.spec.shape[:1]
        ):
            raise RbeError(
                f"SeedMatrix: row_scale is {self.row_scale.dtype} {tuple(self.row_scale.shape)}; "
                f"it must be float16 ({self.spec.shape[0]},)"
            )
        if self.row_scale is not None and self.spec.rotation[0]:
            raise RbeError(
                "SeedMatrix: row_scale with a rotated output side has no meaning; rotate the input side only"
            )
        if not self.seeds.is_meta:
            definition.check_seeds(self.seeds, self.spec)
        values = [self.scale] if self.row_scale is None else [self.scale, self.row_scale]
        if not self.scale.is_meta and not all(bool(torch.isfinite(v).all()) for v in values):
            raise RbeError("SeedMatrix: a scale is NaN or infinite; the source is damaged")

    @classmethod
    def from_seeds(
        cls,
        seeds: Tensor,
        shape: tuple[int, int],
        format: str,
        block: int | None = 16,
        mode: str | None = None,
        scale: float | Tensor = 1.0,
        row_scale: Tensor | None = None,
        rotation: tuple[int, int] | None = None,
        window: int = 16,
        precision: int = 32,
        stages: int = 1,
    ) -> Self:
        """Build a matrix from bare seeds; a trellis' rate follows from the number of words a block.

        Args:
            seeds: int64 (blocks, words).
            shape: (rows, columns), rows being outputs as in torch.
            block: edge of a block; None makes the whole matrix one block (packed64 and packed128).
            mode: packed128: "radial" (when None) or "faithful".
            rotation: (out, in) seeds of the Hadamard rotations; None is no rotation.
            window: of a trellis; precision: of packed64; stages: seeds summed in a block.

        Raises:
            RbeError: the parts do not fit each other.
        """
        if seeds.ndim != 2:
            raise RbeError(f"from_seeds: seeds are {tuple(seeds.shape)}; they must be int64 (blocks, words)")
        spec = formats.make_spec(
            format,
            shape,
            bits=seeds.shape[1] / 4 if format == "trellis" else None,  # words of 64 bits over 256 weights
            block=block,
            window=window,
            rotation=rotation or (0, 0),
            mode=mode,
            precision=precision,
            stages=stages,
        )
        try:
            factor = torch.as_tensor(scale, dtype=torch.float32).reshape(())
        except (TypeError, ValueError, RuntimeError) as cause:
            raise RbeError(f"from_seeds: scale {scale!r} is not one number: {cause}") from cause
        return cls(spec, seeds, factor, row_scale)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: SeedSpec) -> Self:
        """The inverse of `to_tensors`.

        Raises:
            RbeError: a tensor is missing or does not fit `spec`.
        """
        both = {"outlier_index", "outlier_values"}
        missing = ({"seeds", "scale"} | (both if both & set(tensors) else set())) - set(tensors)
        if missing:
            raise RbeError(f"from_tensors: {sorted(missing)} missing among {sorted(tensors)}; the file is incomplete")
        outliers = None
        if "outlier_index" in tensors:
            outliers = Outliers(spec.shape, tensors["outlier_index"], tensors["outlier_values"])
        return cls(spec, tensors["seeds"], tensors["scale"], tensors.get("row_scale"), outliers)

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: seeds, scale and, where there are some, row_scale and those of the outliers."""
        tensors = {"seeds": self.seeds, "scale": self.scale}
        tensors |= {} if self.row_scale is None else {"row_scale": self.row_scale}
        if self.outliers is not None:
            tensors |= {"outlier_index": self.outliers.index, "outlier_values": self.outliers.values}
        return tensors

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of the unpadded matrix, scales and padding counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def _ready(self) -> kernels.Prepared | kernels.Graded:
        """Made on first use; the fields never change, and changes in place are seen."""
        kept: kernels.Prepared | kernels.Graded | None = self.__dict__.get("_kept")
        if kept is None:
            kept = kernels.prepare(self.spec, self.seeds, self.scale, self.row_scale)
            if kernels.lasting():
                self.__dict__["_kept"] = kept
        return kept

    def decode(self) -> Tensor:
        """The dense matrix, float32 (rows, columns), rotations undone."""
        dense = kernels.decode(self.spec, self.seeds, self.scale, self.row_scale)
        return dense if self.outliers is None else self.outliers.add_to(dense)

    def rows(self, index: Tensor) -> Tensor:
        """Single rows, float32 (*index.shape, columns), without generating the others.

        Raises:
            RbeError: an index is out of range, or the output side is rotated so that no row stands alone.
        """
        rows = self._ready.rows(index)
        return rows if self.outliers is None else self.outliers.add_to_rows(rows, index)

    def matmul(self, x: Tensor, activations: str = "float32") -> Tensor:
        """The product with x (..., columns): (..., rows) in x's dtype.

        Args:
            x: any float dtype.
            activations: "float32" (exact) or "int8" (one scale per row of x, faster).

        Raises:
            RbeError: x has the wrong width or dtype.
        """
        y = self._ready.matmul(x, activations)
        return y if self.outliers is None else self.outliers.add_product(y, x)
