"""The operations on seeds, decode, multiply and rows, and their implementations per device.

`decode`, `seed_matmul` and `rows` take the tensors of one matrix and its specification. `prepare` does their checks
once, for a matrix that is used many times. On the CPU an instruction tier is chosen at run time: amx, zen4, avx512,
avx2 or portable; the environment variable RBE_TIER forces a lower one.

A matrix is *frozen*, with packed seeds, or, in a format around points of the Poincare disk, *open*: then the seeds
argument is its discrete code, and radius and angle stand beside it. x, scale, radius and angle have gradients, under
autograd, torch.func and torch.compile. Where one of them is float64, the definition itself is evaluated in float64.
"""

from typing import Any

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.kernels import bands, cpu, functions, ops, reference
from rbe.kernels.cpu import tier
from rbe.kernels.formulas import Calls
from rbe.kernels.tensors import Tensors, plain, unobserved

__all__ = ["Graded", "Prepared", "Tensors", "decode", "lasting", "prepare", "reference", "rows", "seed_matmul", "tier"]

ACTIVATIONS = ("float32", "int8")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decode(
    spec: SeedSpec,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None = None,
    angle: Tensor | None = None,
) -> Tensor:
    """The dense matrix (rows, columns), W = R_out^T W~ R_in; float32, or float64 where radius or scale is.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> decode(spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(0.5), None)[0, :2].tolist()
    [-255.0, -255.0]

    Raises:
        RbeError: the tensors do not fit the specification.
    """
    return prepare(spec, seeds, scale, row_scale, radius, angle).decode()


def seed_matmul(
    x: Tensor,
    spec: SeedSpec,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activations: str = "float32",
    radius: Tensor | None = None,
    angle: Tensor | None = None,
) -> Tensor:
    """The product of x (..., columns) with the matrix: (..., rows), in x's dtype.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> seed_matmul(torch.ones(2, 33), spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None)[1, 3]
    tensor(-16830.)

    In trellis, a row of x that holds NaN or an infinity gives a row of NaN.

    Args:
        x: float32, bfloat16, float16 or float64.
        activations: "float32" is exact to float32 rounding; "int8" rounds every row of x to 8 bits, with one scale, in
            trellis, whose weights are integers; other formats multiply exactly.

    Raises:
        RbeError: x has the wrong width or dtype, or the tensors do not fit the specification.
    """
    return prepare(spec, seeds, scale, row_scale, radius, angle).matmul(x, activations)


def rows(
    index: Tensor,
    spec: SeedSpec,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None = None,
    angle: Tensor | None = None,
) -> Tensor:
    """Rows of the matrix: (*index.shape, columns) in the dtype of `decode`; the other rows are not generated.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> rows(torch.tensor([19, 0]), spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None).shape
    torch.Size([2, 33])

    Raises:
        RbeError: an index is out of range or not an integer, or the output side is rotated: no row stands alone.
    """
    return prepare(spec, seeds, scale, row_scale, radius, angle).rows(index)


def lasting() -> bool:
    """Whether what is prepared now may be kept: no compiler, tracer, transform or mode is at work.

    >>> lasting(), torch.func.grad(lambda x: x * lasting())(torch.tensor(1.0)).item()
    (True, 0.0)
    """
    return not torch.compiler.is_compiling() and unobserved()


class Prepared:
    """One matrix, checked once, ready to be multiplied often: an eager call costs a few microseconds over the kernel.

    It keeps the tensors it was made of and reads their values at every call, so changes in place are seen.
    A module whose tensors may be replaced (moved, reloaded) asks `fits` before each use and prepares again if not.
    What was prepared under a transform or a mode serves that call alone: `lasting` tells.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> tensors = torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None
    >>> ready = prepare(spec, *tensors)
    >>> ready.fits(*tensors), ready.matmul(torch.ones(33)).shape
    (True, torch.Size([20]))
    """

    __slots__ = ("_native", "_pointers", "spec", "tensors")

    def __init__(self, spec: SeedSpec, tensors: Tensors) -> None:
        self.spec, self.tensors = spec, tensors
        self._native: Any = None
        self._pointers: tuple[int, ...] = ()
        # Under a transform or a mode even a slice of a plain tensor is wrapped or fake, and has no address.
        if not lasting() or not all(t is None or (plain(t) and t.is_contiguous()) for t in tensors):
            return
        if not ops.in_cpp(spec, tensors):
            return
        if formats.is_disk(spec.format):
            self._native = ops.source(spec, Tensors(*(None if t is None else t.detach() for t in tensors)))  # type: ignore[arg-type]
        else:
            self._native = cpu.native(spec, tensors.seeds, tensors.scale, tensors.row_scale)
        self._pointers = _addresses(tensors)

    def __reduce__(self) -> tuple[type["Prepared"], tuple[Any, ...]]:
        return Prepared, (self.spec, self.tensors)

    def fits(
        self,
        seeds: Tensor,
        scale: Tensor,
        row_scale: Tensor | None,
        radius: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> bool:
        """Whether these are the very tensors, at the very addresses, that this was prepared from."""
        mine = self.tensors
        return (
            seeds is mine.seeds
            and scale is mine.scale
            and row_scale is mine.row_scale
            and radius is mine.radius
            and angle is mine.angle
            and (self._native is None or self._pointers == _addresses(mine))
        )

    def decode(self) -> Tensor:
        """As the function `decode`."""
        w: Tensor = self._calls().decode(*self.tensors, ops.text(self.spec))
        return w

    def matmul(self, x: Tensor, activations: str = "float32") -> Tensor:
        """As `seed_matmul`."""
        shape = x.shape
        if not shape or shape[-1] != self.spec.shape[1]:
            raise RbeError(
                f"seed_matmul: x is {tuple(shape)}, but the matrix is {self.spec.shape}: "
                f"the last side of x must be {self.spec.shape[1]}"
            )
        if x.dtype not in _DTYPES:
            raise RbeError(f"seed_matmul: x is {x.dtype}; convert it to one of {', '.join(map(str, _DTYPES))}")
        if activations not in ACTIVATIONS:
            raise RbeError(f"seed_matmul: activations {activations!r} are not offered; choose one of {ACTIVATIONS}")
        # Straight to C++ where nothing but the numbers is wanted; the operation costs 15 us more a call.
        if not torch.compiler.is_compiling() and self._native is not None and self._eager(x):
            if isinstance(self._native, cpu.TrellisMatrix):
                return cpu.matmul(self._native, self.spec, x, activations == "int8")
            if x.dtype != torch.float64:
                return ops.multiplied(self._native, x)
        y: Tensor = self._calls().matmul(x, *self.tensors, ops.text(self.spec), activations)
        return y

    def rows(self, index: Tensor) -> Tensor:
        """As the function `rows`."""
        if self.spec.rotation[0]:
            raise RbeError("rows: the output side of this matrix is rotated, so no row stands alone; decode it whole")
        if index.dtype not in (torch.int64, torch.int32):
            raise RbeError(f"rows: the index is {index.dtype}; convert it to torch.int64")
        if not torch.compiler.is_compiling() and self._native is not None and self._eager(index):
            ops.check_index(index, self.spec)
            if isinstance(self._native, cpu.TrellisMatrix):
                return cpu.rows(self._native, self.spec, index.to(torch.int64))
            return bands.rows(self._native, index)
        y: Tensor = self._calls().rows(index, *self.tensors, ops.text(self.spec))
        return y

    def _calls(self) -> Calls:
        """The operations: opaque for a compiler, transformable otherwise."""
        return ops.CALLS if torch.compiler.is_compiling() else functions.CALLS

    def _eager(self, x: Tensor) -> bool:
        """Whether nobody is recording: no autograd, dispatch mode, functional transform or tracer."""
        if torch.is_grad_enabled():
            t = self.tensors
            if (
                x.requires_grad
                or t.scale.requires_grad
                or (t.radius is not None and t.radius.requires_grad)
                or (t.angle is not None and t.angle.requires_grad)
            ):
                return False
        return unobserved() and plain(x)


class Graded:
    """A matrix whose rows have several rates, ready: one `Prepared` a grade, whose answers are put together.

    >>> spec = formats.make_spec("trellis", (40, 20), bits=((32, 3.0), (40, 1.0)))
    >>> tensors = torch.zeros(28, 2, dtype=torch.int64), torch.tensor(1.0), None
    >>> ready = prepare(spec, *tensors)
    >>> ready.matmul(torch.ones(20)).shape, ready.rows(torch.tensor([[39], [0]])).shape
    (torch.Size([40]), torch.Size([2, 1, 20]))
    """

    __slots__ = ("_parts", "_seeds", "spec", "tensors")

    def __init__(self, spec: SeedSpec, tensors: Tensors) -> None:
        self.spec, self.tensors = spec, tensors
        seeds, scale, row_scale = tensors[:3]
        self._seeds = seeds.data_ptr() if lasting() else 0
        self._parts = [
            (rows, Prepared(part, Tensors(some, scale, None if row_scale is None else row_scale[rows])))
            for rows, some, part in trellis.grades(seeds, spec)
        ]

    def __reduce__(self) -> tuple[type["Graded"], tuple[Any, ...]]:
        return Graded, (self.spec, self.tensors)

    def fits(self, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> bool:
        """As of `Prepared`."""
        mine = self.tensors
        same = seeds is mine.seeds and scale is mine.scale and row_scale is mine.row_scale
        return same and self._seeds == seeds.data_ptr()

    def decode(self) -> Tensor:
        """As the function `decode`."""
        return torch.cat([part.decode() for _, part in self._parts])

    def matmul(self, x: Tensor, activations: str = "float32") -> Tensor:
        """As `seed_matmul`."""
        return torch.cat([part.matmul(x, activations) for _, part in self._parts], -1)

    def rows(self, index: Tensor) -> Tensor:
        """As the function `rows`."""
        if index.dtype not in (torch.int64, torch.int32):
            raise RbeError(f"rows: the index is {index.dtype}; convert it to torch.int64")
        if torch.compiler.is_compiling() or not plain(index):
            return self._rows_of_each(index)
        ops.check_index(index, self.spec)
        flat = index.reshape(-1)
        made: Tensor | None = None
        for rows, part in self._parts:
            where = ((flat >= rows.start) & (flat < rows.stop)).nonzero()[:, 0]
            if len(where) == len(flat):
                return part.rows(index - rows.start)
            if len(where):
                found = part.rows(flat[where] - rows.start)
                made = found.new_empty(len(flat), found.shape[1]) if made is None else made
                made.index_copy_(0, where, found)
        assert made is not None
        return made.reshape(*index.shape, self.spec.shape[1])

    def _rows_of_each(self, index: Tensor) -> Tensor:
        """The same for compilers, which cannot look at the values of an index: every grade answers, one is believed."""
        out: Tensor | None = None
        for rows, part in self._parts:
            # Rows of other grades become some row of this one; those of none are left for the operation to refuse.
            least = None if out is None else 0
            most = None if rows.stop == self.spec.shape[0] else rows.stop - rows.start - 1
            mine = part.rows((index - rows.start).clamp(least, most))
            out = mine if out is None else torch.where((index >= rows.start)[..., None], mine, out)
        assert out is not None
        return out


def prepare(
    spec: SeedSpec,
    seeds: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    radius: Tensor | None = None,
    angle: Tensor | None = None,
) -> Prepared | Graded:
    """Check the tensors of a matrix once, for many products.

    Raises:
        RbeError: the tensors do not fit the specification.
    """
    tensors = Tensors(seeds, scale, row_scale, radius, angle)
    _check_tensors(spec, tensors)
    return Graded(spec, tensors) if spec.grades else Prepared(spec, tensors)


_FLOATS = (torch.float32, torch.float64)


def _check_tensors(spec: SeedSpec, tensors: Tensors) -> None:
    """Refuse what the kernels, which trust their pointers, must never see."""
    formats.get(spec.format).check(spec)
    seeds, scale, row_scale, radius, angle, _, _ = tensors
    expected, what = formats.seeds_shape(spec), "seeds"
    if radius is not None or angle is not None:
        if not formats.is_disk(spec.format):
            raise RbeError(f"kernels: {spec.format} has no radius and angle; give its seeds alone")
        expected, what = (spec.blocks, 0 if spec.format == "packed64" else spec.stages), "the code words are"
        for name, part in (("radius", radius), ("angle", angle)):
            if part is None or part.dtype not in _FLOATS or part.shape != (spec.blocks, spec.stages):
                given = "absent" if part is None else f"{part.dtype} {tuple(part.shape)}"
                raise RbeError(f"kernels: {name} is {given}; it must be float32 {(spec.blocks, spec.stages)}")
    if seeds.dtype != torch.int64 or seeds.shape != expected:
        what = "seeds are" if what == "seeds" else what
        raise RbeError(f"kernels: {what} {seeds.dtype} {tuple(seeds.shape)}; this matrix takes int64 {expected}")
    if scale.dtype not in _FLOATS or scale.ndim != 0:
        raise RbeError(f"kernels: scale is {scale.dtype} {tuple(scale.shape)}; it must be one 0-d float32")
    if row_scale is not None and (row_scale.dtype != torch.float16 or row_scale.shape != spec.shape[:1]):
        raise RbeError(
            f"kernels: row_scale is {row_scale.dtype} {tuple(row_scale.shape)}; it must be float16 ({spec.shape[0]},)"
        )


def _addresses(tensors: Tensors) -> tuple[int, ...]:
    seeds, scale, row_scale, radius, angle, _, _ = tensors
    fixed = (seeds.data_ptr(), scale.data_ptr()) + (() if row_scale is None else (row_scale.data_ptr(),))
    return fixed if radius is None or angle is None else (*fixed, radius.data_ptr(), angle.data_ptr())
