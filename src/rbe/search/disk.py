"""`encode` for the formats around points of the Poincare disk: `packed64`, `packed128` and `outer128`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.search import outer128, packed64, packed128
from rbe.search.blocks import Blocks, cut, in_chunks
from rbe.search.packed128 import EFFORTS, Effort
from rbe.search.proposal import Atoms, stack
from rbe.search.quantise import is_coarse, needed_scale
from rbe.search.viterbi import Encoded, _rotate_, _rotation, _row_scale_, _source, default_threads

# Numbers in the tables of a chunk of blocks.
_CHUNK = 1 << 20
# Cells up to which blocks may be larger than their matrix, whatever its size, which take seconds; and how many times
# larger beyond.
_PADDED, _TIMES = 1 << 20, 16
# Share of the time that goes by before the seeds are packed, for the progress shown.
_SEARCHING = 0.7


@dataclass(frozen=True)
class Packed:
    """Seeds of a chunk of blocks and the sums of x x, x c and c c over its cells, c being the unscaled weights."""

    seeds: Tensor
    sums: Tensor


def encode_disk(
    W: Tensor,
    format: str,
    block: int | None = 16,
    mode: str | None = None,
    stages: int = 1,
    precision: int = 32,
    bits: float | None = None,
    effort: str = "balanced",
    rotate: bool | str = False,
    row_scale: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Encoded:
    """Encode a matrix as seeds of `packed64` or `packed128`, and say how large the error is.

    >>> W = torch.outer(torch.linspace(0.9, 1, 32), torch.linspace(1, 1.1, 32))
    >>> result = encode_disk(W, "packed128")
    >>> result.matrix.seeds.shape, result.error < 0.01
    (torch.Size([4, 2]), True)

    Arguments and errors are those of `rbe.encode`.
    """
    _check(effort, threads)
    if row_scale and rotate is True:
        raise RbeError("encode: row_scale with both sides rotated has no meaning; use rotate='in' or rotate=False")
    x, exponent = _source(W)
    spec = formats.make_spec(
        format,
        (x.shape[0], x.shape[1]),
        bits=bits,
        block=block,
        rotation=_rotation((x.shape[0], x.shape[1]), rotate, seed),
        mode=mode,
        precision=precision,
        stages=stages,
    )
    if math.prod(spec.padded) > max(_PADDED, _TIMES * x.numel()):
        raise RbeError(
            f"encode: a block of {block} would pad the matrix {tuple(x.shape)} to {spec.padded}; "
            "choose a smaller one, or block=None for one block of the matrix' own shape"
        )
    if not x.any():
        zero = torch.zeros(spec.blocks, formats.get(format).words(spec), dtype=torch.int64)
        ones = torch.ones(x.shape[0], dtype=torch.float16) if row_scale else None
        return Encoded(SeedMatrix(spec, zero, torch.tensor(0.0), ones), 0.0)
    total = math.fsum(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square().tolist())
    scales = _row_scale_(x) if row_scale else None
    _rotate_(x, spec.rotation)
    blocks = cut(x, spec)
    energies = None
    if scales is not None:
        energies = cut(scales.double().square()[:, None].expand(x.shape), spec).values
    seeds, sums = fit(blocks, effort, energies, threads, progress)
    xx, xc, cc = (math.fsum(column) for column in sums.T.tolist())
    scale = torch.tensor(math.ldexp(xc / cc if cc > 0 else 0.0, exponent), dtype=torch.float32)
    found = math.ldexp(scale.item(), -exponent)
    # Rows whose scale is 0 in float16 are lost whole: total - xx.
    error = (max(total - xx, 0.0) + max(xx - 2 * found * xc + found * found * cc, 0.0)) / total
    return Encoded(SeedMatrix(spec, seeds, scale, scales), min(error, 1.0))


def _check(effort: str, threads: int | None) -> None:
    if effort not in EFFORTS:
        raise RbeError(f"encode: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    if threads is not None and threads < 1:
        raise RbeError(f"encode: {threads} threads cannot work; give 1 or more, or None for all")


class _Report:
    """Progress in weights over the two passes of a search."""

    def __init__(self, blocks: Blocks, progress: Callable[[int, int], object] | None) -> None:
        self.total, self.blocks, self.progress = math.prod(blocks.spec.shape), len(blocks), progress

    def share(self, start: float, end: float) -> Callable[[int], object]:
        """What a pass that takes this share of the time calls with the blocks it has done."""

        def report(done: int) -> None:
            if self.progress is not None:
                self.progress(int(self.total * (start + (end - start) * done / self.blocks)), self.total)

        return report


def _step(spec: SeedSpec) -> int:
    """Blocks in a chunk."""
    height, width = spec.block_shape
    return max(1, _CHUNK // max(2 * height * width * spec.stages, 128 * 66))


def _again(blocks: Blocks, atoms: Atoms, scale: float, effort: Effort, threads: int) -> tuple[Atoms, float]:
    """Search blocks again whose amplitudes would be rounded away, among profiles that reach any amplitude."""
    coarse = is_coarse(atoms, scale).nonzero()[:, 0]
    if coarse.numel() == 0:
        return atoms, scale
    small, fine = blocks.part(coarse), replace(effort, grid=replace(effort.grid, saturating=False))
    step = _step(blocks.spec)
    found = stack(in_chunks(len(small), step, lambda p: packed128.pursue(small.part(p), fine), threads), 0)
    atoms = Atoms(*(old.index_copy(0, coarse, new) for old, new in zip(atoms.tables, found.tables, strict=True)))
    return atoms, max(scale, needed_scale(atoms, "radial"))


def fit(
    blocks: Blocks,
    effort: str = "balanced",
    energies: Tensor | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Seeds of blocks, not all 0, and the sums of x x, x c and c c over each: c is its unscaled weights.

    Args:
        blocks: what to approximate.
        effort: "fast", "balanced" or "best".
        energies: (blocks, cells), multiplies the sums only.
        threads: default: torch's; the result does not depend on it.
        progress: called with weights done and weights in all.

    Returns:
        seeds int64 (blocks, words), sums float64 (blocks, 3).

    Raises:
        RbeError: the effort or the number of threads is not offered.
    """
    _check(effort, threads)
    return _fit(blocks, energies, effort, threads or default_threads(), _Report(blocks, progress))


def _fit(blocks: Blocks, energies: Tensor | None, level: str, threads: int, report: _Report) -> tuple[Tensor, Tensor]:
    spec, step, effort = blocks.spec, _step(blocks.spec), EFFORTS[level]

    def pack(part: slice, code: Tensor, radius: Tensor, angle: Tensor) -> Packed:
        seeds = formats.disk(spec.format).join(code, radius, angle, spec)
        made = formats.get(spec.format).generate(seeds, spec).flatten(1) * blocks.part(part).exists
        x = blocks.values[part].double()
        weight = 1.0 if energies is None else energies[part]
        return Packed(seeds, torch.stack([(weight * a * b).sum(1) for a, b in ((x, x), (x, made), (made, made))], 1))

    if spec.format == "packed64":
        coefficients = torch.cat(
            in_chunks(
                len(blocks), step, lambda p: packed64.best_coefficients(blocks.part(p)), threads, report.share(0, 0.5)
            )
        )
        scale = float(coefficients.abs().max()) / packed64.LARGEST
        done = in_chunks(
            len(blocks),
            step,
            lambda p: pack(p, *packed64.seeds_of(coefficients[p], scale, spec)),
            threads,
            report.share(0.5, 1.0),
        )
    elif spec.format == "outer128":
        terms = in_chunks(
            len(blocks), step, lambda p: outer128.pursue(blocks.part(p), level), threads, report.share(0.0, _SEARCHING)
        )
        signs, factors = (torch.cat(part) for part in zip(*terms, strict=True))
        scale = outer128.needed_scale(factors)
        done = in_chunks(
            len(blocks),
            step,
            lambda p: pack(p, *outer128.seeds_of(signs[p], factors[p], scale, spec)),
            threads,
            report.share(_SEARCHING, 1.0),
        )
    else:
        atoms = stack(
            in_chunks(
                len(blocks),
                step,
                lambda p: packed128.pursue(blocks.part(p), effort),
                threads,
                report.share(0.0, _SEARCHING),
            ),
            0,
        )
        scale = needed_scale(atoms, spec.mode)
        if spec.mode == "radial":
            atoms, scale = _again(blocks, atoms, scale, effort, threads)
        done = in_chunks(
            len(blocks),
            step,
            lambda p: pack(p, *packed128.finish(blocks.part(p), atoms.part(p), scale, effort)),
            threads,
            report.share(_SEARCHING, 1.0),
        )
    return torch.cat([p.seeds for p in done]), torch.cat([p.sums for p in done])
