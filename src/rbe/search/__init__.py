"""From a matrix to seeds: `encode`."""

from collections.abc import Callable

from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.search.viterbi import encode_trellis

__all__ = ["encode"]

_ENCODERS = {"trellis": encode_trellis}


def encode(
    W: Tensor,
    format: str = "trellis",
    bits: float = 2,
    effort: str = "balanced",
    rotate: bool | str = True,
    row_scale: bool = False,
    seed: int = 0,
    window: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SeedMatrix:
    """Encode a matrix as seeds.

    >>> import torch
    >>> W = torch.randn(64, 96)
    >>> m = encode(W, bits=2, effort="fast")
    >>> m.shape, bool((m.decode() - W).square().mean() < 0.1)
    ((64, 96), True)

    Args:
        W: (rows, columns), rows being outputs as in torch; any real floating dtype, finite.
        format: name of the format.
        bits: rate of the seeds, in bits per weight: 0.5 to 4 in steps of a half.
        effort: "fast" (a trellis of 2^12 states), "balanced" (2^16) or "best" (2^16, several starting points).
        rotate: True rotates both sides, which makes the weights Gaussian; "in" the feature side only, so that a row can
            be generated alone (embeddings); False neither.
        row_scale: give every row a float16 scale of its own; only without rotation of the output side.
        seed: chooses the rotations.
        window: bits a weight sees of its ring, 12, 14 or 16; default: the effort's.
        threads: default: torch's; the result does not depend on it.
        progress: called with (weights done, weights in all) a few times a second, and at the end.

    Returns:
        The seeds with the least-squares scale: the relative squared error is at most 1. A zero matrix gets scale 0.

    Raises:
        RbeError: the matrix is not 2-D, empty, not floating point or not finite, or an option is not offered.

    Source: design 3.4.
    """
    formats.get(format)
    if format not in _ENCODERS:
        raise RbeError(f"encode: format {format!r} has no encoder; choose one of {', '.join(_ENCODERS)}")
    return _ENCODERS[format](W, bits, effort, rotate, row_scale, seed, window, threads, progress).matrix
