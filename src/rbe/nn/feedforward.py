"""`FeedForward`: two seed layers around an activation that is chosen by name."""

from collections.abc import Callable
from functools import partial
from typing import Unpack

from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.nn.linear import Linear
from rbe.nn.options import Options, for_matrices

# hardswish is x (x + 3) / 6 between -3 and 3; 002 prints (x + 3) / 6, which jumps from 1 to 3 at x = 3.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "sigmoid": functional.sigmoid,
    "silu": functional.silu,
}


def named_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a name.

    >>> import torch
    >>> named_activation("relu6")(torch.tensor([-1.0, 3.0, 9.0])).tolist()
    [0.0, 3.0, 6.0]

    Raises:
        RbeError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise RbeError(f"activation {name!r} is not offered; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class FeedForward(nn.Module):
    """y = W2 f(W1 x + b1) + b2, with W1 and W2 held as seeds.

    >>> import torch
    >>> layer = FeedForward(16, 64, "gelu", bias="seed", format="packed64", block=None)
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])

    Args:
        d_model: features of x and y.
        dim_feedforward: features between the two layers.
        activation: name of f, a key of `ACTIVATIONS`.
        dropout: probability with which f's values are dropped in training.
        bias: True for dense biases, "seed" for one seed each, False for none.
        options: as in `Linear`.

    Raises:
        RbeError: there is no such activation, or the format does not offer the options.

    Source: 000 section 5.5, 002 list of activations.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool | str = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        named_activation(activation)
        options = for_matrices(options)
        self.activation = activation
        self.linear1 = Linear(d_model, dim_feedforward, bias, **options)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) to the same shape and dtype."""
        y: Tensor = self.linear2(self.dropout(named_activation(self.activation)(self.linear1(x))))
        return y

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"
