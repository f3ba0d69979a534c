"""Derivatives of the operations, written once: for the opaque operations and for functions that torch.func knows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.kernels.tensors import Tensors

Optional = Tensor | None


class Calls(NamedTuple):
    """The operations in one of their shapes."""

    decode: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    matmul: Callable[..., Tensor]
    transposed: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]
    decode_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rows_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Formulas:
    """The derivatives; they are made of the operations again, so that derivatives by x have derivatives."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def matmul_backward(self, needs: Sequence[bool], inputs: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
        """Of seed_matmul; the inputs are its arguments."""
        x, *tensors, spec, _activations = inputs
        # Integer activations have the gradient of the exact product: rounding is passed straight through.
        by_x: Optional = None
        if needs[0] and any(needs[1:8]) and not torch.is_grad_enabled() and tensors[5] is None:
            # Nobody differentiates these derivatives: one pass over the seeds makes all of them.
            by_x, *gradients = self.calls.backward(x, g, *tensors[:5], spec)
            by_tensors = self._by_tensors(needs[1:8], tensors, lambda _: gradients)
        else:
            by_x = self.calls.transposed(g, *tensors, spec) if needs[0] else None
            by_tensors = self._by_tensors(needs[1:8], tensors, lambda kept: self.calls.gradient(x, g, *kept, spec))
        return by_x, *by_tensors, None, None

    def transposed_backward(self, needs: Sequence[bool], inputs: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
        """Of seed_matmul_transposed."""
        y, *tensors, spec = inputs
        by_y = self.calls.matmul(g, *tensors, spec, "float32") if needs[0] else None
        by_tensors = self._by_tensors(needs[1:8], tensors, lambda kept: self.calls.gradient(g, y, *kept, spec))
        return by_y, *by_tensors, None

    def decode_backward(self, needs: Sequence[bool], inputs: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
        """Of decode."""
        *tensors, spec = inputs
        return *self._by_tensors(needs, tensors, lambda kept: self.calls.decode_gradient(g, *kept, spec)), None

    def rows_backward(self, needs: Sequence[bool], inputs: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
        """Of rows."""
        index, *tensors, spec = inputs
        by_tensors = self._by_tensors(needs[1:8], tensors, lambda kept: self.calls.rows_gradient(index, g, *kept, spec))
        return None, *by_tensors, None

    @staticmethod
    def _by_tensors(
        needs: Sequence[bool],
        tensors: Sequence[Optional],
        gradient: Callable[[Sequence[Optional]], Sequence[Tensor]],
    ) -> tuple[Optional, ...]:
        """Gradients in the order of `Tensors`."""
        scale, radius, angle = needs[1], needs[3], needs[4]
        if not any(needs):
            return (None,) * 7
        if tensors[5] is not None:
            raise RbeError(
                "seed gradients: second derivatives by radius, angle or scale are not offered in float32 kernels; "
                "differentiate rbe.formats.disk(...).values instead"
            )
        by_radius, by_angle, by_scale = gradient(tensors[:5])
        return (
            None,
            by_scale if scale else None,
            None,
            by_radius if radius else None,
            by_angle if angle else None,
            None,
            None,
        )

    def matmul_tangent(self, tangents: Sequence[Any], inputs: Sequence[Any]) -> Optional:
        """Of seed_matmul, from the tangents of its arguments."""
        x, *tensors, spec, activations = inputs
        return _total(
            [
                None if tangents[0] is None else self.calls.matmul(tangents[0], *tensors, spec, activations),
                *_directions(tangents[1:8], tensors, lambda some: self.calls.matmul(x, *some, spec, activations)),
            ]
        )

    def transposed_tangent(self, tangents: Sequence[Any], inputs: Sequence[Any]) -> Optional:
        """Of seed_matmul_transposed."""
        y, *tensors, spec = inputs
        return _total(
            [
                None if tangents[0] is None else self.calls.transposed(tangents[0], *tensors, spec),
                *_directions(tangents[1:8], tensors, lambda some: self.calls.transposed(y, *some, spec)),
            ]
        )

    def decode_tangent(self, tangents: Sequence[Any], inputs: Sequence[Any]) -> Optional:
        """Of decode."""
        *tensors, spec = inputs
        return _total(_directions(tangents, tensors, lambda some: self.calls.decode(*some, spec)))

    def rows_tangent(self, tangents: Sequence[Any], inputs: Sequence[Any]) -> Optional:
        """Of rows."""
        index, *tensors, spec = inputs
        return _total(_directions(tangents[1:8], tensors, lambda some: self.calls.rows(index, *some, spec)))


def _directions(
    tangents: Sequence[Optional], tensors: Sequence[Optional], call: Callable[[Sequence[Optional]], Tensor]
) -> list[Optional]:
    """The derivatives along the tangents of a matrix's tensors of an operation that is linear in the matrix."""
    along, given = Tensors(*tangents[:7]), Tensors(*tensors)  # type: ignore[arg-type]
    parts: list[Optional] = []
    if along.scale is not None:
        parts.append(call(given._replace(scale=along.scale)))
    if along.radius is not None or along.angle is not None:
        assert given.radius is not None and given.angle is not None
        if given.d_radius is not None:
            raise RbeError("seed gradients: second derivatives along radius or angle are not offered")
        d_radius = given.radius.new_zeros(given.radius.shape) if along.radius is None else along.radius
        d_angle = given.angle.new_zeros(given.angle.shape) if along.angle is None else along.angle
        parts.append(call(given._replace(d_radius=d_radius, d_angle=d_angle)))
    return parts


def _total(parts: Sequence[Optional]) -> Optional:
    total: Optional = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total
