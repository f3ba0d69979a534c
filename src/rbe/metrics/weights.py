"""What a compressed matrix is worth: its errors, and its rate beside the least that any code needs for them."""

import math

import torch
from torch import Tensor

from rbe.errors import RbeError

# Elements in float64 at once: 8 MiB, so that no float64 copy of a large matrix ever exists.
_BAND = 1 << 20


def _bands(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor in pieces along its first side, of about _BAND elements."""
    if tensor.ndim == 0 or tensor.numel() <= _BAND:
        return (tensor,)
    return tuple(torch.tensor_split(tensor, -(-tensor.numel() // _BAND)))


def _same_shapes(what: str, approximation: Tensor, reference: Tensor) -> None:
    if approximation.shape != reference.shape:
        raise RbeError(
            f"{what}: shapes {tuple(approximation.shape)} and {tuple(reference.shape)} differ; "
            "compare tensors of one shape"
        )


def _squared_error(approximation: Tensor, reference: Tensor) -> float:
    pairs = zip(_bands(approximation), _bands(reference), strict=True)
    return math.fsum((a.to(torch.float64) - b.to(torch.float64)).square().sum().item() for a, b in pairs)


def energy(tensor: Tensor) -> float:
    """Sum of squares, in float64: the square of the Frobenius norm.

    >>> energy(torch.tensor([[3.0, 4.0]]))
    25.0
    """
    return math.fsum(band.to(torch.float64).square().sum().item() for band in _bands(tensor))


def relative_squared_error(approximation: Tensor, reference: Tensor) -> float:
    """Squared error divided by the squared norm of the reference; the error measure of this library.

    >>> relative_squared_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.2

    A zero reference gives 0 where the approximation is zero too, and infinity elsewhere. Computed in float64.

    Raises:
        RbeError: the shapes differ.
    """
    _same_shapes("relative_squared_error", approximation, reference)
    power = energy(reference)
    error = _squared_error(approximation, reference)
    if power == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / power


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference divided by that of the reference: the root of `relative_squared_error`.

    >>> relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    0.8

    Raises:
        RbeError: the shapes differ.
    """
    return math.sqrt(relative_squared_error(approximation, reference))


def mean_squared_error(approximation: Tensor, reference: Tensor) -> float:
    """Mean of the squared differences, in float64.

    >>> mean_squared_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
    2.0

    Raises:
        RbeError: the shapes differ, or nothing is there to be averaged.
    """
    _same_shapes("mean_squared_error", approximation, reference)
    return _squared_error(approximation, reference) / _count("mean_squared_error", reference)


def mean_absolute_error(approximation: Tensor, reference: Tensor) -> float:
    """Mean of the absolute differences, in float64.

    >>> mean_absolute_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    1.5

    Raises:
        RbeError: the shapes differ, or nothing is there to be averaged.
    """
    _same_shapes("mean_absolute_error", approximation, reference)
    pairs = zip(_bands(approximation), _bands(reference), strict=True)
    total = math.fsum((a.to(torch.float64) - b.to(torch.float64)).abs().sum().item() for a, b in pairs)
    return total / _count("mean_absolute_error", reference)


def _count(what: str, tensor: Tensor) -> int:
    if tensor.numel() == 0:
        raise RbeError(
            f"{what}: the tensors of shape {tuple(tensor.shape)} have no elements; there is no mean of nothing"
        )
    return tensor.numel()


def captured_energy(approximation: Tensor, reference: Tensor) -> float:
    """Share of the reference's energy that the approximation explains: 1 - relative squared error.

    >>> round(captured_energy(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])), 6)
    0.36

    0 is what the zero matrix reaches; worse ones are negative.

    Raises:
        RbeError: the shapes differ.
    """
    return 1.0 - relative_squared_error(approximation, reference)


def sqnr(relative_error: float) -> float:
    """Signal to quantisation noise in decibels, of a relative squared error.

    >>> round(sqnr(0.01), 6)
    20.0
    >>> sqnr(0.0)
    inf
    """
    return math.inf if relative_error == 0.0 else -10.0 * math.log10(relative_error)


def shannon_floor(bits: float) -> float:
    """Least relative squared error any code of Gaussian weights can have at `bits` per weight: 2^(-2 bits).

    >>> shannon_floor(2)
    0.0625

    Give it the stored rate, everything counted. Weights that are not Gaussian can go below; rotated ones are Gaussian.

    Source: T. Berger, Rate Distortion Theory, 1971.
    """
    return math.exp2(-2.0 * bits)


def least_rate(error: float) -> float:
    """Fewest bits per weight with which a code of Gaussian weights can have this relative squared error.

    >>> least_rate(0.0625), least_rate(1.0)
    (2.0, 0.0)

    The inverse of `shannon_floor`; 0 for errors of 1 and more, which storing nothing reaches, infinity for no error.

    Raises:
        RbeError: the error is negative or NaN.
    """
    if not error >= 0.0:
        raise RbeError(f"least_rate: the relative squared error is {error}; it is 0 or more")
    if error == 0.0:
        return math.inf
    return max(0.0, -0.5 * math.log2(error))


def efficiency(error: float, bits: float) -> float:
    """eta: the rate that Gaussian weights need for this relative squared error, divided by the rate that is stored.

    >>> round(efficiency(0.0687, 2.0), 3), efficiency(0.0625, 2.0)
    (0.966, 1.0)

    1 is the bound. A ratio of sizes is the best possible one times eta. Weights that are not Gaussian can exceed 1.

    Args:
        error: squared, relative to the weights.
        bits: stored per weight, everything counted.

    Raises:
        RbeError: the error is negative or NaN, or the rate is not positive.
    """
    if not bits > 0.0:
        raise RbeError(f"efficiency: {bits} bits per weight are stored; give a positive rate")
    return least_rate(error) / bits


def bits_per_weight(nbytes: int, weights: int) -> float:
    """Stored rate in bits per weight.

    >>> bits_per_weight(64, 256)
    2.0
    """
    if weights < 1:
        raise RbeError(f"bits_per_weight: {weights} weights; a rate needs at least one")
    return 8.0 * nbytes / weights


def ratio(nbytes: int, weights: int, width: int = 4) -> float:
    """How many times smaller `nbytes` are than `weights` numbers of `width` bytes (4: float32, 2: float16).

    >>> ratio(64, 256), ratio(64, 256, width=2)
    (16.0, 8.0)
    """
    if nbytes < 1:
        raise RbeError(f"ratio: {nbytes} bytes; a ratio needs something stored")
    return weights * width / nbytes
