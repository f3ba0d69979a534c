"""Matrix to seeds: `encode`."""

from collections.abc import Callable

import torch
from torch import Tensor

from rbe.formats import SeedSpec, trellis
from rbe.matrix import SeedMatrix
from rbe.mixing import fmix32
from rbe.rotation import rotate as _rotate
from rbe.search import viterbi


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
    """Encode a matrix as seeds."""
    w = trellis.rate(bits)
    L, starts = viterbi.EFFORTS[effort]
    L = window or L
    x = W.detach().to(torch.float32)
    s = fmix32(torch.tensor([2 * seed + 1, 2 * seed + 2])).tolist()
    rotation = (s[0] if rotate is True else 0, s[1] if rotate else 0)
    row = None
    if row_scale:
        row = x.pow(2).mean(1).sqrt().to(torch.float16)
        x = torch.where(row[:, None] > 0, x / row[:, None].float(), 0)
    x = _rotate(_rotate(x, rotation[1]).T, rotation[0]).T.contiguous()
    rms = x.pow(2).mean().sqrt().item()
    unit = 0.99 * rms / viterbi.CODE_RMS or 1.0
    found = viterbi.search(x, unit, L, w, starts, None, row.float() ** 2 if row is not None else None, threads)
    return SeedMatrix(
        SeedSpec("trellis", (W.shape[0], W.shape[1]), float(bits), 16, L, rotation),
        found.seeds, torch.tensor(found.scale), row,
    )
