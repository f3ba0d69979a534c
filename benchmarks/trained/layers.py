"""The matrices of the peers. Each has `weight()`, (outputs, inputs), and `stored()`: weights, and bytes for them.

Written from the ideas of the papers named; none has a bias, for the norm after it has one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.trained.values import Values, drawn, fitting
from rbe.mixing import fmix32

# Columns of a random basis are made in chunks this long, by Hadamard products of 64 x 64.
SIDE = 64
CHUNK = SIDE * SIDE
# Size of first numbers: at one size for every method one grid of learning rates will do.
SIZE = 0.1


def hashed(n: int, seed: int) -> Tensor:
    """n pseudo-random integers in [0, 2^32)."""
    return fmix32(torch.arange(n) ^ fmix32(torch.tensor(seed + 1)))


def size_of(inputs: int) -> float:
    """Root mean square of torch's fresh weights."""
    return (3 * inputs) ** -0.5


class Matrix(nn.Module):
    """What the layers share: shape, product and count."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def weight(self) -> Tensor:
        """(outputs, inputs), with gradients to what is stored."""
        raise NotImplementedError

    def stored(self) -> tuple[int, int]:
        """Weights, and the bytes that stand for them."""
        parts = [part for part in self.modules() if isinstance(part, Values)]
        return self.inputs * self.outputs, sum(part.nbytes for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, inputs) to (batch, outputs)."""
        return functional.linear(x, self.weight())


class QuantLinear(Matrix):
    """Every weight is a number of few bits (quantisation-aware training, straight through)."""

    def __init__(self, inputs: int, outputs: int, bits: int) -> None:
        super().__init__(inputs, outputs)
        bound = inputs**-0.5
        self.values = Values(torch.empty(outputs * inputs).uniform_(-bound, bound), bits)

    def weight(self) -> Tensor:
        return self.values().reshape(self.outputs, self.inputs)


class HashedLinear(Matrix):
    """Weights share the entries of a small table, chosen by one hash and signed by another (HashedNets, 2015)."""

    index: Tensor
    sign: Tensor

    def __init__(self, inputs: int, outputs: int, nbytes: int, bits: int, seed: int) -> None:
        super().__init__(inputs, outputs)
        weights = inputs * outputs
        count = min(weights, fitting(nbytes, bits))
        self.values = Values(drawn(count, SIZE), bits)
        # Not stored: both come from the seed.
        self.register_buffer("index", hashed(weights, seed) % count, persistent=False)
        signs = 1 - 2 * (hashed(weights, seed + 1000) >> 31).float()
        self.register_buffer("sign", signs * (size_of(inputs) / SIZE), persistent=False)

    def weight(self) -> Tensor:
        return (self.values().index_select(0, self.index) * self.sign).reshape(self.outputs, self.inputs)


class Basis(nn.Module):
    """n numbers as a combination of pseudo-random columns, which are never stored.

    The columns of a chunk are those of a Hadamard matrix, chosen and signed by a hash, as in Fastfood: two small
    products in place of n times `count` random numbers. Coefficients of size one give numbers of size one.
    """

    place: Tensor
    sign: Tensor
    hadamard: Tensor

    def __init__(self, n: int, count: int, seed: int) -> None:
        super().__init__()
        self.n = n
        self.chunks = math.ceil(n / CHUNK)
        order = torch.stack([hashed(CHUNK, seed + 2000 * k).argsort() for k in range(self.chunks)])
        turn = torch.arange(count)
        place = turn % self.chunks * CHUNK + order[turn % self.chunks, turn // self.chunks]
        self.register_buffer("place", place, persistent=False)
        signs = 1 - 2 * (hashed(self.chunks * CHUNK, seed + 1000) >> 31).float()
        # Every weight is a sum of count / chunks signed coefficients.
        self.register_buffer("sign", signs * (self.chunks / count) ** 0.5, persistent=False)
        rows = torch.ones(1, 1)
        while len(rows) < SIDE:
            rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
        self.register_buffer("hadamard", rows, persistent=False)

    @staticmethod
    def most(n: int) -> int:
        """How many columns there are."""
        return math.ceil(n / CHUNK) * CHUNK

    def forward(self, coefficients: Tensor) -> Tensor:
        """(count,) to (n,)."""
        sparse = torch.zeros(self.chunks * CHUNK, dtype=coefficients.dtype).index_put((self.place,), coefficients)
        mixed = self.hadamard @ sparse.reshape(self.chunks, SIDE, SIDE) @ self.hadamard
        signed = mixed.reshape(self.chunks, CHUNK) * self.sign.reshape(self.chunks, CHUNK)
        # Neighbours lie in different chunks, so that no row of the matrix hangs on one chunk alone.
        return signed.T.reshape(-1)[: self.n]


class BasisLinear(Matrix):
    """A combination of pseudo-random matrices (PRANC, 2023)."""

    def __init__(self, inputs: int, outputs: int, nbytes: int, bits: int, seed: int) -> None:
        super().__init__(inputs, outputs)
        count = min(Basis.most(inputs * outputs), fitting(nbytes, bits))
        self.values = Values(drawn(count, SIZE), bits)
        self.basis = Basis(inputs * outputs, count, seed)
        self.size = size_of(inputs) / SIZE

    def weight(self) -> Tensor:
        return self.basis(self.values() * self.size).reshape(self.outputs, self.inputs)


class LowRankLinear(Matrix):
    """A product of two thin matrices of few bits."""

    def __init__(self, inputs: int, outputs: int, rank: int, bits: int) -> None:
        super().__init__(inputs, outputs)
        self.rank = rank
        self.left, self.right = Values(drawn(outputs * rank, SIZE), bits), Values(drawn(rank * inputs, SIZE), bits)
        self.size = size_of(inputs) / rank**0.5 / SIZE**2

    @staticmethod
    def nbytes(inputs: int, outputs: int, rank: int, bits: int) -> int:
        """Bytes of such a layer."""
        return sum(math.ceil(side * rank * bits / 8) + (0 if bits == 16 else 2) for side in (inputs, outputs))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(outputs, rank) and (rank, inputs)."""
        return (self.left() * self.size).reshape(-1, self.rank), self.right().reshape(self.rank, -1)

    def weight(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        return x @ right.T @ left.T


class NolaLinear(LowRankLinear):
    """A product of two thin matrices, each a combination of pseudo-random ones (NOLA, 2024)."""

    def __init__(self, inputs: int, outputs: int, rank: int, nbytes: int, bits: int, seed: int) -> None:
        Matrix.__init__(self, inputs, outputs)
        self.rank = min(rank, inputs, outputs)
        sides = [outputs * self.rank, self.rank * inputs]
        counts = [min(Basis.most(side), fitting(nbytes * side // sum(sides), bits)) for side in sides]
        self.left, self.right = (Values(drawn(count, SIZE), bits) for count in counts)
        self.left_basis, self.right_basis = (
            Basis(side, count, seed + k) for k, (side, count) in enumerate(zip(sides, counts, strict=True))
        )
        self.size = size_of(inputs) / self.rank**0.5 / SIZE**2

    def factors(self) -> tuple[Tensor, Tensor]:
        left, right = self.left_basis(self.left() * self.size), self.right_basis(self.right())
        return left.reshape(-1, self.rank), right.reshape(self.rank, -1)
