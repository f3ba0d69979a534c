"""What outputs and models are worth: cosines, divergences, perplexity, rank correlation."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from rbe.errors import RbeError


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between vectors along the last side: (..., n), (..., n) -> (...), float64.

    >>> cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]])).tolist()
    [1.0, 0.0]

    Two zero vectors have cosine 1 and one zero vector has 0: a lost output must not look like a kept one.
    """
    x, y = a.double(), b.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    both_zero = (x.norm(dim=-1) == 0) & (y.norm(dim=-1) == 0)
    value = (x * y).sum(-1) / norms.where(norms > 0, torch.ones_like(norms))
    return torch.where(both_zero, 1.0, value).clamp(-1.0, 1.0)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of the distributions that two sets of logits give: (..., classes) -> (...), in nats.

    >>> kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
    0.0
    >>> round(kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])).item(), 4)
    0.1308

    The expected extra code length, per position, of using the model in place of the reference.
    """
    # float32 suffices for the log-softmax; the sum over classes of a large vocabulary is what would lose digits.
    p = functional.log_softmax(reference.float(), -1)
    q = functional.log_softmax(logits.float(), -1)
    return (p.double().exp() * (p.double() - q.double())).sum(-1).clamp_min(0.0)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log probability, in nats, that logits (..., classes) give to targets (...); -> (...), float64.

    >>> round(negative_log_likelihood(torch.zeros(1, 8), torch.tensor([3])).item(), 4) == round(math.log(8), 4)
    True
    """
    chosen = functional.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -chosen.double()


def perplexity(logits: Tensor, targets: Tensor) -> float:
    """exp of the mean negative log likelihood, per token.

    >>> round(perplexity(torch.zeros(3, 8), torch.tensor([1, 2, 3])), 4)
    8.0
    """
    return math.exp(negative_log_likelihood(logits, targets).mean().item())


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing their mean rank: (n,) -> (n,), float64.

    >>> ranks(torch.tensor([10.0, 30.0, 20.0, 30.0])).tolist()
    [1.0, 3.5, 2.0, 3.5]
    """
    _, group, counts = torch.unique(values.double(), sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    mean: Tensor = (last - (counts - 1) / 2.0).double()[group]
    return mean


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two lists of numbers, ties sharing their mean rank.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 4.0, 9.0, 16.0]))
    1.0

    Not a number (nan) where one list is constant.

    Raises:
        RbeError: the lists are not two of one length, with two numbers at least.
    """
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise RbeError(
            f"spearman: shapes {tuple(a.shape)} and {tuple(b.shape)}; give two equally long lists, two numbers at least"
        )
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = (x.square().sum() * y.square().sum()).sqrt()
    return round(((x * y).sum() / norm).item(), 12) if norm > 0 else math.nan
