"""Latent numbers: signs that gradients can train."""

import torch
from torch import Tensor

from rbe.kernels.latent import signs_of

__all__ = ["LATENT", "fresh_latents", "signs_of"]

# Size of fresh latents, a few steps of an optimizer.
LATENT = 0.03


def fresh_latents(signs: Tensor) -> Tensor:
    """Latent numbers of given signs (...): small, because only what crosses zero changes a sign.

    With latents as large as weights the signs stay where they started (sign lock-in).
    """
    return signs * (LATENT * torch.randn(signs.shape).abs())
