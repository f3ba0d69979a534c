"""The regularisers of Poincare-ball learning as numbers, to be shown or added to a loss by hand."""

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.optim.seeds import open_layers, points


def hyperbolic_penalty(model: nn.Module) -> Tensor:
    """The sum of artanh(r)^2 over all open points, one number with a gradient.

    >>> from rbe.nn import Linear
    >>> model = Linear(16, 16, format="packed128")
    >>> with torch.no_grad():
    ...     _ = model.radius.fill_(0.5)
    >>> round(hyperbolic_penalty(model).item(), 6)
    0.301737

    `HybridAdam(pull=...)` and `guard(weight_decay=...)` apply its gradient, times their lambda, without a graph.

    Raises:
        RbeError: the model has no open seeds.

    Source: Poincare-ball learning, section 4.4.3.
    """
    found = points(model)
    if not found:
        raise RbeError("hyperbolic_penalty: the model has no open seeds; call .unfreeze() on its seed layers")
    return torch.stack([torch.atanh(one.radius).square().sum() for one in found]).sum()


def state_entropy(code: Tensor) -> float:
    """Entropy, in nats, of the four basis functions among packed128 codes int64 (...): 0 to log 4.

    >>> quadrants = torch.arange(4) << 62
    >>> round(state_entropy(quadrants), 6), state_entropy(quadrants[:1])
    (1.386294, 0.0)

    Variety is rewarded: what is to be minimised is -lambda H. Printed is +lambda H, which fights it.

    Source: Poincare-ball learning, section 4.4.3.
    """
    counts = torch.bincount(packed128.fields(code)["quadrant"].flatten(), minlength=4)
    return _entropy(counts.double())


def _entropy(counts: Tensor) -> float:
    p = counts / counts.sum()
    return abs(float(torch.xlogy(p, p).sum()))


def total_entropy(model: nn.Module) -> float:
    """`state_entropy` summed over the open packed128 layers of a model: H in -lambda H.

    >>> from rbe.nn import Linear
    >>> model = nn.Sequential(Linear(64, 64, format="packed128"), Linear(64, 64, format="outer128"))
    >>> 0 <= total_entropy(model) < 1.3863
    True
    """
    return sum(state_entropy(m.read_code()) for m in open_layers(model) if m.spec.format == "packed128")


def entropy_changes(code: Tensor) -> Tensor:
    """Change of `state_entropy` by turning one quadrant to another: float64 (4, 4), from row to column."""
    counts = torch.bincount(packed128.fields(code)["quadrant"].flatten(), minlength=4).double()
    now, change = _entropy(counts), torch.zeros(4, 4, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            if a != b and counts[a] > 0:
                moved = counts.clone()
                moved[a] -= 1
                moved[b] += 1
                change[a, b] = _entropy(moved) - now
    return change
