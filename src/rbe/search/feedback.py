"""Encode with the second moments of the layer's input: error feedback between block columns, then descent.

What counts is the error of the layer's output, tr(E H E^T) for the weight error E and the inputs' second moments H.
Block columns are encoded one after the other; what one leaves is compensated in those to come (block LDL). Then every
block is encoded once more with all the others as they are, and changed only where that lowers the loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.matrix import SeedMatrix
from rbe.rotation import rotate

# One pass of descent takes most of what there is to take; the next ones give a percent.
_PASSES = 1

Search = Callable[[Tensor], Tensor]


def checked(moments: Tensor, columns: int) -> Tensor:
    """Second moments as float64, symmetric.

    Raises:
        RbeError: they are no finite (columns, columns) matrix.
    """
    if tuple(moments.shape) != (columns, columns) or not moments.is_floating_point():
        raise RbeError(
            f"encode: moments are {moments.dtype} {tuple(moments.shape)}; a matrix with {columns} columns needs real "
            f"({columns}, {columns}): the mean of x x^T over the layer's inputs x"
        )
    H = moments.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(H).all()):
        raise RbeError(
            "encode: the moments hold NaN or infinity; the model's activations overflow: calibrate in float32"
        )
    return (H + H.T) / 2


def proxy_loss(E: Tensor, moments: Tensor) -> float:
    """tr(E H E^T): the squared error of the outputs that a weight error E makes.

    >>> proxy_loss(torch.ones(2, 3), torch.eye(3))
    6.0
    """
    E = E.double()
    return float(((E @ moments.double()) * E).sum())


def encode_blocks(
    x: Tensor,
    moments: Tensor,
    rotation: int,
    unit: float,
    spec: SeedSpec,
    search: Search,
    energies: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, float, Tensor]:
    """Seeds for a prepared matrix.

    Args:
        x: float32 (rows, columns), rotated.
        moments: float64 (columns, columns), not rotated yet.
        rotation: seed of the input side.
        unit: the size of one code step.
        spec: of the whole matrix.
        search: seeds (blocks, words) of one block column (rows, up to 16), as near to it as they come.
        energies: float32 (rows,), what the squared error of a row is worth.
        progress: called with blocks done, of `spec.blocks`.

    Returns:
        (seeds, scale that is best under the moments, codes float32 like x).

    Raises:
        RbeError: the moments are not positive definite.
    """
    rows, columns = x.shape
    H = rotate(rotate(moments, rotation).T.contiguous(), rotation)
    try:
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except RuntimeError as cause:
        raise RbeError(
            "encode: the moments are not positive definite; add a small multiple of the identity, or use more inputs"
        ) from cause
    spans = [slice(j, min(j + trellis.BLOCK, columns)) for j in range(0, columns, trellis.BLOCK)]
    words = trellis.words(spec)
    down = -(-rows // trellis.BLOCK)
    seeds = torch.empty(down, len(spans), words, dtype=torch.int64)
    want = x.double()
    codes = torch.zeros_like(want)
    steps = 0

    def nearest(target: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal steps
        found = search(target.float().contiguous())
        narrow = SeedSpec(spec.format, tuple(target.shape), spec.bits, trellis.BLOCK, spec.window)  # type: ignore[arg-type]
        steps += down
        if progress is not None:
            progress(steps // (1 + _PASSES))
        return found, SeedMatrix(narrow, found, torch.tensor(1.0)).decode().double()

    left = want.clone()
    for number, span in enumerate(spans):
        seeds[:, number], codes[:, span] = nearest(left[:, span])
        if span.stop < columns:
            missed = left[:, span] - unit * codes[:, span]
            spread = torch.linalg.solve_triangular(U[span, span], missed, upper=True, left=False)
            left[:, span.stop :] -= spread @ U[span, span.stop :]
    del left
    E = want - unit * codes
    G = E @ H
    for _ in range(_PASSES):
        for number, span in enumerate(spans):
            own, old = H[span, span], E[:, span]
            others = G[:, span] - old @ own
            found, code = nearest(want[:, span] + torch.linalg.solve(own, others.T).T)
            new = want[:, span] - unit * code
            gain = _loss(old, own, others) - _loss(new, own, others)
            better = torch.nn.functional.pad(gain, (0, -rows % trellis.BLOCK)).reshape(down, -1).sum(1) > 0
            chosen = better.repeat_interleave(trellis.BLOCK)[:rows, None]
            seeds[:, number] = torch.where(better[:, None], found, seeds[:, number])
            codes[:, span] = torch.where(chosen, code, codes[:, span])
            change = torch.where(chosen, new - old, 0.0)
            G += change @ H[span]
            E[:, span] += change
    CH = codes @ H
    worth = torch.ones(rows, 1, dtype=torch.float64) if energies is None else energies.double()[:, None]
    cc = math.fsum((CH * codes * worth).sum(1).tolist())
    scale = math.fsum((CH * want * worth).sum(1).tolist()) / cc if cc > 0 else 0.0
    return seeds.reshape(-1, words), scale, codes.float()


def _loss(E: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """What a block column contributes to the loss, row by row, the rest of it fixed."""
    return ((E @ own + 2 * others) * E).sum(1)
