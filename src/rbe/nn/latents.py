"""Latent numbers: signs that gradients can train."""

import torch
from torch import Tensor

# Size of fresh latents, a few steps of an optimizer.
LATENT = 0.03


def fresh_latents(signs: Tensor) -> Tensor:
    """Latent numbers of given signs (...): small, because only what crosses zero changes a sign.

    With latents as large as weights the signs stay where they started (sign lock-in).
    """
    return signs * (LATENT * torch.randn(signs.shape).abs())


def signs_of(latent: Tensor) -> Tensor:
    """+1 where a latent number is >= 0, else -1; its gradient is passed straight through.

    >>> latent = torch.tensor([0.5, -2.0], requires_grad=True)
    >>> signs_of(latent).tolist(), torch.autograd.grad(signs_of(latent).sum(), latent)[0].tolist()
    ([1.0, -1.0], [1.0, 1.0])

    Source: G. Hinton's straight-through estimator, in Y. Bengio et al., arXiv 1308.3432.
    """
    hard = torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
    return latent + (hard - latent).detach()
