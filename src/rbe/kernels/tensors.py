"""The tensors of one matrix, in the order in which every operation takes them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Every eager product asks these questions; a look-up through three modules takes longer than the answer.
_ORDINARY = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state


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


def plain(x: Tensor) -> bool:
    """Whether x is an ordinary CPU tensor with memory of its own."""
    return type(x) in _ORDINARY and x.is_cpu and x.layout is torch.strided and not _wrapped(x)


def unobserved() -> bool:
    """Whether an eager call is seen by no dispatch mode, functional transform or tracer."""
    return _modes() == 0 and _transforms() is None and _tracer() is None and forward_ad._current_level < 0


def unwatched(values: Iterable[Any]) -> bool:
    """Whether an eager call with these arguments is seen by no dispatch mode, functional transform or tracer."""
    return unobserved() and all(plain(v) for v in values if isinstance(v, Tensor))
