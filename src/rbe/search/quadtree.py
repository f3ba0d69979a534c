"""Blocks split where the error is too large: a quad-tree of seeds.

The matrix is cut into large blocks of one seed each. A block with a cell whose error is above its threshold

    threshold(i, j) = epsilon (1 + alpha |W_ij| / max |W|)

is split into four, down to the smallest edge. All blocks of a level are fitted at once.

Source: 001 section 8.7.1; reading 46 of the sources: a seed of a whole matrix cannot be refined locally, blocks can.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.search.blocks import Blocks, cut
from rbe.search.disk import fit
from rbe.search.linear_map import product
from rbe.search.viterbi import _source

# Weights generated at a time.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Level:
    """The blocks of one edge.

    Attributes:
        edge: of the blocks.
        split: bool (blocks of this edge,), in the order in which they were made; none at the smallest edge.
        seeds: int64 (leaves, words), of the blocks that are not split.
        scale: float32, 0-d.
    """

    edge: int
    split: Tensor
    seeds: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class QuadTree:
    """A (rows, columns) matrix of seeds for blocks of several sizes.

    >>> W = torch.zeros(64, 64)
    >>> W[:16, :16] = torch.randn(16, 16)
    >>> tree = QuadTree.fit(W, epsilon=0.1, largest=32, smallest=8)
    >>> [(level.edge, len(level.seeds)) for level in tree.levels]
    [(32, 3), (16, 3), (8, 4)]

    Attributes:
        spec: shape, format, mode and stages; its block is the largest edge.
        levels: from the largest edge to the smallest, each half of the one before.

    Source: 001 section 8.7.1.
    """

    spec: SeedSpec
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        definition = formats.get(self.spec.format)
        definition.check(self.spec)
        words, place = definition.words(self.spec), torch.arange(self.spec.blocks)
        for number, level in enumerate(self.levels):
            spec = self._spec_of(level.edge)
            flags = 0 if number == len(self.levels) - 1 else len(place)
            wrong = level.split.dtype != torch.bool or tuple(level.split.shape) != (flags,)
            leaves = len(place) - int(level.split.sum())
            if level.edge << number != self.spec.block or wrong or tuple(level.seeds.shape) != (leaves, words):
                raise RbeError(
                    f"quad-tree: level {number} has blocks of {level.edge}, {tuple(level.split.shape)} flags and seeds "
                    f"{tuple(level.seeds.shape)}, but {len(place)} blocks of {words} words were due; "
                    "the source is damaged"
                )
            if not bool(level.scale.isfinite()):
                raise RbeError(f"quad-tree: the scale of level {number} is not finite; the source is damaged")
            definition.check_seeds(level.seeds, spec)
            place = _children(place[level.split], spec) if flags else place

    def _spec_of(self, edge: int) -> SeedSpec:
        return _at_edge(self.spec, edge)

    @classmethod
    def fit(
        cls,
        W: Tensor,
        epsilon: float,
        alpha: float = 0.0,
        largest: int = 64,
        smallest: int = 4,
        format: str = "packed128",
        mode: str | None = None,
        stages: int = 1,
        effort: str = "balanced",
        threads: int | None = None,
    ) -> Self:
        """Split blocks until every cell is within its threshold, or the block is of the smallest edge.

        `over` says which blocks of the smallest edge are not within it.

        Args:
            W: (rows, columns), rows being outputs as in torch; any real floating dtype, finite.
            epsilon: error allowed to a small weight, in the units of W.
            alpha: how much more is allowed to a large one, relative to the largest.
            largest, smallest: edges; their ratio is a power of two.
            format, mode, stages, effort, threads: as in `rbe.encode`.

        Raises:
            RbeError: the matrix or an option is not offered.
        """
        _check_threshold(epsilon, alpha)
        depth = int(math.log2(largest // smallest)) if 1 <= smallest <= largest else -1
        if depth < 0 or smallest << depth != largest:
            raise RbeError(f"quad-tree: edges {largest} to {smallest} do not halve into each other; give 64 and 4, say")
        x, exponent = _source(W)
        threshold = _thresholds(x, exponent, epsilon, alpha)
        spec = formats.make_spec(format, (x.shape[0], x.shape[1]), block=largest, mode=mode, stages=stages)
        levels, place = [], torch.arange(spec.blocks)
        for k in range(depth + 1):
            here, last = _at_edge(spec, largest >> k), k == depth
            blocks = cut(x, here).part(place)
            seeds, scale = _seeds(blocks, effort, threads)
            bad = _exceeds(blocks, cut(threshold, here).values[place], seeds, scale)
            split = torch.zeros_like(bad) if last else bad
            stored = torch.tensor(math.ldexp(scale, exponent), dtype=torch.float32)
            levels.append(Level(largest >> k, split[:0] if last else split, seeds[~split], stored))
            place = _children(place[split], here)
        return cls(spec, tuple(levels))

    def over(self, W: Tensor, epsilon: float, alpha: float = 0.0) -> Tensor:
        """Which blocks of the smallest edge have a cell above its threshold, since nothing smaller could be split.

        >>> W = torch.zeros(64, 64)
        >>> W[:4, 32:36] = torch.eye(4)
        >>> QuadTree.fit(W, epsilon=0.1, largest=32, smallest=4).over(W, epsilon=0.1).tolist()
        [[0, 32]]

        Args:
            W, epsilon, alpha: as given to `fit`; every larger block is within its thresholds.

        Returns:
            int64 (blocks, 2): row and column of the first cell of each, in row-major order.

        Raises:
            RbeError: the matrix is not of the tree's shape, or a threshold is not offered.
        """
        _check_threshold(epsilon, alpha)
        x, exponent = _source(W)
        if tuple(x.shape) != self.spec.shape:
            raise RbeError(f"quad-tree: the matrix is {tuple(x.shape)}, but the tree is of one {self.spec.shape}")
        *_, (spec, place, level) = self._leaves()
        limits = cut(_thresholds(x, exponent, epsilon, alpha), spec).values[place]
        bad = _exceeds(cut(x, spec).part(place), limits, level.seeds, math.ldexp(level.scale.item(), -exponent))
        found = place[bad].sort().values
        return level.edge * torch.stack([found // spec.grid[1], found % spec.grid[1]], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the seeds, the scales and the flags, eight flags a byte."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of the unpadded matrix."""
        return 8 * self.nbytes / math.prod(self.spec.shape)

    def decode(self) -> Tensor:
        """The dense matrix, float32 (rows, columns)."""
        out = torch.zeros(self._outer)
        for spec, place, level in self._leaves():
            height, width = self._outer[0] // level.edge, self._outer[1] // level.edge
            grid = out.reshape(height, level.edge, width, level.edge).permute(0, 2, 1, 3)
            row, column = place // spec.grid[1], place % spec.grid[1]
            for part in _parts(len(place), level.edge):
                grid[row[part], column[part]] = _generate(level, part, spec).float()
        return out[: self.spec.shape[0], : self.spec.shape[1]].clone()

    def matmul(self, x: Tensor) -> Tensor:
        """The product with x (..., columns): (..., rows) in x's dtype, differentiable in x.

        Some blocks are generated at a time.

        Raises:
            RbeError: x has the wrong width or dtype.
        """
        columns = self.spec.shape[1]
        if x.ndim < 1 or x.shape[-1] != columns or not x.is_floating_point():
            raise RbeError(f"quad-tree: x is {x.dtype} {tuple(x.shape)}; it must be (..., {columns})")
        return product(x, self._times, partial(self._times, transposed=True))

    def _times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x W^T, or x W where transposed, in x's dtype."""
        ends, outer = (self.spec.shape, self._outer) if transposed else (self.spec.shape[::-1], self._outer[::-1])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        flat = torch.zeros(x.shape[:-1].numel(), outer[0], dtype=dtype)
        flat[:, : ends[0]] = x.reshape(-1, ends[0])
        y = torch.zeros(len(flat), outer[1], dtype=dtype)
        for spec, place, level in self._leaves():
            from_, to = (part.view(len(flat), -1, level.edge) for part in (flat, y))
            row, column = place // spec.grid[1], place % spec.grid[1]
            reads, writes = (row, column) if transposed else (column, row)
            for part in _parts(len(place), level.edge * max(1, len(flat) // level.edge)):
                weights = _generate(level, part, spec).to(dtype)
                weights = weights if transposed else weights.mT
                to.index_add_(1, writes[part], torch.einsum("bij,nbi->nbj", weights, from_[:, reads[part]]))
        return y[:, : ends[1]].to(x.dtype).reshape(*x.shape[:-1], ends[1])

    @property
    def _outer(self) -> tuple[int, int]:
        """Shape padded to the largest edge."""
        return self.spec.padded

    def _leaves(self) -> Iterator[tuple[SeedSpec, Tensor, Level]]:
        """Specification, place in the grid of its edge, and level of the blocks that are not split."""
        place = torch.arange(self.spec.blocks)
        for level in self.levels:
            spec = _at_edge(self.spec, level.edge)
            split = level.split if level.split.numel() else torch.zeros(len(place), dtype=torch.bool)
            yield spec, place[~split], level
            place = _children(place[split], spec)

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: scales, flags as bits (the first in the lowest bit), and seeds level by level."""
        flags = torch.cat([level.split for level in self.levels]).to(torch.uint8)
        bits = torch.zeros(-(-flags.numel() // 8) * 8, dtype=torch.uint8)
        bits[: flags.numel()] = flags
        packed = (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        seeds = torch.cat([level.seeds for level in self.levels])
        return {"seeds": seeds, "split": packed, "scales": torch.stack([level.scale for level in self.levels])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: SeedSpec) -> Self:
        """The inverse of `to_tensors`; the specification is the tree's.

        Raises:
            RbeError: a tensor is missing or does not fit.
        """
        missing = {"seeds", "split", "scales"} - set(tensors)
        if missing:
            raise RbeError(f"quad-tree: {sorted(missing)} missing among {sorted(tensors)}; the file is incomplete")
        seeds, scales = tensors["seeds"], tensors["scales"]
        flags = ((tensors["split"][:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
        levels, place = [], torch.arange(spec.blocks)
        for k in range(len(scales)):
            edge = (spec.block or 0) >> k
            here, last = _at_edge(spec, edge), k == len(scales) - 1
            count = 0 if last else len(place)
            if count > len(flags):
                raise RbeError(f"quad-tree: {len(flags)} flags for {count} blocks; the source is damaged")
            split, flags = flags[:count], flags[count:]
            leaves = len(place) - int(split.sum())
            levels.append(Level(edge, split, seeds[:leaves], scales[k]))
            seeds, place = seeds[leaves:], _children(place[split], here) if not last else place
        if len(seeds) or flags.any():
            raise RbeError(f"quad-tree: {len(seeds)} seeds more than the tree has leaves; the source is damaged")
        return cls(spec, tuple(levels))


def _check_threshold(epsilon: float, alpha: float) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0 and math.isfinite(alpha) and alpha >= 0):
        raise RbeError(f"quad-tree: epsilon {epsilon} and alpha {alpha} must be finite and not negative")


def _thresholds(x: Tensor, exponent: int, epsilon: float, alpha: float) -> Tensor:
    """The error allowed to every cell of W = x 2^exponent, in the units of x."""
    most = max(float(x.abs().max()), 1e-300)
    return math.ldexp(epsilon, -exponent) * (1.0 + alpha * x.double().abs() / most)


def _at_edge(spec: SeedSpec, edge: int) -> SeedSpec:
    """The same matrix in blocks of another edge."""
    return formats.make_spec(spec.format, spec.shape, block=edge, mode=spec.mode, stages=spec.stages)


def _children(place: Tensor, spec: SeedSpec) -> Tensor:
    """Places of the quarters of blocks, in the grid of half the edge; those beyond the matrix do not exist."""
    half = _half(spec)
    row, column = place // spec.grid[1], place % spec.grid[1]
    rows = (2 * row[:, None] + torch.tensor([0, 0, 1, 1])).flatten()
    columns = (2 * column[:, None] + torch.tensor([0, 1, 0, 1])).flatten()
    exists = (rows < half[0]) & (columns < half[1])
    return rows[exists] * half[1] + columns[exists]


def _half(spec: SeedSpec) -> tuple[int, int]:
    """The grid of half the edge."""
    edge = max(1, (spec.block or 1) // 2)
    return -(-spec.shape[0] // edge), -(-spec.shape[1] // edge)


def _seeds(blocks: Blocks, effort: str, threads: int | None) -> tuple[Tensor, float]:
    """Seeds of blocks and their scale, as a float32 number."""
    if not blocks.values.any():
        words = formats.get(blocks.spec.format).words(blocks.spec)
        return torch.zeros(len(blocks), words, dtype=torch.int64), 0.0
    seeds, sums = fit(blocks, effort, threads=threads)
    _, xc, cc = (math.fsum(column) for column in sums.T.tolist())
    return seeds, torch.tensor(xc / cc if cc > 0 else 0.0, dtype=torch.float32).item()


def _exceeds(blocks: Blocks, limits: Tensor, seeds: Tensor, scale: float) -> Tensor:
    """Whether a cell of a block is above its threshold: bool (blocks,)."""
    out = torch.zeros(len(blocks), dtype=torch.bool)
    for part in _parts(len(blocks), blocks.spec.block or 1):
        made = formats.get(blocks.spec.format).generate(seeds[part], blocks.spec).flatten(1) * scale
        wrong = (made - blocks.values[part]).abs() > limits[part]
        out[part] = (wrong & blocks.masks[blocks.kind[part]]).any(1)
    return out


def _parts(count: int, edge: int) -> list[slice]:
    """Chunks of blocks."""
    step = max(1, _CHUNK // (edge * edge))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _generate(level: Level, part: slice, spec: SeedSpec) -> Tensor:
    """Weights of some leaves, float64 (blocks, edge, edge)."""
    return formats.get(spec.format).generate(level.seeds[part], spec) * level.scale.double()
