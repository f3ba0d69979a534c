"""From a matrix to seeds: `encode`."""

from collections.abc import Callable

from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import Rate
from rbe.matrix import SeedMatrix
from rbe.search.disk import encode_disk
from rbe.search.graded import encode_grades
from rbe.search.viterbi import encode_trellis

__all__ = ["encode"]


def encode(
    W: Tensor,
    format: str = "trellis",
    bits: Rate | None = None,
    effort: str = "balanced",
    rotate: bool | str | None = None,
    row_scale: bool = False,
    seed: int = 0,
    window: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    *,
    block: int | None = 16,
    mode: str | None = None,
    stages: int = 1,
    precision: int = 32,
    moments: Tensor | None = None,
    overwrite: bool = False,
) -> SeedMatrix:
    """Encode a matrix as seeds.

    >>> import torch
    >>> W = torch.randn(64, 96)
    >>> m = encode(W, bits=2, effort="fast")
    >>> m.shape, bool((m.decode() - W).square().mean() < 0.1)
    ((64, 96), True)
    >>> encode(W, format="packed128", block=8, stages=2).bits_per_weight > 4
    True

    Args:
        W: (rows, columns), rows being outputs as in torch; any real floating dtype, finite.
        format: "trellis", "packed64", "packed128" or "outer128".
        bits: rate of a trellis, in bits per weight: 0.5 to 4 in steps of a half, 2 when left out. For a table whose
            first rows count most it may be ((end row, bits), ...), with row_scale and without rotation of the output
            side. The rate of the other formats follows from block and stages.
        effort: "fast", "balanced" or "best". Trellis: 2^12 states, 2^16, or 2^16 from several starting points;
            packed128: how finely profiles are searched and refined, and how often several stages are fitted again.
        rotate: True rotates both sides, which makes the weights Gaussian; "in" the feature side only, so that a row can
            be generated alone (embeddings); False neither. Default: True for a trellis, False for the others, which
            live on what is not Gaussian in a matrix.
        row_scale: give every row a float16 scale of its own; only without rotation of the output side.
        seed: chooses the rotations.
        window: trellis only: bits a weight sees of its ring, 12, 14 or 16; default: the effort's.
        threads: default: torch's; the result does not depend on it.
        progress: called with (weights done, weights in all) a few times a second, and at the end.
        block: edge of a block, 16 for a trellis; None makes the whole matrix one block (packed64 and packed128).
        mode: packed128: "radial" (when None) or "faithful".
        stages: seeds summed in a block (packed64 and packed128).
        precision: packed64: bits of a fixed-point number, 32 or 64.
        moments: trellis only: (columns, columns), the mean of x x^T over the layer's inputs x, positive definite. The
            error of the outputs is then made small instead of that of the weights, which grows (`rbe.calibrate`).
        overwrite: W may be used as working memory, and hold anything afterwards: a trellis then needs no copy of a
            contiguous float32 matrix.

    Returns:
        The seeds with the least-squares scale: without moments the relative squared error is at most 1. A zero matrix
        gets scale 0. With moments the seeds can depend on the number of threads of torch's matrix products.

    Raises:
        RbeError: the matrix is not 2-D, empty, not floating point or not finite, or an option is not offered.

    Source: docs/format.md; 001 chapter 8.3.
    """
    formats.get(format)
    if formats.is_disk(format):
        if isinstance(bits, tuple):
            raise RbeError(f"encode: grades {bits} belong to a trellis; {format} has the rate of its block")
        if window not in (None, 16):  # 16 is what a specification without a trellis says
            raise RbeError(f"encode: window={window} belongs to a trellis; {format} has none")
        if moments is not None:
            raise RbeError(f"encode: moments are for a trellis; {format} cannot use them: leave them out")
        found = encode_disk(
            W,
            format,
            block=block,
            mode=mode,
            stages=stages,
            precision=precision,
            bits=bits,
            effort=effort,
            rotate=False if rotate is None else rotate,
            row_scale=row_scale,
            seed=seed,
            threads=threads,
            progress=progress,
        )
        return found.matrix
    if (block, mode, stages, precision) != (16, None, 1, 32):
        raise RbeError(
            f"encode: block={block}, mode={mode!r}, stages={stages}, precision={precision} are not a trellis'; "
            "it has blocks of 16 and one stage: choose its rate by bits"
        )
    turned = True if rotate is None else rotate
    if isinstance(bits, tuple):
        if moments is not None:
            raise RbeError("encode: moments and grades do not go together; give one of them")
        return encode_grades(W, bits, effort, turned, row_scale, seed, window, threads, progress, overwrite)
    return encode_trellis(
        W, 2 if bits is None else bits, effort, turned, row_scale, seed, window, threads, progress, moments, overwrite
    ).matrix
