"""Pruning, shared values and entropy coding (Deep Compression, 2016), trained to an exact number of bytes."""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.trained.values import half

# Shares of the run: dense until BEGIN, thinned by a cubic law until END, values shared from SHARED on.
BEGIN, END, SHARED = 0.1, 0.5, 0.6
# Steps between two thinnings.
EVERY = 50
# Widths of the field that holds the distance to the next kept weight; the cheapest is taken.
DISTANCES = (3, 4, 5, 6, 7, 8)
# Number of weights kept, and width of the distances.
HEADER = 4


def huffman(counts: Tensor) -> Tensor:
    """Lengths of a Huffman code, in bits, for symbols that occur so often; 0 for those that never do.

    >>> huffman(torch.tensor([4, 2, 1, 1, 0])).tolist()
    [1, 2, 3, 3, 0]
    """
    lengths = torch.zeros(len(counts), dtype=torch.int64)
    heap = [(int(c), k, [k]) for k, c in enumerate(counts.tolist()) if c]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        members = first[2] + second[2]
        lengths[torch.tensor(members)] += 1
        heapq.heappush(heap, (first[0] + second[0], first[1], members))
    return lengths


def coded_bits(symbols: Tensor, kinds: int) -> int:
    """Bits of the symbols in a Huffman code of their own, with its table: four bits a kind, the length of its word."""
    counts = torch.bincount(symbols, minlength=kinds)
    return int((counts * huffman(counts)).sum()) + 4 * kinds


def sparse_bytes(kept: Tensor, codes: Tensor, levels: int) -> int:
    """Bytes of a sparse matrix: distances between kept weights, codes, both tables, and the shared values at 16 bits.

    Args:
        kept: bool (weights,).
        codes: int64 (weights,), in [0, levels); those of kept weights are stored.
    """
    where = kept.nonzero().reshape(-1)
    distances = where.diff(prepend=torch.tensor([-1])) - 1
    costs = []
    for width in DISTANCES:
        longest = (1 << width) - 1
        # A distance that does not fit is cut: each `longest` passes over so many zeros and keeps nothing.
        extra = distances // longest
        symbols = torch.cat([distances % longest, torch.full((int(extra.sum()),), longest)])
        costs.append(coded_bits(symbols, longest + 1))
    bits = min(costs) + coded_bits(codes[where], levels)
    return math.ceil(bits / 8) + 2 * levels + HEADER


def shared_values(x: Tensor, levels: int, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """k-means on a line from evenly spread centres, and which centre each number belongs to."""
    centres = torch.linspace(float(x.min()), float(x.max()), levels)
    for _ in range(rounds):
        code = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        total = torch.zeros(levels).index_add_(0, code, x)
        number = torch.bincount(code, minlength=levels)
        centres = torch.where(number > 0, total / number.clamp_min(1), centres).sort().values
    return centres, torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)


class SparseLinear(nn.Module):
    """A matrix most of whose weights are zero; at the end the others share a few values."""

    kept: Tensor
    code: Tensor
    shared: Tensor

    def __init__(self, inputs: int, outputs: int, levels: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.levels = inputs, outputs, levels
        bound = inputs**-0.5
        self.latent = nn.Parameter(torch.empty(outputs * inputs).uniform_(-bound, bound))
        self.centres = nn.Parameter(torch.zeros(levels))
        self.register_buffer("kept", torch.ones(outputs * inputs, dtype=torch.bool))
        self.register_buffer("code", torch.zeros(outputs * inputs, dtype=torch.int64))
        self.register_buffer("shared", torch.tensor(False))

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Keep the largest of the weights kept so far."""
        self.kept.copy_(self.largest(count))

    def largest(self, count: int) -> Tensor:
        """Where the largest of the weights kept so far are, bool (weights,)."""
        size = torch.where(self.kept, self.latent.detach().abs(), -1.0)
        kept = torch.zeros_like(self.kept)
        kept[size.topk(min(count, int(self.kept.sum()))).indices] = True
        return kept

    def trial(self, count: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Kept, centres, codes and bytes, if so many of the weights kept now were kept."""
        kept = self.largest(count)
        centres, codes = shared_values(self.latent.detach()[kept], self.levels)
        code = torch.zeros_like(self.code)
        code[kept] = codes
        return kept, centres, code, sparse_bytes(kept, code, self.levels)

    @torch.no_grad()
    def share(self, count: int) -> None:
        """Keep so many, and let them share values from now on; only the values are trained further."""
        kept, centres, code, _ = self.trial(count)
        self.kept.copy_(kept)
        self.centres.copy_(centres)
        self.code.copy_(code)
        self.shared.fill_(True)

    def weight(self) -> Tensor:
        """(outputs, inputs)."""
        values = half(self.centres).index_select(0, self.code) if self.shared else self.latent
        return (values * self.kept).reshape(self.outputs, self.inputs)

    def stored(self) -> tuple[int, int]:
        """Weights, and the bytes of their codes."""
        return self.inputs * self.outputs, sparse_bytes(self.kept, self.code, self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, inputs) to (batch, outputs)."""
        return functional.linear(x, self.weight())


def spread(density: float, layers: Sequence[SparseLinear]) -> list[int]:
    """Weights kept in each layer at an overall density: in proportion to inputs + outputs (Mocanu et al., 2018)."""
    left = density * sum(len(layer.latent) for layer in layers)
    counts = [0] * len(layers)
    open_ = list(range(len(layers)))
    while open_:
        sides = sum(layers[k].inputs + layers[k].outputs for k in open_)
        wanted = {k: left * (layers[k].inputs + layers[k].outputs) / sides for k in open_}
        full = [k for k in open_ if wanted[k] >= len(layers[k].latent)]
        for k in full or open_:
            counts[k] = max(1, min(len(layers[k].latent), int(wanted[k])))
            left -= counts[k]
        open_ = [k for k in open_ if k not in full] if full else []
    return counts


class Pruned(nn.Sequential):
    """A network of SparseLinear that comes down to `nbytes` for its matrices within a run of `steps` training steps.

    Until it is that small it answers nothing in evaluation (all outputs equal), so that no larger network is chosen.
    """

    step: Tensor

    def __init__(self, *layers: nn.Module, nbytes: int, steps: int) -> None:
        super().__init__(*layers)
        self.nbytes, self.steps = nbytes, steps
        self.register_buffer("step", torch.tensor(0))

    @property
    def matrices(self) -> list[SparseLinear]:
        """The layers that are pruned."""
        return [layer for layer in self if isinstance(layer, SparseLinear)]

    def expected(self) -> float:
        """A density somewhat above the one that will fit, by the entropies of positions and, at the least, of codes."""
        weights, levels = sum(len(m.latent) for m in self.matrices), self.matrices[0].levels
        low, high = 0.0, 1.0
        for _ in range(40):
            p = (low + high) / 2
            entropy = 0.0 if p in (0.0, 1.0) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
            low, high = (p, high) if weights * (entropy + p * math.log2(levels) / 2) < 8 * self.nbytes else (low, p)
        return low

    def advance(self) -> None:
        """One training step of the schedule."""
        step = int(self.step)
        self.step += 1
        begin, end, shared = (int(share * self.steps) for share in (BEGIN, END, SHARED))
        if step == shared:
            for matrix, count in zip(self.matrices, self.fitting(), strict=True):
                matrix.share(count)
        elif step == end:
            self.keep(self.fitting())
        elif begin <= step < end and (step - begin) % EVERY == 0:
            last, left = self.expected(), 1 - (step - begin) / (end - begin)
            self.keep(spread(last + (1 - last) * left**3, self.matrices))

    def keep(self, counts: Sequence[int]) -> None:
        """Keep so many weights of each matrix."""
        for matrix, count in zip(self.matrices, counts, strict=True):
            matrix.keep(count)

    def fitting(self) -> list[int]:
        """Weights of each matrix, as many as fit the bytes if they share values now."""
        low, high = 0.0, 1.2 * self.expected()
        for _ in range(12):
            middle = (low + high) / 2
            counts = spread(middle, self.matrices)
            total = sum(m.trial(count)[3] for m, count in zip(self.matrices, counts, strict=True))
            low, high = (middle, high) if total <= self.nbytes else (low, middle)
        return spread(low, self.matrices)

    def forward(self, x: Tensor) -> Tensor:
        """As of a Sequential; see above for evaluation."""
        if self.training and torch.is_grad_enabled():
            self.advance()
        y: Tensor = super().forward(x)
        return y if self.training or all(m.shared for m in self.matrices) else torch.zeros_like(y)
