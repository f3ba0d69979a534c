"""The operations on seeds, decode, multiply and rows, and their implementations per device.

`decode`, `seed_matmul` and `rows` take the tensors of one matrix and its specification. `prepare` does their checks
once, for a matrix that is used many times. On the CPU an instruction tier is chosen at run time: amx, avx512, avx2 or
portable; the environment variable RBE_TIER forces a lower one.
"""

from typing import Any

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.kernels import cpu, ops, reference
from rbe.kernels.cpu import tier

__all__ = ["Prepared", "decode", "prepare", "reference", "rows", "seed_matmul", "tier"]

ACTIVATIONS = ("float32", "int8")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decode(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """The dense float32 matrix (rows, columns), W = R_out^T W~ R_in.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> decode(spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(0.5), None)[0, :2].tolist()
    [-255.0, -255.0]

    Raises:
        RbeError: the tensors do not fit the specification.
    """
    _check_tensors(spec, seeds, scale, row_scale)
    w: Tensor = ops.decode(seeds, scale, row_scale, *ops.numbers(spec))
    return w


def seed_matmul(
    x: Tensor, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None, activations: str = "float32"
) -> Tensor:
    """The product of x (..., columns) with the matrix: (..., rows), in x's dtype.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> seed_matmul(torch.ones(2, 33), spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None)[1, 3]
    tensor(-16830.)

    A row of x that holds NaN or an infinity gives a row of NaN.

    Args:
        x: float32, bfloat16, float16 or float64.
        activations: "float32" is exact to float32 rounding; "int8" rounds every row of x to 8 bits, with one scale.

    Raises:
        RbeError: x has the wrong width or dtype, or the tensors do not fit the specification.
    """
    return prepare(spec, seeds, scale, row_scale).matmul(x, activations)


def rows(index: Tensor, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """Rows of the matrix: float32 (*index.shape, columns); the other rows are not generated.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> rows(torch.tensor([19, 0]), spec, torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None).shape
    torch.Size([2, 33])

    Raises:
        RbeError: an index is out of range or not an integer, or the output side is rotated: no row stands alone.
    """
    return prepare(spec, seeds, scale, row_scale).rows(index)


class Prepared:
    """One matrix, checked once, ready to be multiplied often: an eager call costs a few microseconds over the kernel.

    It keeps the tensors it was made of and reads their values at every call, so changes in place are seen.
    A module whose tensors may be replaced (moved, reloaded) asks `fits` before each use and prepares again if not.

    >>> spec = SeedSpec("trellis", (20, 33), bits=2)
    >>> tensors = torch.zeros(6, 8, dtype=torch.int64), torch.tensor(1.0), None
    >>> ready = prepare(spec, *tensors)
    >>> ready.fits(*tensors), ready.matmul(torch.ones(33)).shape
    (True, torch.Size([20]))
    """

    __slots__ = ("_native", "_pointers", "row_scale", "scale", "seeds", "spec")

    def __init__(self, spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> None:
        self.spec, self.seeds, self.scale, self.row_scale = spec, seeds, scale, row_scale
        self._native: Any = None
        self._pointers: tuple[int, ...] = ()
        tensors = [seeds, scale] if row_scale is None else [seeds, scale, row_scale]
        if not torch.compiler.is_compiling() and all(_plain(t) and t.is_contiguous() for t in tensors):
            self._native = cpu.native(spec, seeds, scale, row_scale)
            self._pointers = _addresses(seeds, scale, row_scale)

    def __reduce__(self) -> tuple[type["Prepared"], tuple[Any, ...]]:
        return Prepared, (self.spec, self.seeds, self.scale, self.row_scale)

    def fits(self, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> bool:
        """Whether these are the very tensors, at the very addresses, that this was prepared from."""
        return (
            seeds is self.seeds
            and scale is self.scale
            and row_scale is self.row_scale
            and (self._native is None or self._pointers == _addresses(seeds, scale, row_scale))
        )

    def matmul(self, x: Tensor, activations: str = "float32") -> Tensor:
        """As `seed_matmul`."""
        if x.ndim == 0 or x.shape[-1] != self.spec.shape[1]:
            raise RbeError(
                f"seed_matmul: x is {tuple(x.shape)}, but the matrix is {self.spec.shape}: "
                f"the last side of x must be {self.spec.shape[1]}"
            )
        if x.dtype not in _DTYPES:
            raise RbeError(f"seed_matmul: x is {x.dtype}; convert it to one of {', '.join(map(str, _DTYPES))}")
        if activations not in ACTIVATIONS:
            raise RbeError(f"seed_matmul: activations {activations!r} are not offered; choose one of {ACTIVATIONS}")
        # Straight to C++ where nothing but the numbers is wanted; the operation costs 15 us more a call.
        if not torch.compiler.is_compiling() and self._native is not None and _eager(x):
            return cpu.matmul(self._native, self.spec, x, activations == "int8")
        y: Tensor = ops.seed_matmul(x, self.seeds, self.scale, self.row_scale, *ops.numbers(self.spec), activations)
        return y

    def rows(self, index: Tensor) -> Tensor:
        """As the function `rows`."""
        if self.spec.rotation[0]:
            raise RbeError("rows: the output side of this matrix is rotated, so no row stands alone; decode it whole")
        if index.dtype not in (torch.int64, torch.int32):
            raise RbeError(f"rows: the index is {index.dtype}; convert it to torch.int64")
        if not torch.compiler.is_compiling() and self._native is not None and _eager(index):
            ops.check_index(index, self.spec)
            return cpu.rows(self._native, self.spec, index.to(torch.int64))
        y: Tensor = ops.rows(index, self.seeds, self.scale, self.row_scale, *ops.numbers(self.spec))
        return y


def prepare(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> Prepared:
    """Check the tensors of a matrix once, for many products.

    Raises:
        RbeError: the tensors do not fit the specification.
    """
    _check_tensors(spec, seeds, scale, row_scale)
    return Prepared(spec, seeds, scale, row_scale)


def _check_tensors(spec: SeedSpec, seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> None:
    """Refuse what the kernels, which trust their pointers, must never see."""
    definition = formats.get(spec.format)
    definition.check(spec)
    expected = (spec.blocks, definition.words(spec))
    if seeds.dtype != torch.int64 or seeds.shape != expected:
        raise RbeError(f"kernels: seeds are {seeds.dtype} {tuple(seeds.shape)}; this matrix takes int64 {expected}")
    if scale.dtype != torch.float32 or scale.ndim != 0:
        raise RbeError(f"kernels: scale is {scale.dtype} {tuple(scale.shape)}; it must be one 0-d float32")
    if row_scale is not None and (row_scale.dtype != torch.float16 or row_scale.shape != spec.shape[:1]):
        raise RbeError(
            f"kernels: row_scale is {row_scale.dtype} {tuple(row_scale.shape)}; it must be float16 ({spec.shape[0]},)"
        )


def _addresses(seeds: Tensor, scale: Tensor, row_scale: Tensor | None) -> tuple[int, ...]:
    if row_scale is None:
        return seeds.data_ptr(), scale.data_ptr()
    return seeds.data_ptr(), scale.data_ptr(), row_scale.data_ptr()


def _plain(x: Tensor) -> bool:
    """Whether x is an ordinary CPU tensor with memory of its own."""
    return (
        type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and x.device.type == "cpu"
        and x.layout == torch.strided
    )


def _eager(x: Tensor) -> bool:
    """Whether nobody is recording: no autograd, dispatch mode, functional transform or tracer."""
    return (
        _plain(x)
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )
