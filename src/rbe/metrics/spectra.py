"""Singular values of matrices of any size: spectral error, principal energy, Lipschitz constant, condition, Jacobians.

Up to `full` (2048) columns or rows, whichever are fewer, everything is exact. Beyond, singular values are estimated
with a randomised method: the largest by subspace iteration, the rest, as a distribution, by stochastic Lanczos
quadrature.

Sources:
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, 2011 (the largest).
    S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017 (the rest).
    G. Golub, W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, 1965 (bidiagonalisation).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rbe.errors import RbeError

FULL = 2048

# Added to the seeds of probes: a matrix drawn from a generator of the same small number would hold the probes.
_APART = 0x5EED_0000
# Of the randomised method: values taken by subspace iteration, iterations, probes of the rest, steps of each.
_LEADING, _ITERATIONS, _PROBES, _STEPS = 32, 4, 8, 48


@dataclass(frozen=True)
class Spectrum:
    """Singular values.

    Attributes:
        values: descending, float64, as many as the matrix has rows or columns, whichever are fewer.
        error: what may be wrong with them, as a share of their norm: |values - true| <= error |true|. 0 where they are
            exact; otherwise estimated, from halves of the estimate, from one with half the steps, and from one that
            takes the values to stand in clusters.
        noise: share of the largest value below which a value may be made of rounding.
    """

    values: Tensor
    error: float = 0.0
    noise: float = 0.0

    @property
    def condition(self) -> float:
        """Largest value divided by the smallest; infinity where that is noise. Of no use where values are estimated."""
        if len(self.values) == 0:
            return math.inf
        most, least = self.values[0].item(), self.values[-1].item()
        return math.inf if least <= self.noise * most else most / least


@dataclass(frozen=True)
class Jacobian:
    """How far the cells of a block move when its seed moves.

    Attributes:
        rank: 0, 1 or 2.
        largest: largest singular value, the most the block moves (Frobenius) for a step of length 1.
        smallest: smallest singular value; 0 at rank 0 and 1.
    """

    rank: int
    largest: float
    smallest: float

    @property
    def condition(self) -> float:
        """largest / smallest; infinity where a direction of the seed moves nothing."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


def spectrum(matrix: Tensor, full: int = FULL, seed: int = 0) -> Spectrum:
    """Singular values of a matrix (rows, columns).

    >>> spectrum(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).values.tolist()
    [4.0, 3.0]

    Args:
        matrix: any float dtype; computed in float64.
        full: exact where rows or columns are at most so many.
        seed: of the estimate of larger ones; the same gives the same values.

    Raises:
        RbeError: not a matrix, or not finite.
    """
    a = _tall(matrix, "spectrum")
    if a.shape[1] <= full:
        return Spectrum(torch.linalg.svdvals(_reduced(a)), noise=_noise(a))
    values, error = _estimate(a.double(), seed)
    return Spectrum(values, error, _noise(a))


def spectral_error(
    approximation: Tensor | Spectrum, reference: Tensor | Spectrum, full: int = FULL, seed: int = 0
) -> float:
    """Norm of the difference of the sorted singular values, relative to that of the reference's.

    >>> spectral_error(torch.eye(4) * 3, torch.eye(4) * 4)
    0.25

    At most `relative_error`, and blind to the directions: a matrix with its rows shuffled has spectral error 0. Where
    the spectra are estimates, it is off by at most the sum of their errors.

    Raises:
        RbeError: not matrices of one shape, or not finite.
    """
    ours, wanted = _both("spectral_error", approximation, reference, full, seed)
    size, difference = float(wanted.norm()), float((ours - wanted).norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def principal_ratio(
    approximation: Tensor | Spectrum, reference: Tensor | Spectrum, k: int, full: int = FULL, seed: int = 0
) -> float:
    """PCR_k: energy in the k largest singular values, as a multiple of that in the reference's.

    >>> principal_ratio(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([2.0, 1.0])), k=1)
    0.25

    Noise adds energy, so it can be above 1, and 1 does not mean that anything is kept; see `captured_energy`.

    Raises:
        RbeError: not matrices of one shape, not finite, or k is not among their singular values.
    """
    ours, wanted = _both("principal_ratio", approximation, reference, full, seed)
    if not 1 <= k <= len(wanted):
        raise RbeError(
            f"principal_ratio: k is {k}; the matrices have {len(wanted)} singular values: give 1 to that many"
        )
    kept, power = ours[:k].square().sum().item(), wanted[:k].square().sum().item()
    if power == 0.0:
        return 1.0 if kept == 0.0 else math.inf
    return kept / power


def lipschitz(matrix: Tensor, full: int = FULL, seed: int = 0) -> float:
    """Lipschitz constant of x -> W x, which is the largest singular value.

    >>> round(lipschitz(torch.tensor([[0.0, 2.0], [1.0, 0.0]])), 6)
    2.0

    Of matrices larger than `full` by Lanczos iteration from a random start: never above the true one, and below it by
    less than one part in a thousand.

    Raises:
        RbeError: not a matrix, or not finite.
    """
    a = _tall(matrix, "lipschitz")
    if a.shape[1] <= full:
        values = torch.linalg.svdvals(_reduced(a))
        return values[0].item() if len(values) else 0.0
    b = a.double()
    return _largest(lambda x: b @ x, lambda y: b.T @ y, b.shape[1], seed)


def condition(matrix: Tensor, full: int = FULL, seed: int = 0) -> float:
    """Largest singular value divided by the smallest; infinity where the rank is not full.

    >>> round(condition(torch.diag(torch.tensor([4.0, 2.0, 0.5]))), 6)
    8.0
    >>> condition(torch.ones(3, 3))
    inf

    A singular value below the rounding of the largest (float32 or shorter numbers: 5e-7 of it) counts as 0. Of matrices
    larger than `full` by QR decomposition and two Lanczos iterations, right to two parts in a thousand.

    Raises:
        RbeError: not a matrix, or not finite.
    """
    a = _tall(matrix, "condition")
    if a.shape[1] == 0:
        raise RbeError(f"condition: the matrix of shape {tuple(matrix.shape)} is empty; give one with elements")
    if a.shape[1] <= full:
        return spectrum(a, full).condition
    noise = _noise(a)
    r = torch.linalg.qr(a.double(), mode="r").R
    most = _largest(lambda x: r @ x, lambda y: r.T @ y, r.shape[1], seed)
    if r.diagonal().abs().amin().item() <= noise * most:
        return math.inf

    def solve(b: Tensor, transposed: bool) -> Tensor:
        triangle = r.T if transposed else r
        found: Tensor = torch.linalg.solve_triangular(triangle, b.unsqueeze(-1), upper=not transposed)
        return found.squeeze(-1)

    inverse = _largest(lambda x: solve(x, True), lambda y: solve(y, False), r.shape[1], seed)
    return math.inf if noise * most * inverse >= 1.0 else most * inverse


def jacobian(derivatives: Tensor) -> Jacobian:
    """Rank and singular values of the map (r, theta) -> block.

    >>> jacobian(torch.tensor([[1.0, 2.0], [2.0, 4.0]])).rank
    1

    Args:
        derivatives: (cells, 2), the derivative of every cell in radius and in angle.

    Raises:
        RbeError: another shape, or not finite.
    """
    if derivatives.ndim != 2 or derivatives.shape[1] != 2 or len(derivatives) == 0:
        raise RbeError(f"jacobian: shape {tuple(derivatives.shape)}; give (cells, 2), the derivatives in r and theta")
    values = torch.linalg.svdvals(
        _reduced(_tall(derivatives, "jacobian") if len(derivatives) > 1 else derivatives.double())
    )
    most = values[0].item()
    rank = int((values > _noise(derivatives) * most).sum())
    return Jacobian(rank, most, values[1].item() if rank == 2 else 0.0)


def _noise(a: Tensor) -> float:
    """Share of the largest singular value that rounding can make out of 0: that of the numbers, or of the algorithm.

    Numbers shorter than float32 are taken as they are; their own rounding would leave nothing to be said of them.
    """
    numbers = min(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
    return max(4 * numbers, max(a.shape) * torch.finfo(torch.float64).eps)


def _tall(matrix: Tensor, what: str) -> Tensor:
    """The matrix or its transpose, at least as many rows as columns."""
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise RbeError(f"{what}: a {matrix.dtype} tensor of shape {tuple(matrix.shape)}; give a float matrix")
    if not bool(matrix.isfinite().all()):
        raise RbeError(f"{what}: the matrix holds infinities or NaN; singular values are of finite numbers")
    matrix = matrix.detach()
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _reduced(a: Tensor) -> Tensor:
    """A float64 matrix with the same singular values and at most 5 rows for every column, made in bands of rows."""
    columns = max(1, a.shape[1])
    if a.shape[0] <= 5 * columns:
        return a.double()
    triangle = a[:0].double()
    for band in torch.tensor_split(a, -(-a.shape[0] // (4 * columns))):
        triangle = torch.linalg.qr(torch.cat((triangle, band.double())), mode="r").R
    return triangle


def _both(
    what: str, approximation: Tensor | Spectrum, reference: Tensor | Spectrum, full: int, seed: int
) -> tuple[Tensor, Tensor]:
    shapes = [tuple((a.values if isinstance(a, Spectrum) else a).shape) for a in (approximation, reference)]
    if shapes[0] != shapes[1]:
        raise RbeError(f"{what}: shapes {shapes[0]} and {shapes[1]} differ; compare matrices of one shape")
    # The same probes for both, so that most of what they miss is missed in both.
    found = [a if isinstance(a, Spectrum) else spectrum(a, full, seed) for a in (approximation, reference)]
    return found[0].values, found[1].values


def _bidiagonal(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[list[float], list[float]]:
    """Golub-Kahan bidiagonalisation: diagonal and superdiagonal, one number longer than what it stands beside.

    Nothing is orthogonalised again: that only repeats values that were found already, which harms neither use.
    """
    right = start / start.norm()
    left = torch.zeros(0, dtype=start.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    largest = 0.0
    for k in range(min(steps, len(start))):
        u = forward(right)
        if beside:
            u = u - beside[-1] * left
        diagonal.append(u.norm().item())
        largest = max(largest, diagonal[-1])
        left = u / diagonal[-1] if diagonal[-1] > 0 else u
        v = backward(left) - diagonal[-1] * right
        beside.append(v.norm().item())
        # Nothing new: the start has been followed to its end.
        if beside[-1] <= 1e-13 * largest or k + 1 == steps:
            break
        right = v / beside[-1]
    return diagonal, beside


def _ritz(diagonal: list[float], beside: list[float], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(singular values, squared first components, residuals) of the first steps of a bidiagonalisation.

    The squares are the weights of a quadrature for the distribution of the values, as the start sees it.
    """
    steps = min(steps, len(diagonal))
    small = torch.diag(torch.tensor(diagonal[:steps], dtype=torch.float64))
    if steps > 1:
        small = small + torch.diag(torch.tensor(beside[: steps - 1], dtype=torch.float64), 1)
    p, values, q = torch.linalg.svd(small)
    return values, q[:, 0].square(), beside[steps - 1] * p[-1].abs()


def _largest(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], size: int, seed: int) -> float:
    """Largest singular value of a map between vectors of float64."""
    start = torch.randn(size, generator=torch.Generator().manual_seed(_APART + seed), dtype=torch.float64)
    found = 0.0
    for steps in (24, 48, 96, 192):
        values, _, residuals = _ritz(*_bidiagonal(forward, backward, start, steps), steps)
        found = values[0].item()
        # A singular value is as near as the residual; that it is the largest, and the error still less, is tested.
        if residuals[0].item() <= 1e-3 * found:
            break
    return found


def _estimate(a: Tensor, seed: int) -> tuple[Tensor, float]:
    """(singular values, error) of a float64 matrix with at least as many rows as columns."""
    columns = a.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_APART + seed)
        left, leading, right = torch.svd_lowrank(a, q=min(2 * _LEADING, columns), niter=_ITERATIONS)
    known = min(_LEADING, columns // 2)
    left, leading, right = left[:, :known], leading[:known], right[:, :known]

    def forward(x: Tensor) -> Tensor:
        return a @ x - left @ (leading * (right.T @ x))

    def backward(y: Tensor) -> Tensor:
        return a.T @ y - right @ (leading * (left.T @ y))

    draw = torch.Generator().manual_seed(_APART + seed + 1)
    probes = []
    for _ in range(_PROBES):
        start = torch.randn(columns, generator=draw, dtype=a.dtype)
        start = start - right @ (right.T @ start)
        probes.append(_bidiagonal(forward, backward, start, _STEPS))
    rest = max(0.0, a.square().sum().item() - leading.square().sum().item())
    fine, rough = ([_ritz(*p, steps)[:2] for p in probes] for steps in (_STEPS, _STEPS // 2))

    def joined(some: list[tuple[Tensor, Tensor]], steps: bool = False) -> Tensor:
        return torch.cat((leading, _quantiles(some, columns - known, rest, steps))).sort(descending=True).values

    # Halves of the probes that share one half of every other pair: 7 differences that know nothing of each other.
    halves = [
        joined([p for i, p in enumerate(fine) if (i & k).bit_count() % 2 == 0])
        - joined([p for i, p in enumerate(fine) if (i & k).bit_count() % 2])
        for k in range(1, _PROBES)
    ]
    whole = joined(fine)
    size = whole.norm().item()
    # A miscounted cluster is wrong by the root of the count, for which halves are no more than the root of 2 as wrong.
    wrong = 1.5 * torch.stack(halves).square().sum(1).mean().sqrt().item()
    wrong += (whole - joined(rough)).norm().item() + (whole - joined(fine, steps=True)).norm().item()
    # The energy of the rest is a difference, which is known to the root of the rounding.
    return whole, wrong / size + 1e-7 if size > 0 else 0.0


def _quantiles(probes: list[tuple[Tensor, Tensor]], count: int, power: float, steps: bool) -> Tensor:
    """`count` values with the distribution that the probes saw, scaled to the sum of squares they must have.

    Between what was seen there is a line, or, with `steps`, nothing: right for values in clusters, which a line smears.
    """
    values = torch.cat([v for v, _ in probes])
    shares = torch.cat([s for _, s in probes]) * (count / len(probes))
    order = values.argsort(descending=True)
    values, shares = values[order], shares[order]
    place = torch.arange(count, dtype=torch.float64) + 0.5
    ends = shares.cumsum(0)
    if steps:
        found = values[torch.searchsorted(ends, place).clamp_max(len(values) - 1)]
    else:
        found = torch.from_numpy(np.interp(place.numpy(), (ends - shares / 2).numpy(), values.numpy()))
    have = found.square().sum().item()
    return found * math.sqrt(power / have) if have > 0 else found
