"""`LSTM` and `GRU`: every step multiplies by seeds, and no weight is stored."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.nn.linear import Linear
from rbe.nn.options import Options, for_matrices

States = tuple[Tensor, ...]
Product = Callable[[Tensor], Tensor]


class Cell(Protocol):
    """One step of some sequences."""

    def __call__(self, inputs: Tensor, state: States, recurrent: Product) -> States:
        """The next states, from W_ih x + b_ih of the step, the states and the product with W_hh."""


def _lstm(inputs: Tensor, state: States, recurrent: Product) -> States:
    h, c = state
    i, f, g, o = (inputs + recurrent(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(inputs: Tensor, state: States, recurrent: Product) -> States:
    (h,) = state
    r_in, z_in, n_in = inputs.chunk(3, -1)
    r_h, z_h, n_h = recurrent(h).chunk(3, -1)
    z = (z_in + z_h).sigmoid()
    n = (n_in + (r_in + r_h).sigmoid() * n_h).tanh()
    return ((1.0 - z) * n + z * h,)


class Recurrent(nn.Module):
    """What `LSTM` and `GRU` share: layers and directions, and torch's layout of inputs, states and gates.

    Layer k has the seed layers `ih_l<k>` (gates * hidden_size, inputs) and `hh_l<k>` (gates * hidden_size,
    hidden_size), and a bidirectional one also those with the suffix `_reverse`. The inputs of all steps are multiplied
    at once.
    """

    gates: ClassVar[int]
    states: ClassVar[int]
    cell: ClassVar[Cell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool | str = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._arrange(input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)
        options = for_matrices(options)
        for name, columns in self._parts():
            setattr(self, name, Linear(columns, self.gates * hidden_size, bias, **options))

    def _arrange(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise RbeError(f"{type(self).__name__}: {name} {value} is not positive")
        if not 0.0 <= dropout <= 1.0:
            raise RbeError(f"{type(self).__name__}: dropout {dropout} is no probability; give 0 to 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional

    def _parts(self) -> list[tuple[str, int]]:
        """(name, columns) of every seed layer, in torch's order."""
        parts = []
        for layer in range(self.num_layers):
            columns = self.hidden_size * len(self._suffixes) if layer else self.input_size
            for suffix in self._suffixes:
                parts += [(f"ih_l{layer}{suffix}", columns), (f"hh_l{layer}{suffix}", self.hidden_size)]
        return parts

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @classmethod
    def from_linears(
        cls,
        parts: Mapping[str, Linear],
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> Self:
        """A layer around matrices that exist already, or that a loader fills.

        Args:
            parts: a seed layer for each name `ih_l0`, `hh_l0`, `ih_l0_reverse`, ...

        Raises:
            RbeError: a part is missing, there is one too many, or its sides do not fit.
        """
        layer = cls.__new__(cls)
        if not {"ih_l0", "hh_l0"} <= set(parts):
            raise RbeError(f"{cls.__name__}: ih_l0 and hh_l0 are needed, but the parts are {sorted(parts)}")
        sizes = parts["ih_l0"].in_features, parts["hh_l0"].in_features
        layer._arrange(*sizes, num_layers, batch_first, dropout, bidirectional)
        wanted = dict(layer._parts())
        if set(wanted) != set(parts):
            raise RbeError(f"{cls.__name__}: the parts are {sorted(parts)}, but these settings take {sorted(wanted)}")
        for name, columns in wanted.items():
            shape = (cls.gates * layer.hidden_size, columns)
            if parts[name].spec.shape != shape:
                raise RbeError(f"{cls.__name__}: {name} is {parts[name].spec.shape}, but must be {shape}")
            setattr(layer, name, parts[name])
        return layer

    @classmethod
    def from_matrices(
        cls,
        matrices: Mapping[str, SeedMatrix],
        biases: Mapping[str, Tensor] | None = None,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> Self:
        """A layer around encoded matrices; the tensors are shared, not copied.

        Args:
            matrices: by torch's names, `weight_ih_l0`, `weight_hh_l0`, `weight_ih_l0_reverse`, ...
            biases: by torch's names, `bias_ih_l0`, `bias_hh_l0`, ...; all, or none.

        Raises:
            RbeError: a matrix is missing or does not fit.
        """
        wrong = sorted(name for name in matrices if not name.startswith("weight_"))
        if wrong:
            raise RbeError(
                f"{cls.__name__}: {wrong} is no name of a matrix; they begin with weight_ih_l or weight_hh_l"
            )
        parts = {}
        for name, matrix in matrices.items():
            part = name.removeprefix("weight_")
            parts[part] = Linear.from_matrix(matrix, (biases or {}).get(f"bias_{part}"))
        return cls.from_linears(parts, num_layers, batch_first, dropout, bidirectional)

    def _part(self, name: str) -> Linear:
        part = self._modules[name]
        assert isinstance(part, Linear)
        return part

    def _run(self, x: Tensor, sizes: Sequence[int], start: States, suffix: str) -> tuple[Tensor, States]:
        """One direction of one layer.

        Args:
            x: all steps one after the other, (sum(sizes), inputs); sizes: sequences alive at each step, never growing.
            start: states (sequences, hidden_size).

        Returns:
            outputs (sum(sizes), hidden_size) and the last states.
        """
        recurrent, cell = self._part(f"hh{suffix}").held(), type(self).cell
        backwards = suffix.endswith("_reverse")
        steps = list(self._part(f"ih{suffix}")(x).split(list(sizes)))
        state = tuple(s[: sizes[-1]] for s in start) if backwards else start
        outputs: list[Tensor] = []
        ended: list[States] = []
        for inputs in reversed(steps) if backwards else steps:
            alive, before = inputs.shape[0], state[0].shape[0]
            if alive > before:  # backwards, longer sequences begin later
                state = tuple(torch.cat((s, s0[before:alive])) for s, s0 in zip(state, start, strict=True))
            elif alive < before:
                ended.append(tuple(s[alive:] for s in state))
                state = tuple(s[:alive] for s in state)
            state = cell(inputs, state, recurrent)
            outputs.append(state[0])
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        return torch.cat(outputs[::-1] if backwards else outputs), state

    def _layers(self, x: Tensor, sizes: Sequence[int], start: States) -> tuple[Tensor, States]:
        """All layers; states are (layers * directions, sequences, hidden_size)."""
        ends: list[States] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes:
                at = len(ends)
                y, end = self._run(x, sizes, tuple(s[at] for s in start), f"_l{layer}{suffix}")
                outputs.append(y)
                ends.append(end)
            x = torch.cat(outputs, -1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout)
        return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _forward(self, x: Tensor | PackedSequence, start: States | None) -> tuple[Tensor | PackedSequence, States]:
        """Bring inputs and states into one form, and the results back."""
        if isinstance(x, PackedSequence):
            self._check(x.data, 2)
            sizes = x.batch_sizes.tolist()
            start = self._states(start, x.data, sizes[0], batched=True)
            if x.sorted_indices is not None:
                start = tuple(s.index_select(1, x.sorted_indices) for s in start)
            y, end = self._layers(x.data, sizes, start)
            if x.unsorted_indices is not None:
                end = tuple(s.index_select(1, x.unsorted_indices) for s in end)
            return PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices), end
        self._check(x, 2, 3)
        batched = x.ndim == 3
        steps = x[:, None] if not batched else x.transpose(0, 1) if self.batch_first else x
        length, batch = steps.shape[:2]
        if length == 0:
            raise RbeError(f"{type(self).__name__}: x {tuple(x.shape)} has no step; give at least one")
        start = self._states(start, x, batch, batched)
        y, end = self._layers(steps.flatten(0, 1), [batch] * length, start)
        y = y.reshape(length, batch, y.shape[-1])
        if not batched:
            return y[:, 0], tuple(s[:, 0] for s in end)
        return (y.transpose(0, 1) if self.batch_first else y), end

    def _check(self, x: Tensor, *sides: int) -> None:
        if x.ndim not in sides or x.shape[-1] != self.input_size:
            raise RbeError(
                f"{type(self).__name__}: x is {tuple(x.shape)}; it must have {self.input_size} features, and be "
                "(sequence, features), or 3-D with a batch"
            )

    def _states(self, start: States | None, x: Tensor, batch: int, batched: bool) -> States:
        shape = (self.num_layers * len(self._suffixes), batch, self.hidden_size)
        if start is None:
            return (x.new_zeros(shape),) * self.states
        wanted = shape if batched else (shape[0], shape[2])
        if not isinstance(start, tuple | list) or len(start) != self.states or not all(map(torch.is_tensor, start)):
            form = "(h, c), two tensors" if self.states == 2 else "one tensor"
            raise RbeError(
                f"{type(self).__name__}: the state is not {form} {wanted}; give it as the last call returned it"
            )
        for state in start:
            if tuple(state.shape) != wanted:
                raise RbeError(f"{type(self).__name__}: a state is {tuple(state.shape)}; it must be {wanted}")
        return start if batched else tuple(state[:, None] for state in start)

    def flatten_parameters(self) -> None:
        """Nothing: models written for torch's layer call it, but seeds have no order to bring into."""

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}"
        )


class LSTM(Recurrent):
    """Long short-term memory; constructor, inputs, states and the order of gates (i, f, g, o) like torch's.

    >>> y, (h, c) = LSTM(8, 16, num_layers=2, format="packed128")(torch.randn(5, 3, 8))
    >>> y.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional: as torch's.
        bias: True for dense biases, "seed" for one seed a matrix, False for none.
        options: as in `Linear`.

    Raises:
        RbeError: a size is not positive; on the forward pass, x or a state has other sides.
    """

    gates, states, cell = 4, 2, staticmethod(_lstm)

    def forward(
        self, x: Tensor | PackedSequence, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """x (sequence, batch, input_size), batch first if the layer is so, unbatched, or packed.

        Returns:
            outputs in x's form; (h, c), each (layers * directions, batch, hidden_size).
        """
        return self._forward(x, state)


class GRU(Recurrent):
    """Gated recurrent unit; constructor, inputs, state and the order of gates (r, z, n) like torch's.

    >>> y, h = GRU(8, 16, bidirectional=True, batch_first=True, format="packed128")(torch.randn(3, 5, 8))
    >>> y.shape, h.shape
    (torch.Size([3, 5, 32]), torch.Size([2, 3, 16]))

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional: as torch's.
        bias: True for dense biases, "seed" for one seed a matrix, False for none.
        options: as in `Linear`.

    Raises:
        RbeError: a size is not positive; on the forward pass, x or the state has other sides.
    """

    gates, states, cell = 3, 1, staticmethod(_gru)

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """x (sequence, batch, input_size), batch first if the layer is so, unbatched, or packed.

        Returns:
            outputs in x's form; h (layers * directions, batch, hidden_size).
        """
        y, (end,) = self._forward(x, None if state is None else (state,))
        return y, end
