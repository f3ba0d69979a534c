"""`Embedding`: a table whose rows are generated when they are looked up."""

from typing import Any, Self

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.seeded import Seeded


class Embedding(Seeded):
    """Rows of a matrix held as seeds; only the rows asked for are ever generated.

    >>> table = Embedding(100, 32, bits=2)
    >>> table(torch.tensor([[3, 5, 99]])).shape
    torch.Size([1, 3, 32])

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        padding_idx: kept for callers that read it; it selects no special row when generating.
        bits, format, block, window, rotation, mode, precision, stages: as in `formats.make_spec`; the output side
            (first) cannot be rotated. A format with radius and angle makes an open layer, which can be trained.
        row_scale: keep a float16 factor per row.
        device, dtype: where the tensors live; `dtype` is the dtype of the rows.

    Raises:
        RbeError: the format does not offer the specification, or padding_idx is outside the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
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
            (num_embeddings, embedding_dim),
            bits=bits,
            block=block,
            window=window,
            rotation=rotation,
            mode=mode,
            precision=precision,
            stages=stages,
        )
        trainable = formats.is_disk(format)
        self._build(spec, padding_idx, row_scale=row_scale, trainable=trainable, device=device, dtype=dtype)

    def _build(
        self,
        spec: SeedSpec,
        padding_idx: int | None,
        *,
        row_scale: bool = False,
        trainable: bool = False,
        owner: Seeded | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.rotation[0]:
            raise RbeError(
                f"Embedding: rotation {spec.rotation} mixes the rows, so that none can be generated alone; "
                "encode the table with rotate='in'"
            )
        super().__init__(spec, row_scale=row_scale, trainable=trainable, owner=owner, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = spec.shape
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise RbeError(f"Embedding: padding_idx {padding_idx} is outside a table of {self.num_embeddings} rows")
        self.padding_idx = None if padding_idx is None else padding_idx % self.num_embeddings
        self.multiplier: float | None = None
        self.rounds_multiplier = False
        self.dense_class: Any = None

    def multiply_rows(self, multiplier: float, rounds: bool, dense_class: Any) -> None:
        """Multiply every row that is looked up, but not `weight`, as the scaled embeddings of some models do.

        Args:
            multiplier: the factor.
            rounds: round it to the rows' dtype first.
            dense_class: the class to go back to, called with (rows, columns, padding_idx, multiplier).
        """
        self.multiplier, self.rounds_multiplier, self.dense_class = multiplier, rounds, dense_class

    @classmethod
    def from_spec(
        cls,
        spec: SeedSpec,
        padding_idx: int | None = None,
        *,
        row_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An unfilled table for a loader, usually on the meta device."""
        layer = cls.__new__(cls)
        layer._build(spec, padding_idx, row_scale=row_scale, device=device, dtype=dtype)
        return layer

    @classmethod
    def from_matrix(
        cls, matrix: SeedMatrix, padding_idx: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """A table around an encoded matrix; the tensors are shared, not copied.

        Raises:
            RbeError: the matrix is rotated on its output side.
        """
        layer = cls.from_spec(
            matrix.spec, padding_idx, row_scale=matrix.row_scale is not None, device="meta", dtype=dtype
        )
        layer._adopt(matrix)
        return layer

    @classmethod
    def tied(cls, owner: Seeded, padding_idx: int | None = None) -> Self:
        """A table that reads the matrix of another module and stores nothing."""
        layer = cls.__new__(cls)
        layer._build(owner.spec, padding_idx, owner=owner, dtype=owner.weight_dtype)
        return layer

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table: (*index.shape, embedding_dim).

        Raises:
            RbeError: an index is outside the table, or is not an integer.
        """
        rows = self.look_up(index)
        rows = rows if rows.dtype == torch.float64 else rows.to(self.weight_dtype)
        if self.multiplier is None:
            return rows
        return rows * (rows.new_tensor(self.multiplier) if self.rounds_multiplier else self.multiplier)

    def extra_repr(self) -> str:
        """Shapes and rate."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._describe()}"
