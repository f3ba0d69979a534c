"""Tables whose first rows have more bits than the last: every grade encoded as a trellis, then put together."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import Rate, SeedSpec
from rbe.matrix import SeedMatrix
from rbe.search.viterbi import EFFORTS, encode_trellis


def encode_grades(
    W: Tensor,
    grades: Rate,
    effort: str = "balanced",
    rotate: bool | str = "in",
    row_scale: bool = True,
    seed: int = 0,
    window: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    overwrite: bool = False,
) -> SeedMatrix:
    """Encode a matrix whose row ranges have different rates.

    >>> encode_grades(torch.randn(64, 32), ((16, 3.0), (64, 1.0)), "fast").spec.bits
    1.5

    Args:
        W: (rows, columns), as for `rbe.encode`.
        grades: (end row, bits) of each row range; the ends are whole blocks of 16, the last one all rows.
        rotate: "in" or False: rows that are mixed cannot have rates of their own.
        row_scale: must be True: the factors of the rows also hold what sets the scales of the grades apart.

    Raises:
        RbeError: as `rbe.encode`, or the grades do not fit the matrix.
    """
    if rotate is True or not row_scale:
        raise RbeError(
            "encode: grades need rows that stand alone, with scales of their own; give rotate='in' and row_scale=True"
        )
    if W.ndim != 2 or 0 in W.shape:
        raise RbeError(f"encode: W is {tuple(W.shape)}; it must be a matrix that is not empty")
    if effort not in EFFORTS:
        raise RbeError(f"encode: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    shape = (int(W.shape[0]), int(W.shape[1]))
    spec = formats.make_spec("trellis", shape, bits=grades, window=window or EFFORTS[effort].window)
    found: list[SeedMatrix] = []
    for rows, part in spec.parts:
        before = rows.start * shape[1]
        step = None if progress is None else _after(before, shape[0] * shape[1], progress)
        mine = encode_trellis(
            W[rows], part.bits, effort, rotate, True, seed, window, threads, step, overwrite=overwrite
        ).matrix
        found.append(mine)
    return _together(spec, found)


def _after(before: int, total: int, progress: Callable[[int, int], object]) -> Callable[[int, int], object]:
    return lambda done, _: progress(before + done, total)


def _together(spec: SeedSpec, found: list[SeedMatrix]) -> SeedMatrix:
    if not spec.grades:
        return found[0]
    scale = torch.stack([part.scale for part in found]).max()
    factors = [
        part.row_scale.double() * (part.scale.double() / scale.double() if scale > 0 else 1.0)
        for part in found
        if part.row_scale is not None
    ]
    # A zero grade has rotations too; they are the same for all, since they depend on the columns alone.
    spec = replace(spec, rotation=found[0].spec.rotation)
    seeds = torch.cat([part.seeds.reshape(-1, 2) for part in found])
    return SeedMatrix(spec, seeds, scale, torch.cat(factors).to(torch.float16))
