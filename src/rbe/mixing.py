"""32-bit integer mixing, the same in torch and C++ (never a framework's random generator)."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def fmix32(x: Tensor) -> Tensor:
    """Mix the low 32 bits of each integer with MurmurHash3's 32-bit finaliser.

    >>> fmix32(torch.tensor([0, 1, 2])).tolist()
    [0, 1364076727, 821347078]

    Args:
        x: int64, any shape; only the low 32 bits are read.

    Returns:
        int64, same shape, values in [0, 2^32).

    Source: A. Appleby, MurmurHash3 (public domain), ``fmix32``.
    """
    x = x & _MASK
    # The products stay below 2^63 in the low 64 bits we keep: int64 wraps modulo 2^64, and the mask takes modulo 2^32.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def signs(n: int, seed: int) -> Tensor:
    """Return n pseudo-random signs, entry k being (-1)^(fmix32(k xor seed) & 1).

    >>> signs(4, seed=7)
    tensor([ 1.,  1., -1., -1.])

    Args:
        n: how many signs.
        seed: unsigned 32-bit integer.

    Returns:
        float32 (n,), entries +1 or -1.

    Source: docs/format.md, Rotation.
    """
    bits = fmix32(torch.arange(n, dtype=torch.int64) ^ seed) & 1
    return (1 - 2 * bits).to(torch.float32)
