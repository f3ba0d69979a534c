"""How far the weights of a matrix move when its seeds move, and when the seeds and the weights are rounded."""

import math
from dataclasses import dataclass

import torch

from rbe import formats, metrics
from rbe.matrix import SeedMatrix

# Roundings of float32 between the fields of a seed and its weight: g(r), sine, modulation, their products and the
# scale; and in packed128 also R, alpha R, f with its norm, M and the amplitude.
_OPERATIONS = {"packed64": 10, "packed128": 16}
# Roundings of an angle, each of at most one turn, before its sine is taken.
_ANGLES = {"packed64": 1, "packed128": 4}
# Cells whose derivatives are held at a time.
_CELLS = 1 << 20


@dataclass(frozen=True)
class Stability:
    """Worst over the blocks of a matrix, in the units of its weights; of the rotated weights where it is rotated.

    Attributes:
        rank: of the Jacobian (r, theta) -> block of the seed whose block moves most; 1 everywhere in packed64.
        largest: largest singular value of that Jacobian.
        storage: most that a weight moves by the rounding of r and theta to their fields.
        seed: most that a block moves by it, as a Frobenius norm, to first order.
        weight: most that a weight differs from the exact one, stored and then computed in float32.
        operations: how many roundings the last counts.
    """

    rank: int
    largest: float
    storage: float
    seed: float
    weight: float
    operations: int


def stability(matrix: SeedMatrix) -> Stability | None:
    """The Jacobian and the rounding bounds of a matrix; None in formats other than packed64 and packed128.

    >>> seeds = torch.tensor([[(1 << 62) + (1 << 30)]])
    >>> found = stability(SeedMatrix.from_seeds(seeds, (16, 16), "packed64"))
    >>> found.rank, found.storage < found.weight < 1e-5
    (1, True)

    Source: 001 sections 8.6.1 and 8.6.2; readings in `rbe.metrics.rounding`.
    """
    spec = matrix.spec
    if spec.format not in _OPERATIONS:
        return None
    definition = formats.disk(spec.format)
    code, radius, angle = definition.split(matrix.seeds, spec)
    radius, angle = radius.double(), angle.double()
    height, width = spec.block_shape
    step = max(1, _CELLS // (height * width * spec.stages))
    most, slopes, size = (-1.0, torch.zeros(1, 2, dtype=torch.float64)), [0.0, 0.0], 0.0
    for k in range(0, spec.blocks, step):
        part = code[k : k + step], radius[k : k + step], angle[k : k + step]
        both = torch.stack([d.flatten(2) for d in definition.derivatives(*part, spec)], -1).flatten(0, 1)
        moves = torch.linalg.matrix_norm(both.mT @ both, 2)  # squares of the largest singular values
        worst = int(moves.argmax())
        if moves[worst].item() > most[0]:
            most = (moves[worst].item(), both[worst].clone())
        # Stages add up, cell by cell.
        slope = both.abs().reshape(-1, spec.stages, *both.shape[1:]).sum(1).amax((0, 1))
        slopes = [max(a, b) for a, b in zip(slopes, slope.tolist(), strict=True)]
        size = max(size, definition.values(*part, spec).abs().max().item())
    factor = abs(matrix.scale.item()) * (1.0 if matrix.row_scale is None else matrix.row_scale.abs().max().item())
    jacobian = metrics.jacobian(most[1])
    # packed128 has float32 numbers: r below 1, and an angle within so many turns.
    bits = spec.precision if spec.format == "packed64" else 24
    turns = 1.0 if spec.format == "packed64" else max(1.0, angle.abs().max().item() / math.tau)
    around = slopes[1] * turns
    operations = _OPERATIONS[spec.format] + spec.stages - 1
    sines = _ANGLES[spec.format] * around * math.tau * metrics.FLOAT32
    cell = math.ldexp(1.0, -bits)
    return Stability(
        rank=jacobian.rank,
        largest=jacobian.largest * factor,
        storage=metrics.storage_bound(slopes[0], around, bits) * factor,
        seed=metrics.seed_bound(jacobian.largest, cell, math.tau * turns * cell) * factor * spec.stages,
        weight=(metrics.weight_bound(slopes[0], around, bits, operations, size) + sines) * factor,
        operations=operations,
    )
