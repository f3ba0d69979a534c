"""Matrices cut into blocks, and chunks of blocks dealt to threads.

Torch may add in another order when it has another number of threads. So a search cuts its blocks into chunks that do
not depend on threads, and every chunk is worked on by one thread alone: the same seeds, however many work.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from rbe.formats import SeedSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Blocks:
    """A matrix as blocks, and which of their cells exist.

    Attributes:
        spec: shape and block.
        values: (blocks, cells), row by row within a block; cells beyond the matrix are 0.
        kind: int64 (blocks,), which of `masks` a block has.
        masks: bool (kinds, cells), the cells that exist: whole blocks, and those at the right and lower edges.
    """

    spec: SeedSpec
    values: Tensor
    kind: Tensor
    masks: Tensor

    def part(self, chosen: slice | Tensor) -> "Blocks":
        """Some of the blocks."""
        return Blocks(self.spec, self.values[chosen], self.kind[chosen], self.masks)

    def with_values(self, values: Tensor) -> "Blocks":
        """The same cells with other values."""
        return Blocks(self.spec, values, self.kind, self.masks)

    @cached_property
    def exists(self) -> Tensor:
        """1 for the cells that exist, 0 for the others: float64 (blocks, cells)."""
        return self.masks.double()[self.kind]

    def __len__(self) -> int:
        return self.values.shape[0]


def cut(x: Tensor, spec: SeedSpec) -> Blocks:
    """The blocks of a matrix (rows, columns), in row-major order of the grid.

    >>> blocks = cut(torch.ones(3, 5), SeedSpec("packed64", (3, 5), bits=4.0, block=4))
    >>> len(blocks), blocks.values.sum(1).tolist(), blocks.masks.shape
    (2, [12.0, 3.0], torch.Size([2, 16]))
    """
    (rows, columns), (height, width), (down, across) = spec.shape, spec.block_shape, spec.grid
    values = functional.pad(x, (0, spec.padded[1] - columns, 0, spec.padded[0] - rows))
    values = values.reshape(down, height, across, width).permute(0, 2, 1, 3).reshape(-1, height * width)
    # Rows and columns that the last block of each side has.
    last = rows - (down - 1) * height, columns - (across - 1) * width
    lower = (torch.arange(down) == down - 1) & (last[0] < height)
    right = (torch.arange(across) == across - 1) & (last[1] < width)
    kind = (2 * lower.long()[:, None] + right.long()[None, :]).reshape(-1)
    inside_rows = torch.arange(height)[None, :] < torch.tensor([[height], [height], [last[0]], [last[0]]])
    inside_columns = torch.arange(width)[None, :] < torch.tensor([[width], [last[1]], [width], [last[1]]])
    masks = (inside_rows[:, :, None] & inside_columns[:, None, :]).reshape(4, -1)
    used, kind = kind.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return Blocks(spec, values, kind, masks[used])


def join(values: Tensor, spec: SeedSpec) -> Tensor:
    """The inverse of `cut`: the matrix (rows, columns) of values (blocks, cells)."""
    (down, across), (height, width) = spec.grid, spec.block_shape
    whole = values.reshape(down, across, height, width).permute(0, 2, 1, 3).reshape(spec.padded)
    return whole[: spec.shape[0], : spec.shape[1]]


_lock = threading.Lock()
_held: list[int] = []  # torch's number of threads before the first search that runs now, and one entry per search


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Torch's operations stay on the thread that calls them, as long as any search runs."""
    with _lock:
        _held.append(_held[0] if _held else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()
            if not _held:
                torch.set_num_threads(before)


def in_chunks(
    count: int,
    step: int,
    work: Callable[[slice], T],
    threads: int,
    progress: Callable[[int], object] | None = None,
) -> list[T]:
    """The results of `work` on every chunk of `step` out of `count` blocks, in order.

    >>> in_chunks(5, 2, lambda part: part.stop - part.start, threads=2)
    [2, 2, 1]

    Args:
        threads: how many chunks are worked on at a time; each has one thread of its own.
        progress: called with the number of blocks done; an exception in it, or in the work, ends the search.
    """
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    with _one_thread_each(), torch.no_grad(), ThreadPoolExecutor(max_workers=max(1, threads)) as pool:

        def alone(part: slice) -> T:
            with torch.no_grad():
                return work(part)

        futures = [pool.submit(alone, part) for part in parts]
        sizes = {future: part.stop - part.start for future, part in zip(futures, parts, strict=True)}
        pending, done = set(futures), 0
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.25, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                    done += sizes[future]
                if progress is not None:
                    progress(done)
        finally:
            for future in pending:
                future.cancel()
        return [future.result() for future in futures]
