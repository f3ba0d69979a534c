"""The operations as torch sees them: schema, fake tensors, autograd with respect to the activations, FLOPs.

They are opaque on purpose. Compilers must not look inside: torch.compile folds wrapped integer products wrongly
(design section 6), and a generated weight must never become a stored constant.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.kernels import cpu, reference


def numbers(spec: SeedSpec) -> tuple[str, int, int, float, int, int, int, int, str | None]:
    """A specification as the plain arguments of the operations, in the order of their schemas."""
    return (spec.format, *spec.shape, spec.bits, spec.block, spec.window, *spec.rotation, spec.mode)


def _spec(
    format: str,
    rows: int,
    columns: int,
    bits: float,
    block: int,
    window: int,
    rotation_out: int,
    rotation_in: int,
    mode: str | None,
) -> SeedSpec:
    """The inverse of `numbers`."""
    return SeedSpec(format, (rows, columns), bits, block, window, (rotation_out, rotation_in), mode)


def _native(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> tuple[Any, tuple[Any, ...]]:
    """The C++ matrix and the contiguous tensors that it borrows."""
    kept = (seeds.contiguous(), scale, None if row_scale is None else row_scale.contiguous())
    return cpu.native(spec, *kept), kept


@torch.library.custom_op("rbe::decode", mutates_args=())
def decode(
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    bits: float,
    block: int,
    window: int,
    rotation_out: int,
    rotation_in: int,
    mode: str | None,
) -> Tensor:
    spec = _spec(format, rows, columns, bits, block, window, rotation_out, rotation_in, mode)
    if seeds.device.type != "cpu":
        return reference.decode(spec, seeds, scale, row_scale)
    matrix, _kept = _native(spec, seeds, scale, row_scale)
    return cpu.decode(matrix, spec)


@decode.register_fake
def _(seeds: Tensor, scale: Tensor, row_scale: Tensor | None, format: str, rows: int, columns: int, *_: Any) -> Tensor:
    return seeds.new_empty((rows, columns), dtype=torch.float32)


@torch.library.custom_op("rbe::rows", mutates_args=())
def rows(
    index: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    bits: float,
    block: int,
    window: int,
    rotation_out: int,
    rotation_in: int,
    mode: str | None,
) -> Tensor:
    spec = _spec(format, rows, columns, bits, block, window, rotation_out, rotation_in, mode)
    check_index(index, spec)
    if seeds.device.type != "cpu":
        return torch.nn.functional.embedding(index, reference.decode(spec, seeds, scale, row_scale))
    matrix, _kept = _native(spec, seeds, scale, row_scale)
    return cpu.rows(matrix, spec, index.to(torch.int64))


@rows.register_fake
def _(
    index: Tensor, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, format: str, rows: int, columns: int, *_: Any
) -> Tensor:
    return seeds.new_empty((*index.shape, columns), dtype=torch.float32)


def check_index(index: Tensor, spec: SeedSpec) -> None:
    """Refuse indices that are not integers of existing rows."""
    if index.numel() and index.device.type != "meta":
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= spec.shape[0]:
            raise RbeError(f"rows: indices run from {low} to {high}, but the matrix has rows 0 to {spec.shape[0] - 1}")


@torch.library.custom_op("rbe::seed_matmul", mutates_args=())
def seed_matmul(
    x: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    bits: float,
    block: int,
    window: int,
    rotation_out: int,
    rotation_in: int,
    mode: str | None,
    activations: str,
) -> Tensor:
    spec = _spec(format, rows, columns, bits, block, window, rotation_out, rotation_in, mode)
    if x.device.type != "cpu":
        return reference.seed_matmul(x, spec, seeds, scale, row_scale)
    matrix, _kept = _native(spec, seeds, scale, row_scale)
    return cpu.matmul(matrix, spec, x, activations == "int8")


@seed_matmul.register_fake
def _(x: Tensor, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, format: str, rows: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("rbe::seed_matmul_transposed", mutates_args=())
def seed_matmul_transposed(
    y: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    bits: float,
    block: int,
    window: int,
    rotation_out: int,
    rotation_in: int,
    mode: str | None,
) -> Tensor:
    spec = _spec(format, rows, columns, bits, block, window, rotation_out, rotation_in, mode)
    if y.device.type != "cpu":
        return y @ reference.decode(spec, seeds, scale, row_scale, y.dtype)
    matrix, _kept = _native(spec, seeds, scale, row_scale)
    return cpu.matmul_transposed(matrix, spec, y)


@seed_matmul_transposed.register_fake
def _(
    y: Tensor, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, format: str, rows: int, columns: int, *_: Any
) -> Tensor:
    return y.new_empty((*y.shape[:-1], columns))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    seeds, scale, row_scale, *ctx.numbers = inputs[1:13]
    ctx.save_for_backward(seeds, scale, row_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Integer activations have the gradient of the exact product: rounding is passed straight through.
    return seed_matmul_transposed(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 13


def _backward_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return seed_matmul(grad, *ctx.saved_tensors, *ctx.numbers, "float32"), *[None] * 12


seed_matmul.register_autograd(_backward, setup_context=_remember)
seed_matmul_transposed.register_autograd(_backward_transposed, setup_context=_remember)


def _flops(x: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations a weight and row of x, as for a dense product."""
    rows, columns = int(args[4]), int(args[5])
    return 2 * math.prod(x[:-1]) * rows * columns


register_flop_formula([torch.ops.rbe.seed_matmul, torch.ops.rbe.seed_matmul_transposed])(_flops)
