"""The rotation R_n that makes weights Gaussian: random signs, then Walsh-Hadamard transforms (docs/format.md)."""

import math

import torch
from torch import Tensor

from rbe.mixing import signs


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal fast Walsh-Hadamard transform of the last side, whose length is a power of two.

    >>> hadamard(torch.tensor([1.0, 0.0]))
    tensor([0.7071, 0.7071])
    """
    n = x.shape[-1]
    lead = x.shape[:-1]
    h = 1
    while h < n:
        pairs = x.reshape(*lead, n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).reshape(*lead, n)
        h *= 2
    return x * math.sqrt(1.0 / n)


def _spans(n: int) -> list[slice]:
    """The one or two spans, of the largest power of two that fits, that the transforms cover."""
    p = 1 << (n.bit_length() - 1)
    return [slice(0, p)] if p == n else [slice(0, p), slice(n - p, n)]


def rotate(x: Tensor, seed: int) -> Tensor:
    """Apply R_n to the last side: y = R_n x for every vector x (..., n); seed 0 is the identity.

    >>> x = torch.randn(3, 24)
    >>> torch.allclose(rotate_back(rotate(x, 5), 5), x, atol=1e-5)
    True
    """
    if seed == 0:
        return x
    x = x * signs(x.shape[-1], seed).to(x)
    for span in _spans(x.shape[-1]):
        x = x.clone()
        x[..., span] = hadamard(x[..., span])
    return x


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """Apply the inverse (transpose) of R_n to the last side; seed 0 is the identity."""
    if seed == 0:
        return x
    for span in reversed(_spans(x.shape[-1])):
        x = x.clone()
        x[..., span] = hadamard(x[..., span])
    return x * signs(x.shape[-1], seed).to(x)
