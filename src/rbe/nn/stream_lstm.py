"""`StreamLSTM`: every matrix of a recurrent layer is one stream of bits, read once for all steps."""

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn.stream import StreamLinear

GATES = 4


class StreamLSTM(nn.Module):
    """Long short-term memory with a stream for every matrix; inputs, states and the order of gates like torch's.

    >>> y, (h, c) = StreamLSTM(8, 16, num_layers=2)(torch.randn(5, 3, 8))
    >>> y.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))

    Layer k has the streams `ih_l<k>` (4 * hidden_size, inputs), which also holds the one bias of the layer, and
    `hh_l<k>` (4 * hidden_size, hidden_size); a bidirectional one also those with the suffix `_reverse`. Frozen streams
    are multiplied step by step without a dense matrix. Elsewhere, as in training, the matrices are made once a call and
    forgotten afterwards, and torch's own kernel does the steps.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as torch's.
        spread: as for `StreamLinear`.

    Raises:
        RbeError: a size is not positive; on the forward pass, x or a state has other sides, or x is packed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        spread: float = 2.0,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise RbeError(f"StreamLSTM: {name} {value} is not positive")
        if not 0.0 <= dropout <= 1.0:
            raise RbeError(f"StreamLSTM: dropout {dropout} is no probability; give 0 to 1")
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        suffixes = ("", "_reverse") if bidirectional else ("",)
        self.parts = [f"_l{k}{suffix}" for k in range(num_layers) for suffix in suffixes]
        for part in self.parts:
            columns = input_size if part.startswith("_l0") else hidden_size * len(suffixes)
            setattr(self, f"ih{part}", StreamLinear(columns, GATES * hidden_size, bias, spread=spread))
            setattr(self, f"hh{part}", StreamLinear(hidden_size, GATES * hidden_size, False, spread=spread))

    def _tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """The matrices and biases in torch's order, made now; its second bias of a layer is 0."""
        tensors = []
        for part in self.parts:
            ih, hh = self.get_submodule(f"ih{part}"), self.get_submodule(f"hh{part}")
            assert isinstance(ih, StreamLinear)
            assert isinstance(hh, StreamLinear)
            weight, bias = ih.matrix(dtype)
            tensors += [weight, hh.matrix(dtype)[0]]
            tensors += [] if bias is None else [bias, torch.zeros_like(bias)]
        return tensors

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (sequence, batch, input_size), batch first if the layer is so.

        Returns:
            outputs in x's form; (h, c), each (layers * directions, batch, hidden_size).
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.input_size:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RbeError(f"StreamLSTM: x is {given}; it must be 3-D with {self.input_size} features, not packed")
        shape = (len(self.parts), x.shape[0 if self.batch_first else 1], self.hidden_size)
        start = (x.new_zeros(shape),) * 2 if state is None else state
        for one in start:
            if tuple(one.shape) != shape:
                raise RbeError(f"StreamLSTM: a state is {tuple(one.shape)}; it must be {shape}")
        if self._sparse(x, *start):
            return self._walk(x, *start)
        y, h, c = torch.lstm(
            x,
            start,
            self._tensors(x.dtype),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return y, (h, c)

    def _sparse(self, x: Tensor, h: Tensor, c: Tensor) -> bool:
        """Whether every product touches only what is there, and nothing is dropped."""
        if {x.dtype, h.dtype, c.dtype} != {torch.float32} or not x.numel() or (self.training and self.dropout):
            return False
        if torch.is_grad_enabled() and (h.requires_grad or c.requires_grad):
            return False
        layers = [layer for layer in self.children() if isinstance(layer, StreamLinear)]
        return all(layer.multiplies(x) for layer in layers)

    def _walk(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The steps of every layer, as torch defines them."""
        y, last = x.transpose(0, 1) if self.batch_first else x, []
        directions = 2 if self.bidirectional else 1
        for first in range(0, len(self.parts), directions):
            sides = []
            for number in range(first, first + directions):
                part = self.parts[number]
                gates, times = self.get_submodule(f"ih{part}")(y), range(len(y))
                state, cell, made = h[number], c[number], x.new_empty(*y.shape[:2], self.hidden_size)
                for t in reversed(times) if number > first else times:
                    i, f, g, o = (gates[t] + self.get_submodule(f"hh{part}")(state)).chunk(GATES, -1)
                    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                    state = made[t] = o.sigmoid() * cell.tanh()
                sides.append(made)
                last.append((state, cell))
            y = torch.cat(sides, -1)
        h, c = (torch.stack(parts) for parts in zip(*last, strict=True))
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, bidirectional={self.bidirectional}"
        )
