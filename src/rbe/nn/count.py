"""What a module stands for and what it stores: weights, bytes of seeds, bytes of everything."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from rbe import formats
from rbe.nn.seeded import Seeded
from rbe.nn.stream import Stream


@dataclass(frozen=True)
class Count:
    """Weights and bytes of a module, counted from its tensors.

    >>> Count(matrix_weights=1024, vector_weights=0, dense_weights=32, seed_bytes=64, whole_bytes=196).printed_ratio
    64.0

    Attributes:
        matrix_weights: weights of the seed matrices with more than one column.
        vector_weights: of the biases, gains and shifts that come from one seed.
        dense_weights: of everything that is stored as it is, running statistics among it.
        seed_bytes: bytes of the seeds alone, which is what the papers count.
        whole_bytes: bytes of everything stored, scales, outliers and dense tensors too, the seeds packed.
    """

    matrix_weights: int
    vector_weights: int
    dense_weights: int
    seed_bytes: int
    whole_bytes: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.matrix_weights + self.vector_weights + self.dense_weights

    @property
    def printed_ratio(self) -> float:
        """float32 bytes of the matrices to bytes of the seeds, as 000 counts; 0 where there is no seed."""
        return 4 * self.matrix_weights / self.seed_bytes if self.seed_bytes else 0.0

    @property
    def ratio(self) -> float:
        """float32 bytes of all weights to all bytes stored."""
        return 4 * self.weights / self.whole_bytes if self.whole_bytes else 1.0


def count(module: nn.Module) -> Count:
    """Count the weights and bytes of any module; what is shared counts once.

    >>> from rbe.nn import Linear
    >>> count(Linear(64, 32, bias="seed", format="packed64", block=None))
    Count(matrix_weights=2048, vector_weights=32, dense_weights=0, seed_bytes=16, whole_bytes=24)

    Source: 000 sections 5.2.2, 5.3.2 and 5.8.2; there seed bytes are set against matrices, without scales and biases.
    """
    matrix = vector = dense = seeds = whole = 0
    seen: set[int] = set()
    for part in module.modules():
        stored: dict[str, Tensor | None] = {**part._parameters, **part._buffers}
        if isinstance(part, Seeded) and part.owner is part:
            rows, columns = part.spec.shape
            matrix, vector = (matrix + rows * columns, vector) if columns > 1 else (matrix, vector + rows)
            here = 8 * math.prod(formats.seeds_shape(part.spec))
            seeds += here
            beside = (part.row_scale, part.outlier_index, part.outlier_values)
            whole += here + 4 + sum(t.numel() * t.element_size() for t in beside if t is not None)
            stored = {name: tensor for name, tensor in stored.items() if name == "bias"}
        elif isinstance(part, Stream):
            weights, here = part.stored()
            # The bias is in the stream; the scale is a float32.
            matrix, vector = matrix + weights, vector + (part.shape[0] if part.bias else 0)
            seeds, whole, stored = seeds + here, whole + here + 4, {}
        for tensor in stored.values():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                whole += tensor.numel() * tensor.element_size()
                dense += tensor.numel() if tensor.is_floating_point() else 0
    return Count(matrix, vector, dense, seeds, whole)
