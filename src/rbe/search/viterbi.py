"""Encode into `trellis` seeds: Viterbi over every ring of bits, and the scale around it (docs/format.md).

The pass over the states is C++ (kernels/csrc/viterbi_kernel.h); here are the preparation of the matrix, the scale and
the error. Everything is deterministic: the same seeds for any number of threads and on every instruction tier.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rbe._cpu import encode_trellis as _encode_trellis
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.matrix import SeedMatrix
from rbe.mixing import fmix32
from rbe.rotation import rotate as _rotate
from rbe.search import feedback

# The standard deviation of the sum of four uniform bytes.
CODE_RMS = 147.8

# The code's deviation relative to the weights' that gives the smallest error on Gaussian weights, by window and w
# (benchmarks/multipliers.py).
SCALES: dict[int, tuple[float, ...]] = {
    16: (0.678, 0.877, 0.97, 0.992, 1.011, 1.076, 1.082, 1.117),
    14: (0.679, 0.878, 0.971, 1.02, 1.047, 1.07, 1.097, 1.117),
    12: (0.706, 0.877, 0.968, 1.025, 1.054, 1.083, 1.101, 1.125),
}

# Blocks on which a scale is tried (at least; a share of them all; at most), and the window of the trial: the best scale
# hardly depends on it.
_TRIAL_BLOCKS = (8, 1 / 16, 64)
_TRIAL_WINDOW = 12
# A sample of blocks is noisy: the table's scale stays unless another one is better by this factor.
_TRIAL_GAIN = 0.99
_TRIAL_STEP = 1.12
# Elements rotated at a time: the temporaries stay in cache and the matrix is the only large buffer.
_CHUNK = 1 << 20
# The largest row scale: float16 then reaches 2^34 below it.
_LARGEST_ROW_SCALE = 1024.0


@dataclass(frozen=True)
class Effort:
    """How hard to search.

    Attributes:
        window: bits of the trellis state.
        most_starts: points of the ring from which it is closed, at low rates; the best result is kept.
        memory: how many spans of a window an open pass walks on either side of that point to settle the state there.
    """

    window: int
    most_starts: int
    memory: float

    def starts(self, w: int) -> int:
        """Starting points; at high rates the ring forgets its start so soon that more of them find nothing."""
        return max(1, min(self.most_starts, 16 // w))

    def reach(self, window: int, w: int) -> int:
        """Weights on either side of the starting point."""
        return math.ceil(min(trellis.WEIGHTS // 2, 2 * self.memory * window / w))


EFFORTS = {"fast": Effort(12, 1, 8), "balanced": Effort(16, 1, 12), "best": Effort(16, 4, math.inf)}


@dataclass(frozen=True)
class Encoded:
    """A matrix of seeds and how far it is from its source.

    Attributes:
        matrix: the seeds.
        error: squared error divided by the energy of the source, both in float64; 0 for a zero matrix, never above 1.
    """

    matrix: SeedMatrix
    error: float


@dataclass(frozen=True)
class Found:
    """What one search left: seeds int64 (blocks, 2 w) and the weighted sums of x x, x c and c c, c being the code."""

    seeds: Tensor
    xx: float
    xc: float
    cc: float
    chosen: float | None = None

    @property
    def scale(self) -> float:
        """The least-squares scale of the code, or the one that was chosen for another reason."""
        if self.chosen is not None:
            return self.chosen
        return self.xc / self.cc if self.cc > 0 else 0.0

    def residual(self, scale: float) -> float:
        """Squared error for a scale of the code."""
        return max(self.xx - 2 * scale * self.xc + scale * scale * self.cc, 0.0)

    @property
    def error(self) -> float:
        """Squared error relative to x, with the least-squares scale."""
        return self.residual(self.scale) / self.xx if self.xx > 0 else 0.0


def default_threads() -> int:
    """As many threads as torch uses, but no more than this process may run on.

    >>> default_threads() >= 1
    True
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), allowed))


def search(
    x: Tensor,
    unit: float,
    window: int,
    w: int,
    *,
    starts: int = 1,
    reach: int = trellis.WEIGHTS // 2,
    importance: Tensor | None = None,
    row_energy: Tensor | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    multipliers: tuple[int, int] | None = None,
) -> Found:
    """Find the seeds whose codes, times `unit`, come nearest to x.

    >>> found = search(torch.randn(16, 32), 1 / 148, window=12, w=4)
    >>> found.seeds.shape, found.error < 0.12
    (torch.Size([2, 8]), True)

    Args:
        x: float32 (rows, columns), contiguous; padded to whole blocks with cells that do not count.
        unit: the size of one code step, positive.
        starts: points of the ring from which it is closed; the best result is kept.
        reach: weights, 1 to 128, on either side of such a point that settle the state there.
        importance: float32 like x, not negative: multiplies the squared errors of the search and the sums.
        row_energy: float32 (rows,), multiplies the sums only.
        threads: default `default_threads()`; the result does not depend on it.
        progress: called a few times a second with the number of blocks done; an exception in it stops the search.
        multipliers: others than the format's, to try them.
    """
    rows, columns = x.shape
    for name, t, shape in (
        ("x", x, (rows, columns)),
        ("importance", importance, (rows, columns)),
        ("row_energy", row_energy, (rows,)),
    ):
        # The C++ side reads raw memory.
        if t is not None and (
            t.dtype != torch.float32 or t.shape != shape or not t.is_contiguous() or t.device.type != "cpu"
        ):
            raise RbeError(
                f"search: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; "
                f"it must be contiguous float32 {shape} on the CPU"
            )
    blocks = -(-rows // trellis.BLOCK) * -(-columns // trellis.BLOCK)
    seeds = torch.empty(blocks, 2 * w, dtype=torch.int64)
    sums = torch.empty(blocks, 3, dtype=torch.float64)
    _encode_trellis(
        *(0 if t is None else t.data_ptr() for t in (x, importance, row_energy)),
        rows,
        columns,
        unit,
        window,
        w,
        starts,
        reach,
        *(multipliers or trellis.multipliers(window, w)),
        threads or default_threads(),
        seeds.data_ptr(),
        sums.data_ptr(),
        progress,
    )
    # fsum is exact: no dependence on how torch would split a reduction.
    xx, xc, cc = (math.fsum(column) for column in sums.T.tolist())
    return Found(seeds, xx, xc, cc)


def _source(W: Tensor, overwrite: bool = False) -> tuple[Tensor, int]:
    """W in float32, a copy unless it may be overwritten, scaled by a power of two to at most 1, and what undoes it."""
    if not isinstance(W, Tensor):
        raise RbeError(f"encode: the matrix is a {type(W).__name__}; give a torch.Tensor: torch.as_tensor(it)")
    if W.layout != torch.strided:
        raise RbeError(f"encode: the matrix is stored as {W.layout}; make it dense first: to_dense()")
    if W.ndim != 2:
        raise RbeError(
            f"encode: the matrix is {W.ndim}-D {tuple(W.shape)}; "
            "a seed matrix is 2-D: reshape it to (rows, columns) first"
        )
    if W.numel() == 0:
        raise RbeError(f"encode: the matrix {tuple(W.shape)} is empty; there is nothing to encode: leave it as it is")
    if not W.is_floating_point():
        raise RbeError(f"encode: the matrix is {W.dtype}; real floating-point weights are needed: convert it first")
    if W.is_meta:
        raise RbeError("encode: the matrix is on the meta device and holds no values; load the weights first")
    ready = overwrite and W.is_contiguous() and not W.is_inference()
    x = W.detach().to("cpu", torch.float32, copy=not ready, memory_format=torch.contiguous_format)
    low, high = (v.item() for v in torch.aminmax(x))
    largest = max(-low, high)
    if not math.isfinite(largest):
        index = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
        beyond = "beyond float32" if math.isfinite(W[index].item()) else "not a number that can be encoded"
        raise RbeError(
            f"encode: entry {index} of the matrix {tuple(W.shape)} is {W[index].item()}, {beyond}; "
            "the source is damaged or the training diverged"
        )
    exponent = math.frexp(largest)[1]
    half = -exponent // 2
    return x.mul_(2.0**half).mul_(2.0 ** (-exponent - half)), exponent  # in two steps: 2^149 is no float32


def _rotate_(x: Tensor, rotation: tuple[int, int]) -> None:
    """x = R_out x R_in^T in place, some rows or columns at a time."""
    rows, columns = x.shape
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = x[start : start + step]
        part.copy_(_rotate(part, rotation[1]))
    step = max(16, _CHUNK // rows)
    for start in range(0, columns, step):
        part = x[:, start : start + step]
        part.copy_(_rotate(part.T.contiguous(), rotation[0]).T)


def _rotation(shape: tuple[int, int], rotate: bool | str, seed: int) -> tuple[int, int]:
    """The rotation seeds (out, in); a side of 1 has nothing to rotate."""
    sides = {True: (True, True), "in": (False, True), False: (False, False)}
    if not isinstance(rotate, bool | str) or rotate not in sides:
        raise RbeError(f"encode: rotate={rotate!r} is not offered; choose True (both sides), 'in' (features) or False")
    if not isinstance(seed, int):
        raise RbeError(f"encode: seed {seed!r} is a {type(seed).__name__}; give an integer")
    drawn = fmix32(torch.tensor([(2 * seed + k) & 0xFFFFFFFF for k in (1, 2)])).tolist()
    out, in_ = (max(1, s) if wanted and n > 1 else 0 for s, wanted, n in zip(drawn, sides[rotate], shape, strict=True))
    return out, in_


def _row_norms(x: Tensor) -> Tensor:
    """Length of every row, float64; some rows at a time, because torch copies what it looks at to float64."""
    step = max(1, _CHUNK // x.shape[1])
    parts = (x[start : start + step] for start in range(0, x.shape[0], step))
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in parts])


def _row_scale_(x: Tensor) -> Tensor:
    """Divide every row by its root mean square in place; returns it, float16 (rows,), 0 for a row too small."""
    rms = _row_norms(x) / math.sqrt(x.shape[1])
    row_scale: Tensor = (rms * (_LARGEST_ROW_SCALE / rms.max())).to(torch.float16)
    x.mul_(torch.where(row_scale > 0, 1 / row_scale.double(), 0.0).to(torch.float32)[:, None])
    return row_scale


def _sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks spread evenly over x, side by side in one row of blocks, and which of their cells exist."""
    block = trellis.BLOCK
    across = -(-x.shape[1] // block)
    blocks = -(-x.shape[0] // block) * across
    least, share, most = _TRIAL_BLOCKS
    count = min(blocks, max(least, min(most, round(share * blocks))))
    values, exists = torch.zeros(block, count * block), torch.zeros(block, count * block)
    for k in range(count):
        row, column = divmod((2 * k + 1) * blocks // (2 * count), across)
        part = x[row * block : (row + 1) * block, column * block : (column + 1) * block]
        values[: part.shape[0], k * block : k * block + part.shape[1]] = part
        exists[: part.shape[0], k * block : k * block + part.shape[1]] = 1.0
    return values, exists


def _unit(x: Tensor, energy: float, window: int, w: int, threads: int | None) -> float:
    """The code step for x: the Gaussian one, or a better one if a sample of blocks clearly asks for it."""
    step = math.sqrt(energy / x.numel()) / CODE_RMS
    values, exists = _sample(x)

    def error(factor: float) -> float:
        unit = factor * SCALES[_TRIAL_WINDOW][w - 1] * step
        return search(values, unit, _TRIAL_WINDOW, w, reach=48, importance=exists, threads=threads).error

    best, best_error = 1.0, error(1.0)
    for direction in (1 / _TRIAL_STEP, _TRIAL_STEP):
        factor, start = best * direction, best
        while (candidate := error(factor)) < _TRIAL_GAIN * best_error:
            best, best_error, factor = factor, candidate, factor * direction
        if best != start:
            break
    # Few digits: the result must not hang on the last bit of a sum.
    mantissa, exponent = math.frexp(best * SCALES[window][w - 1] * step)
    return math.ldexp(round(mantissa * 4096) / 4096, exponent)


def encode_trellis(
    W: Tensor,
    bits: float = 2,
    effort: str = "balanced",
    rotate: bool | str = True,
    row_scale: bool = False,
    seed: int = 0,
    window: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    moments: Tensor | None = None,
    overwrite: bool = False,
) -> Encoded:
    """Encode a matrix as `trellis` seeds, and say how large the error is.

    >>> result = encode_trellis(torch.randn(32, 48), bits=2, effort="fast")
    >>> result.matrix.seeds.shape, result.error < 0.1
    (torch.Size([6, 8]), True)

    Arguments and errors are those of `rbe.encode`.

    Source: docs/format.md; the Viterbi algorithm on a bit-shift trellis, the ring closed as in tail-biting codes.
    """
    w = trellis.rate(bits)
    if effort not in EFFORTS:
        raise RbeError(f"encode: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    chosen = EFFORTS[effort]
    if threads is not None and threads < 1:
        raise RbeError(f"encode: {threads} threads cannot work; give 1 or more, or None for all")
    if row_scale and rotate is True:
        raise RbeError("encode: row_scale with both sides rotated has no meaning; use rotate='in' or rotate=False")
    x, exponent = _source(W, overwrite)
    rows, columns = x.shape
    spec = SeedSpec(
        "trellis",
        (rows, columns),
        bits=w / 2,
        block=trellis.BLOCK,
        window=chosen.window if window is None else window,
        rotation=_rotation((rows, columns), rotate, seed),
    )
    trellis.check(spec)
    H = None if moments is None else feedback.checked(moments, columns)

    if not x.any():
        zero = torch.zeros(spec.blocks, 2 * w, dtype=torch.int64)
        ones = torch.ones(rows, dtype=torch.float16) if row_scale else None
        return Encoded(SeedMatrix(spec, zero, torch.tensor(0.0), ones), 0.0)

    total = math.fsum(_row_norms(x).square().tolist())
    scales = _row_scale_(x) if row_scale else None
    energies = None if scales is None else scales.float().square()
    _rotate_(x, spec.rotation)
    energy = math.fsum(_row_norms(x).square().tolist())
    unit = _unit(x, energy, spec.window, w, threads)

    def report(blocks: int) -> None:
        if progress is not None:
            progress(blocks * rows * columns // spec.blocks, rows * columns)

    options: dict[str, Any] = {"starts": chosen.starts(w), "reach": chosen.reach(spec.window, w), "threads": threads}
    if H is None:
        found = search(x, unit, spec.window, w, row_energy=energies, progress=report, **options)
    else:

        def column(target: Tensor) -> Tensor:
            return search(target, unit, spec.window, w, **options).seeds

        found = _with_feedback(x, H, unit, spec, column, energies, report)
    report(spec.blocks)
    scale = torch.tensor(math.ldexp(found.scale, exponent), dtype=torch.float32)
    # Rows whose scale is 0 in float16 are lost whole: total - xx.
    error = (max(total - found.xx, 0.0) + found.residual(math.ldexp(scale.item(), -exponent))) / total
    return Encoded(SeedMatrix(spec, found.seeds, scale, scales), error if H is not None else min(error, 1.0))


def _with_feedback(
    x: Tensor,
    H: Tensor,
    unit: float,
    spec: SeedSpec,
    column: feedback.Search,
    energies: Tensor | None,
    report: Callable[[int], object],
) -> Found:
    seeds, best, codes = feedback.encode_blocks(x, H, spec.rotation[1], unit, spec, column, energies, report)
    worth = torch.ones(len(x)) if energies is None else energies
    xx, xc, cc = (
        math.fsum((a.double() * b * worth[:, None]).sum(1).tolist()) for a, b in ((x, x), (x, codes), (codes, codes))
    )
    return Found(seeds, xx, xc, cc, best)
