"""Encode into `trellis` seeds: Viterbi over every ring of bits, and the scale around it (design 3.4).

The search itself is C++ (kernels/csrc/viterbi_kernel.h); here are the arguments, the scales and the error.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe import _cpu
from rbe.formats import trellis

# effort -> (window, starts): starting points of the ring beyond the first buy 0.1 to 1 %.
EFFORTS = {"fast": (12, 1), "balanced": (16, 1), "best": (16, 4)}

# The standard deviation of the sum of four uniform bytes.
CODE_RMS = 147.8


@dataclass(frozen=True)
class Search:
    """What one call of the C++ encoder left: seeds and the sums that give scale and error."""

    seeds: Tensor
    xx: float
    xc: float
    cc: float

    @property
    def scale(self) -> float:
        """The least-squares scale of the codes."""
        return self.xc / self.cc if self.cc > 0 else 0.0

    def error(self, scale: float) -> float:
        """Squared error relative to the source, for this scale of the codes."""
        return max(self.xx - 2 * scale * self.xc + scale * scale * self.cc, 0.0) / self.xx if self.xx > 0 else 0.0


def threads_by_default() -> int:
    """As many threads as torch would use here, and no more than this process may run on."""
    return max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def reach(window: int, w: int) -> int:
    """Weights on either side of the seam that settle the state there: several times what a window spans."""
    return min(128, max(32, math.ceil(6 * window / w)))


def search(
    x: Tensor,
    unit: float,
    window: int,
    w: int,
    starts: int = 1,
    importance: Tensor | None = None,
    row_energy: Tensor | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    multipliers: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Search:
    """Find seeds whose codes times `unit` come near the float32 matrix x (rows, columns)."""
    rows, columns = x.shape
    blocks = -(-rows // trellis.BLOCK) * -(-columns // trellis.BLOCK)
    seeds = torch.empty(blocks, 2 * w, dtype=torch.int64)
    sums = torch.empty(blocks, 3, dtype=torch.float64)
    even, odd = multipliers or trellis.multipliers(window, w)
    _cpu.encode_trellis(
        x.data_ptr(),
        0 if importance is None else importance.data_ptr(),
        0 if row_energy is None else row_energy.data_ptr(),
        rows,
        columns,
        unit,
        window,
        w,
        starts,
        reach(window, w) if overlap is None else overlap,
        even,
        odd,
        threads or threads_by_default(),
        seeds.data_ptr(),
        sums.data_ptr(),
        progress,
    )
    xx, xc, cc = sums.sum(0).tolist()
    return Search(seeds, xx, xc, cc)
