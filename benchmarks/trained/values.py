"""Trained numbers of few bits each: what every peer stores in place of a matrix."""

import math

import torch
from torch import Tensor, nn


def half(x: Tensor) -> Tensor:
    """x as float16 holds it; its gradient passes."""
    return x + (x.detach().half().float() - x.detach())


def first_step(start: Tensor, bits: int) -> Tensor:
    """The logarithm of a step for these numbers."""
    return (2 * start.abs().mean() / 2 ** ((bits - 1) / 2)).log()


def on_grid(latent: Tensor, log_step: Tensor, bits: int) -> Tensor:
    """Numbers of few bits, see `Values`, with gradients straight through."""
    step, most = half(log_step.exp()), 2 ** (bits - 1)
    # Beyond the grid a latent has no gradient; within it that of its number.
    place = (latent / step).clamp(-most, most)
    code = place.detach().floor().clamp(-most, most - 1) + 0.5
    return (place + (code - place.detach())) * step


class Values(nn.Module):
    """n trained numbers on the grid step * (k + 1/2), -2^(bits-1) <= k < 2^(bits-1); 16 bits are float16.

    The grid has no zero, so that one bit is a sign. Its step is learned beside the numbers (Esser et al., 2020), as a
    factor of e, for Adam's steps are absolute.

    Args:
        start: (n,) first numbers.
        bits: 1 to 8, or 16.
    """

    def __init__(self, start: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.latent = nn.Parameter(start)
        self.step: nn.Parameter | None = None
        if bits < 16:
            self.step = nn.Parameter(first_step(start, bits))

    @property
    def nbytes(self) -> int:
        """Of the codes, and of the step."""
        return math.ceil(self.latent.numel() * self.bits / 8) + (0 if self.step is None else 2)

    def forward(self) -> Tensor:
        """The numbers as they are stored."""
        if self.step is None:
            return half(self.latent)
        return on_grid(self.latent, self.step, self.bits)


def fitting(nbytes: int, bits: int) -> int:
    """How many numbers of this width fit, their step included; at least one."""
    return max(1, (nbytes - (0 if bits == 16 else 2)) * 8 // bits)


def drawn(n: int, size: float = 0.1) -> Tensor:
    """Gaussian first numbers of one size, which suits one learning rate."""
    return torch.randn(n) * size
