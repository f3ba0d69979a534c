"""Open `outer128` matrices, whose signs are those of latent numbers: products and derivatives for training.

The gradient of a latent number is that of its sign (straight through). On the CPU, in float32, the C++ kernels multiply
and contract, behind operations that are opaque for compilers. What they do not offer, which is other devices and
precisions, transforms of torch.func and derivatives of derivatives, is plain torch, `rbe.kernels.outer`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from rbe.formats import SeedSpec
from rbe.kernels import ops, outer, outer_cpu
from rbe.kernels.tensors import Tensors, plain, unwatched


def signs_of(latent: Tensor) -> Tensor:
    """+1 where a latent number is >= 0, else -1; its gradient is passed straight through.

    >>> latent = torch.tensor([0.5, -2.0], requires_grad=True)
    >>> signs_of(latent).tolist(), torch.autograd.grad(signs_of(latent).sum(), latent)[0].tolist()
    ([1.0, -1.0], [1.0, 1.0])

    Source: G. Hinton's straight-through estimator, in Y. Bengio et al., arXiv 1308.3432.
    """
    hard = torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
    return latent + (hard - latent).detach()


def _source(
    latent: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: str
) -> outer_cpu.Outer:
    about = ops.parsed(spec)
    code = outer_cpu.code_of(latent.detach().contiguous(), about)
    tensors = Tensors(code, scale.detach(), row_scale, radius.detach(), angle.detach())
    return outer_cpu.Outer(about, ops.contiguous(tensors))


@torch.library.custom_op("rbe::latent_matmul", mutates_args=())
@ops.exact
def latent_matmul(
    x: Tensor, latent: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: str
) -> Tensor:
    return ops.multiplied(_source(latent, radius, angle, scale, row_scale, spec), x)


@latent_matmul.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], ops.parsed(args[-1]).shape[0]))


@torch.library.custom_op("rbe::latent_backward", mutates_args=())
@ops.exact
def latent_backward(
    x: Tensor,
    y: Tensor,
    latent: Tensor,
    radius: Tensor,
    angle: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    spec: str,
    by_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of the sum of y * latent_matmul(x): by x, or empty, and by latent, radius, angle and scale."""
    by, (rows, columns) = _source(latent, radius, angle, scale, row_scale, spec), ops.parsed(spec).shape
    flat = x.to(torch.float32).reshape(-1, columns), y.to(torch.float32).reshape(-1, rows)
    d_x, gradients, signs = outer_cpu.backward(by, *flat, by_x, signs=True)
    assert gradients is not None and signs is not None
    return x.new_empty(0) if d_x is None else d_x.reshape(x.shape).to(x.dtype), signs, *gradients


@latent_backward.register_fake
def _(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape if args[-1] else 0), *(t.new_empty(t.shape) for t in args[:4])


@torch.library.custom_op("rbe::latent_decode", mutates_args=())
@ops.exact
def latent_decode(
    latent: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: str
) -> Tensor:
    return outer_cpu.decode(_source(latent, radius, angle, scale, row_scale, spec))


@latent_decode.register_fake
def _(latent: Tensor, *args: Any) -> Tensor:
    return latent.new_empty(ops.parsed(args[-1]).shape)


@torch.library.custom_op("rbe::latent_decode_gradient", mutates_args=())
@ops.exact
def latent_decode_gradient(
    g: Tensor, latent: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of the sum of g * latent_decode(): by latent, radius, angle and scale."""
    gradients, signs = outer_cpu.gradient_of_dense(_source(latent, radius, angle, scale, row_scale, spec), g)
    return signs, *gradients


@latent_decode_gradient.register_fake
def _(g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in args[:4])


def _plain_matmul(x: Tensor, latent: Tensor, *rest: Any) -> Tensor:
    radius, angle, scale, row_scale, spec = rest
    return outer.matmul(x, signs_of(latent), radius, angle, scale, row_scale, ops.parsed(spec))


def _plain_decode(latent: Tensor, *rest: Any) -> Tensor:
    radius, angle, scale, row_scale, spec = rest
    return outer.decode(signs_of(latent), radius, angle, scale, row_scale, ops.parsed(spec))


def _again(ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
    """Derivatives that have derivatives: those of plain torch."""
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.spec = inputs[-1]
    ctx.save_for_backward(*inputs[:-1])


def _matmul_backward(ctx: Any, g: Tensor, call: Callable[..., Any]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return _again(ctx, _plain_matmul, (*ctx.saved_tensors, ctx.spec), g)
    x, *tensors = ctx.saved_tensors
    d_x, *others = call(x, g, *tensors, ctx.spec, ctx.needs_input_grad[0])
    return d_x if ctx.needs_input_grad[0] else None, *others, None, None


def _decode_backward(ctx: Any, g: Tensor, call: Callable[..., Any]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return _again(ctx, _plain_decode, (*ctx.saved_tensors, ctx.spec), g)
    return *call(g, *ctx.saved_tensors, ctx.spec), None, None


latent_matmul.register_autograd(lambda ctx, g: _matmul_backward(ctx, g, latent_backward), setup_context=_setup)
latent_decode.register_autograd(lambda ctx, g: _decode_backward(ctx, g, latent_decode_gradient), setup_context=_setup)


class _Matmul(torch.autograd.Function):
    """The operation without its registration, which costs more than a small product."""

    forward = staticmethod(latent_matmul._init_fn)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return _matmul_backward(ctx, g[0], latent_backward._init_fn)


class _Decode(torch.autograd.Function):
    forward = staticmethod(latent_decode._init_fn)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return _decode_backward(ctx, g[0], latent_decode_gradient._init_fn)


def _chosen(tensors: Sequence[Tensor], opaque: Any, eager: Any, other: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation for compilers and dispatch modes, the function for eager calls, or plain torch."""
    if not all(t.device.type == "cpu" and t.dtype != torch.float64 for t in tensors):
        return other
    if torch.compiler.is_compiling():
        chosen: Callable[..., Tensor] = opaque
    elif unwatched(tensors):
        chosen = eager.apply
    elif (
        torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(map(plain, tensors))
    ):
        chosen = opaque
    else:
        chosen = other
    return chosen


def matmul(
    x: Tensor,
    latent: Tensor,
    radius: Tensor,
    angle: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    spec: SeedSpec,
) -> Tensor:
    """The product of x (..., columns) with the matrix whose signs are those of latent (blocks, stages, 64).

    Returns:
        (..., rows) in x's dtype. All tensors but row_scale have gradients.
    """
    call = _chosen((x, latent, radius, angle, scale), latent_matmul, _Matmul, _plain_matmul)
    return call(x, latent, radius, angle, scale, row_scale, ops.text(spec))


def decode(
    latent: Tensor, radius: Tensor, angle: Tensor, scale: Tensor, row_scale: Tensor | None, spec: SeedSpec
) -> Tensor:
    """The dense matrix (rows, columns), rotations undone; all tensors but row_scale have gradients."""
    call = _chosen((latent, radius, angle, scale), latent_decode, _Decode, _plain_decode)
    return call(latent, radius, angle, scale, row_scale, ops.text(spec))


def rows(
    index: Tensor,
    latent: Tensor,
    radius: Tensor,
    angle: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    spec: SeedSpec,
) -> Tensor:
    """Single rows, (*index.shape, columns); only their block rows are touched."""
    return outer.rows(index, signs_of(latent), radius, angle, scale, row_scale, spec)


def _flops(x: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations a weight and row of x, as for a dense product."""
    spec = ops.parsed(next(a for a in args if isinstance(a, str)))
    return 2 * math.prod(x[:-1]) * spec.shape[0] * spec.shape[1]


def _flops_backward(x: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A dense product for the seeds, and one for x where it is wanted."""
    by_x = args[-1] if isinstance(args[-1], bool) else kwargs["by_x"]
    return _flops(x, *args) * (2 if by_x else 1)


register_flop_formula(torch.ops.rbe.latent_matmul)(_flops)
register_flop_formula(torch.ops.rbe.latent_backward)(_flops_backward)
