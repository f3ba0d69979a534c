"""The tensors of one matrix, in the order in which every operation takes them."""

from typing import NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of one matrix.

    A frozen matrix has `seeds` int64 (blocks, words). An open one, of a format around disk points, has its discrete
    code in their place and `radius` and `angle` (blocks, stages) beside it, which have gradients. With a direction
    `d_radius`, `d_angle` the matrix is the derivative of the open matrix along it.
    """

    seeds: Tensor
    scale: Tensor
    row_scale: Tensor | None = None
    radius: Tensor | None = None
    angle: Tensor | None = None
    d_radius: Tensor | None = None
    d_angle: Tensor | None = None
