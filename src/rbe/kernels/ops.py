"""The operations as torch sees them: schema, fake tensors, autograd for compilers, FLOPs.

They are opaque on purpose. Compilers must not look inside: torch.compile folds wrapped integer products wrongly
(design section 6), and a generated weight must never become a stored constant.

Every operation takes the tensors of one matrix in the order of `Tensors`, and its specification as one line of text.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.kernels import bands, cpu, outer_cpu, packed
from rbe.kernels.formulas import Calls, Formulas
from rbe.kernels.reference import Definition
from rbe.kernels.tensors import Tensors

T = TypeVar("T")


def exact(body: Callable[..., T]) -> Callable[..., T]:
    """A body outside of autocast, which would round the factors of the products in it, and with all on one device."""

    @wraps(body)
    def run(*args: Any) -> T:
        devices = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:
            where = " and ".join(sorted(map(str, devices)))
            raise RbeError(f"{body.__name__}: tensors are on {where}; bring layer and input to one device with .to()")
        if not torch.is_autocast_enabled("cpu"):
            return body(*args)
        with torch.autocast("cpu", enabled=False):
            return body(*args)

    return run


def text(spec: SeedSpec) -> str:
    """A specification as an argument of the operations.

    >>> text(SeedSpec("trellis", (20, 33), bits=2))
    'trellis 20 33 2 16 16 0 0 None 32 1'
    """
    return spec.text


@lru_cache(maxsize=4096)
def parsed(line: str) -> SeedSpec:
    """The inverse of `text`.

    >>> parsed("packed128 20 33 0.5 None 16 0 0 radial 32 2").block is None
    True
    """
    format, rows, columns, bits, block, window, out_seed, in_seed, mode, precision, stages, *more = line.split()
    grades = [grade.split(":") for grade in more[0].split(",")] if more else []
    return SeedSpec(
        format,
        (int(rows), int(columns)),
        float(bits),
        None if block == "None" else int(block),
        int(window),
        (int(out_seed), int(in_seed)),
        None if mode == "None" else mode,
        int(precision),
        int(stages),
        tuple((int(end), float(rate)) for end, rate in grades),
    )


def precision(tensors: Tensors, *others: Tensor) -> torch.dtype:
    """The precision of a call: float64 as soon as one tensor is, float32 otherwise."""
    known = (tensors.scale, tensors.radius, tensors.angle, tensors.d_radius, tensors.d_angle, *others)
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in known) else torch.float32


def in_cpp(spec: SeedSpec, tensors: Tensors) -> bool:
    """Whether the C++ kernels take this matrix, where a call's precision allows it."""
    if spec.format == "outer128" and tensors.d_radius is not None:
        return False  # a direction is the definition's affair
    return tensors.seeds.device.type == "cpu" and precision(tensors) == torch.float32


def contiguous(tensors: Tensors) -> Tensors:
    """The tensors as C++ reads them."""
    return Tensors(*(None if t is None else t.contiguous() for t in tensors))  # type: ignore[arg-type]


def source(spec: SeedSpec, tensors: Tensors, *others: Tensor) -> bands.Source:
    """What generates the matrix for a call with `others`."""
    dtype = precision(tensors, *others)
    if dtype == torch.float32 and formats.is_disk(spec.format) and in_cpp(spec, tensors):
        kernel = outer_cpu.Outer if spec.format == "outer128" else packed.Packed
        return kernel(spec, contiguous(tensors))
    return Definition(spec, tensors, dtype)


def room(by: bands.Source) -> Any:
    """The module with the `matmul` and `decode` of what generates a matrix."""
    return {packed.Packed: packed, outer_cpu.Outer: outer_cpu}.get(type(by), bands)


def backward(by: bands.Source, x: Tensor | None, y: Tensor, by_x: bool) -> tuple[Tensor | None, bands.Gradients | None]:
    """Derivatives by x, where `by_x`, and by radius, angle and scale, where x is given."""
    if isinstance(by, packed.Packed):
        return packed.backward(by, x, y, by_x)
    if isinstance(by, outer_cpu.Outer):
        return outer_cpu.backward(by, x, y, by_x)[:2]
    return bands.matmul_transposed(by, y) if by_x else None, None if x is None else bands.gradient(by, x, y)


def _trellis(spec: SeedSpec, tensors: Tensors) -> bool:
    return spec.format == "trellis" and in_cpp(spec, tensors)


def _native(spec: SeedSpec, tensors: Tensors) -> tuple[Any, Tensors]:
    """The C++ trellis matrix and the contiguous tensors that it borrows."""
    kept = contiguous(tensors)
    return cpu.native(spec, kept.seeds, kept.scale, kept.row_scale), kept


@torch.library.custom_op("rbe::decode", mutates_args=())
@exact
def decode(
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    d_radius: Tensor | None,
    d_angle: Tensor | None,
    spec: str,
) -> Tensor:
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle, d_radius, d_angle)
    if _trellis(about, tensors):
        matrix, _kept = _native(about, tensors)
        return cpu.decode(matrix, about)
    by = source(about, tensors)
    w: Tensor = room(by).decode(by)
    return w


@decode.register_fake
def _(seeds: Tensor, *args: Any) -> Tensor:
    return seeds.new_empty(parsed(args[-1]).shape, dtype=precision(Tensors(seeds, *args[:6])))


@torch.library.custom_op("rbe::rows", mutates_args=())
@exact
def rows(
    index: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    d_radius: Tensor | None,
    d_angle: Tensor | None,
    spec: str,
) -> Tensor:
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle, d_radius, d_angle)
    check_index(index, about)
    if _trellis(about, tensors):
        matrix, _kept = _native(about, tensors)
        return cpu.rows(matrix, about, index.to(torch.int64))
    return bands.rows(source(about, tensors), index.to(torch.int64))


@rows.register_fake
def _(index: Tensor, seeds: Tensor, *args: Any) -> Tensor:
    shape = (*index.shape, parsed(args[-1]).shape[1])
    return seeds.new_empty(shape, dtype=precision(Tensors(seeds, *args[:6])))


def check_index(index: Tensor, spec: SeedSpec) -> None:
    """Refuse indices that are not integers of existing rows."""
    if index.numel() and index.device.type != "meta":
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= spec.shape[0]:
            raise RbeError(f"rows: indices run from {low} to {high}, but the matrix has rows 0 to {spec.shape[0] - 1}")


@torch.library.custom_op("rbe::seed_matmul", mutates_args=())
@exact
def seed_matmul(
    x: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    d_radius: Tensor | None,
    d_angle: Tensor | None,
    spec: str,
    activations: str,
) -> Tensor:
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle, d_radius, d_angle)
    if _trellis(about, tensors) and x.device.type == "cpu":
        matrix, _kept = _native(about, tensors)
        return cpu.matmul(matrix, about, x, activations == "int8")
    return multiplied(source(about, tensors, x), x)


@exact
def multiplied(matrix: bands.Source, x: Tensor) -> Tensor:
    """x (..., columns) times a matrix that comes in bands, in x's dtype."""
    flat = x.to(matrix.dtype).reshape(-1, matrix.spec.shape[1])
    y: Tensor = room(matrix).matmul(matrix, flat)
    return y.reshape(*x.shape[:-1], matrix.spec.shape[0]).to(x.dtype)


@seed_matmul.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parsed(args[7]).shape[0]))


@torch.library.custom_op("rbe::seed_matmul_transposed", mutates_args=())
@exact
def seed_matmul_transposed(
    y: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    d_radius: Tensor | None,
    d_angle: Tensor | None,
    spec: str,
) -> Tensor:
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle, d_radius, d_angle)
    if _trellis(about, tensors) and y.device.type == "cpu":
        matrix, _kept = _native(about, tensors)
        return cpu.matmul_transposed(matrix, about, y)
    by = source(about, tensors, y)
    flat = y.to(by.dtype).reshape(-1, about.shape[0])
    x = backward(by, None, flat, True)[0]
    assert x is not None
    return x.reshape(*y.shape[:-1], about.shape[1]).to(y.dtype)


@seed_matmul_transposed.register_fake
def _(y: Tensor, *args: Any) -> Tensor:
    return y.new_empty((*y.shape[:-1], parsed(args[7]).shape[1]))


@torch.library.custom_op("rbe::seed_gradient", mutates_args=())
@exact
def seed_gradient(
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by radius, angle and scale of the sum of y * seed_matmul(x); empty for what the matrix lacks."""
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle)
    if _trellis(about, tensors):
        kept = (row_scale, None, None, None, None, spec)
        product = seed_matmul(x, seeds, torch.ones_like(scale), *kept, "float32")
        return scale.new_empty(0), scale.new_empty(0), (product.double() * y.double()).sum().to(scale.dtype)
    by = source(about, tensors, x, y)
    flat = x.to(by.dtype).reshape(-1, about.shape[1]), y.to(by.dtype).reshape(-1, about.shape[0])
    gradients = backward(by, *flat, False)[1]
    assert gradients is not None
    return gradients


@torch.library.custom_op("rbe::seed_backward", mutates_args=())
@exact
def seed_backward(
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`seed_matmul_transposed` of y, and `seed_gradient`, in one pass over the seeds where there is one."""
    about, tensors = parsed(spec), Tensors(seeds, scale, row_scale, radius, angle)
    if about.format == "trellis":
        by_x = seed_matmul_transposed(y, *tensors, spec)
        return by_x, *seed_gradient(x, y, *tensors[:5], spec)
    by = source(about, tensors, x, y)
    flat = x.to(by.dtype).reshape(-1, about.shape[1]), y.to(by.dtype).reshape(-1, about.shape[0])
    d_x, gradients = backward(by, *flat, True)
    assert d_x is not None and gradients is not None
    return d_x.reshape(x.shape).to(y.dtype), *gradients


@seed_backward.register_fake
def _(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return y.new_empty(x.shape), *_fake_gradient(Tensors(*args[:5]))


@torch.library.custom_op("rbe::decode_gradient", mutates_args=())
@exact
def decode_gradient(
    g: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by radius, angle and scale of the sum of g * decode(); empty for what the matrix lacks."""
    by = source(parsed(spec), Tensors(seeds, scale, row_scale, radius, angle), g)
    return bands.gradient_of_dense(by, g.to(by.dtype))


@torch.library.custom_op("rbe::rows_gradient", mutates_args=())
@exact
def rows_gradient(
    index: Tensor,
    g: Tensor,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None,
    angle: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by radius, angle and scale of the sum of g * rows(index); empty for what the matrix lacks."""
    by = source(parsed(spec), Tensors(seeds, scale, row_scale, radius, angle), g)
    flat = g.to(by.dtype).reshape(-1, g.shape[-1])
    return bands.gradient_of_rows(by, index.to(torch.int64).reshape(-1), flat)


def _fake_gradient(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    scale, radius = tensors.scale, tensors.radius
    if radius is None:
        return scale.new_empty(0), scale.new_empty(0), scale.new_empty(())
    return radius.new_empty(radius.shape), radius.new_empty(radius.shape), scale.new_empty(())


@seed_gradient.register_fake
def _(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradient(Tensors(*args[:5]))


@decode_gradient.register_fake
def _(g: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradient(Tensors(*args[:5]))


@rows_gradient.register_fake
def _(index: Tensor, g: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradient(Tensors(*args[:5]))


CALLS = Calls(
    decode, rows, seed_matmul, seed_matmul_transposed, seed_gradient, decode_gradient, rows_gradient, seed_backward
)


def _register() -> None:
    formulas = Formulas(CALLS)
    table = {
        decode: formulas.decode_backward,
        rows: formulas.rows_backward,
        seed_matmul: formulas.matmul_backward,
        seed_matmul_transposed: formulas.transposed_backward,
    }
    for op, rule in table.items():

        def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
            ctx.others = [a for a in inputs if isinstance(a, str)]
            ctx.save_for_backward(*inputs[: len(inputs) - len(ctx.others)])

        def run(ctx: Any, g: Tensor, rule: Any = rule) -> Any:
            return rule(ctx.needs_input_grad, (*ctx.saved_tensors, *ctx.others), g)

        op.register_autograd(run, setup_context=setup)


_register()


def _flops(x: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations a weight and row of x, as for a dense product."""
    spec = parsed(next(a for a in args if isinstance(a, str)))
    return 2 * math.prod(x[:-1]) * spec.shape[0] * spec.shape[1]


register_flop_formula([torch.ops.rbe.seed_matmul, torch.ops.rbe.seed_matmul_transposed, torch.ops.rbe.seed_gradient])(
    _flops
)
