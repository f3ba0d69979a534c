"""What a finished network stores beside its matrices: one float16 factor and one float16 term a unit."""

import torch
from torch import Tensor, nn

from rbe.nn import Seeded, Stream


class Shift(nn.Module):
    """The bias of the last layer."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.term = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, units), moved."""
        return x + self.term.float()


class Affine(nn.Module):
    """A batch norm that is no longer trained."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        assert norm.running_var is not None and norm.running_mean is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.factor = nn.Parameter(factor.detach().half(), requires_grad=False)
        self.term = nn.Parameter((norm.bias - norm.running_mean * factor).detach().half(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, units), scaled and moved."""
        return x * self.factor.float() + self.term.float()


def store(model: nn.Sequential) -> nn.Sequential:
    """Bring norms and biases to the form in which they are stored; in place."""
    for k, layer in enumerate(model):
        if isinstance(layer, nn.BatchNorm1d):
            model[k] = Affine(layer)
        elif isinstance(layer, Shift):
            layer.term = nn.Parameter(layer.term.detach().half(), requires_grad=False)
    return model.eval()


def rest_bytes(widths: tuple[int, ...]) -> int:
    """Bytes beside the matrices: factor and term a hidden unit, a term a class."""
    return 4 * sum(widths[1:-1]) + 2 * widths[-1]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the matrices: codes, seeds, scales, tables."""
    total = 0
    for module in model.modules():
        if isinstance(module, Seeded):
            total += module.matrix.nbytes
        elif isinstance(module, nn.Linear):
            total += 4 * module.weight.numel()
        elif isinstance(module, Stream):
            total += module.stored()[1] + 4  # a float32 scale
        elif callable(stored := getattr(module, "stored", None)):
            total += stored()[1]
    return total


def whole_bytes(model: nn.Sequential) -> int:
    """Bytes of everything in a stored network."""
    rest = [t for m in model if isinstance(m, Affine | Shift) for t in m.parameters()]
    return weight_bytes(model) + sum(t.numel() * t.element_size() for t in rest)
