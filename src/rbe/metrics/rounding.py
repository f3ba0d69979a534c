"""How much rounding can move a weight: by storing its seed in few bits, and by computing it in few digits."""

import math

import torch
from torch import Tensor

from rbe.errors import RbeError

# Unit roundoff, the largest relative error of one operation: half the distance from 1 to the next number.
FLOAT32 = 2.0**-24
FLOAT64 = 2.0**-53


def storage_bound(radius_slope: float, angle_slope: float, fraction_bits: int) -> float:
    """Most that a weight can move when r and theta are cut to fixed point with this many fraction bits.

    >>> storage_bound(2.2, 1.1, 32) < 2.2e-9  # packed64: |dW/dr| <= 2.2, |dW/dtheta| <= 1.1
    True

    Cutting (rounding down) moves r by less than 2^-b and theta, kept as a part of a turn, by less than 2 pi 2^-b.

    Args:
        radius_slope, angle_slope: largest |dW/dr| and |dW/dtheta| between the exact and the stored point.
        fraction_bits: 32 or 64 in `packed64`.

    Raises:
        RbeError: a slope is negative or not finite, or there are no bits.
    """
    if not (0 <= radius_slope < math.inf and 0 <= angle_slope < math.inf and fraction_bits >= 1):
        raise RbeError(
            f"storage_bound: slopes {radius_slope} and {angle_slope}, {fraction_bits} bits; "
            "slopes are 0 or more and finite, bits at least 1"
        )
    return (radius_slope + 2.0 * math.pi * angle_slope) * math.ldexp(1.0, -fraction_bits)


def seed_bound(largest: float, d_radius: float, d_angle: float) -> float:
    """Most that a whole block can move, as a Frobenius norm and to first order, for such a change of its seed.

    >>> seed_bound(2.0, 3.0, 4.0)
    10.0

    This takes the place of the printed bound, which multiplies by the condition number of the Jacobian: that is
    infinite for `packed64`, whose Jacobian has rank 1, while the largest singular value always serves.

    Args:
        largest: largest singular value of the Jacobian, `rbe.metrics.jacobian(...).largest`.
        d_radius, d_angle: changes of r and theta.
    """
    return largest * math.hypot(d_radius, d_angle)


def accumulated(operations: int, unit: float = FLOAT32, growth: float = 0.0) -> float:
    """Relative error after n roundings, as printed: n eps (1 + delta)^n.

    >>> accumulated(10) == 10 * 2.0**-24
    True

    With delta = eps, one amplification of what is already wrong per operation, it bounds (1 + eps)^n - 1, the most that
    n roundings of a product can do.

    Args:
        operations: n.
        unit: eps of one operation: `FLOAT32`, `FLOAT64`, or 2^-64 where numbers are Q0.64.
        growth: delta.

    Raises:
        RbeError: a negative number of operations, or a unit not in (0, 1).
    """
    if operations < 0 or not 0 < unit < 1:
        raise RbeError(f"accumulated: {operations} operations of unit {unit}; give 0 or more, unit in (0, 1)")
    return operations * unit * (1.0 + growth) ** operations


def weight_bound(
    radius_slope: float, angle_slope: float, fraction_bits: int, operations: int, size: float, unit: float = FLOAT32
) -> float:
    """Most that a stored and computed weight can differ from the exact one: the term of storage and that of arithmetic.

    >>> storage = storage_bound(2.2, 1.1, 64)
    >>> arithmetic = weight_bound(2.2, 1.1, 64, operations=8, size=1.1) - storage
    >>> arithmetic / storage > 1e11  # 64 fraction bits are of no use to float32
    True

    Args:
        radius_slope, angle_slope, fraction_bits: as in `storage_bound`.
        operations: roundings between the stored fields and the weight.
        size: largest magnitude of the weight and of what it is computed from.
        unit: of one operation.
    """
    return storage_bound(radius_slope, angle_slope, fraction_bits) + size * accumulated(operations, unit, unit)


def dot_bound(x: Tensor, w: Tensor, unit: float = FLOAT32) -> Tensor:
    """Most that a product of vectors computed in any order can differ from the exact one: (..., n), (..., n) -> (...).

    >>> dot_bound(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])).item() == 2 * 2.0**-24 / (1 - 2 * 2.0**-24) * 11
    True

    n u / (1 - n u) times the sum of |x_j w_j|.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, 2002.

    Raises:
        RbeError: so many terms that the bound says nothing.
    """
    n = x.shape[-1]
    if n * unit >= 1:
        raise RbeError(f"dot_bound: {n} terms of unit {unit}; the bound holds for fewer than {1 / unit:.3g} terms")
    return n * unit / (1 - n * unit) * (x.to(torch.float64) * w.to(torch.float64)).abs().sum(-1)
