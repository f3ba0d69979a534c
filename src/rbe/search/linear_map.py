"""Products that are no torch operations, with derivatives by x: those of a linear map are the map and its transpose."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, forth: Map, back: Map) -> Tensor:
        return forth(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.forth, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return _Product.apply(g[0], ctx.back, ctx.forth), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], ctx.forth, ctx.back)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, sides: tuple[Any, ...], x: Tensor, forth: Map, back: Map) -> tuple[Any, int]:
        return _Product.apply(x.movedim(sides[0], 0), forth, back), 0  # type: ignore[no-untyped-call]


def product(x: Tensor, forth: Map, back: Map) -> Tensor:
    """forth(x), differentiable as often as wanted, also under torch.func.

    >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> x = torch.ones(2, requires_grad=True)
    >>> product(x, lambda v: v @ W.T, lambda g: g @ W)[0].backward()
    >>> x.grad
    tensor([1., 2.])

    Args:
        x: (..., columns).
        forth, back: a linear map of the last side and its transpose; they keep the dtype and take any leading sides.
    """
    y: Tensor = _Product.apply(x, forth, back)  # type: ignore[no-untyped-call]
    return y
