"""Seeds in place of the matrices of a network: which there are, and what a configuration makes of each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import rbe.nn as seeded
from rbe.errors import RbeError
from rbe.train.config import Seeds


@dataclass(frozen=True)
class Matrix:
    """A matrix of a network.

    Attributes:
        name: of its layer; the matrices of a recurrent layer have names of their own below it.
        module: that holds it; parameter: its name there.
    """

    name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        """The tensor, (rows, columns) or a kernel."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor


def matrices(network: nn.Module) -> Iterator[Matrix]:
    """Every matrix of torch's layers, in order.

    >>> [m.name for m in matrices(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2)))]
    ['0', '1.ih_l0', '1.hh_l0']
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            yield Matrix(name, module, "weight")
        elif isinstance(module, nn.LSTM):
            for parameter, _ in module.named_parameters():
                if parameter.startswith("weight_"):
                    yield Matrix(f"{name}.{parameter.removeprefix('weight_')}", module, parameter)


def plant(network: nn.Module, seeds: Seeds) -> nn.Module:
    """Put fresh open seeds, drawn from torch's global generator, in place of matrices.

    >>> layer = plant(nn.Sequential(nn.Linear(32, 16)), Seeds(block=8))[0]
    >>> type(layer).__name__, layer.spec.block
    ('Linear', 8)

    Returns:
        the network.

    Raises:
        RbeError: a pattern fits no matrix, a format does not offer the block, or only some matrices of a recurrent
            layer would be seeds.
    """
    found = list(matrices(network))
    _check_patterns([m.name for m in found], seeds)
    made = {m.name: seeds.of(m.name, number) for number, m in enumerate(found)}
    numbers = {m.name: number for number, m in enumerate(found)}
    before = (1, 1)  # outputs of the stream before, and how many of them are open
    for name, module in list(network.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.LSTM):
            new = _lstm(name, module, made)
        elif name in made and made[name].format == "stream":
            new, before = _stream(module, made[name], numbers[name], before)
            new.slim = numbers[name] < len(found) - 1
        elif name in made and made[name].format != "dense":
            new = _layer(module, made[name])
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new)
    return network


def _check_patterns(names: list[str], seeds: Seeds) -> None:
    for layer in seeds.layer:
        one = Seeds(layer=(layer,), format="?", block=-1, stages=-1)
        if all(one.of(name, 0) == one for name in names) and (layer.format or layer.block or layer.stages):
            raise RbeError(f"train: [[seeds.layer]] pattern {layer.pattern!r} fits none of {', '.join(names)}")


def _options(made: Seeds) -> dict[str, Any]:
    return {"format": made.format, "block": made.block, "mode": made.mode, "stages": made.stages}


def _layer(module: nn.Module, made: Seeds) -> nn.Module:
    options = _options(made)
    if isinstance(module, nn.Embedding):
        return seeded.Embedding(module.num_embeddings, module.embedding_dim, **options)
    bias = made.bias if module.bias is not None else False
    if isinstance(module, nn.Linear):
        return seeded.Linear(module.in_features, module.out_features, bias, **options)
    assert isinstance(module, nn.Conv2d)
    return seeded.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        bias,
        **options,
    )


def _stream(
    module: nn.Module, made: Seeds, number: int, before: tuple[int, int]
) -> tuple[seeded.Stream, tuple[int, int]]:
    """A layer of a stream, whose open columns are what the open rows of the one before reach."""
    assert isinstance(module, nn.Linear | nn.Conv2d)
    rows, columns = module.weight.shape[0], module.weight[0].numel()
    corner = made.rows[number] if made.rows else rows, columns * before[1] // before[0]
    # The cells that one output of the layer before became; pixels of a row of a picture, in the first, if it is square.
    side = math.isqrt(columns)
    cells = columns // before[0] if number else side if side * side == columns else 1
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        linear = seeded.StreamLinear(columns, rows, bias, cells=cells, spread=made.spread, open_shape=corner)
        return linear, (rows, corner[0])
    convolution = seeded.StreamConv2d(
        module.in_channels,
        rows,
        (module.kernel_size[0], module.kernel_size[1]),
        (module.stride[0], module.stride[1]),
        module.padding,  # type: ignore[arg-type]
        module.bias is not None,
        spread=made.spread,
        open_shape=corner,
    )
    return convolution, (rows, corner[0])


def _lstm(name: str, module: nn.LSTM, made: dict[str, Seeds]) -> nn.Module | None:
    own = {part: of for part, of in made.items() if part.startswith(f"{name}.")}
    dense = [part for part, of in own.items() if of.format == "dense"]
    if len(dense) == len(own):
        return None
    if dense:
        raise RbeError(f"train: {', '.join(dense)} cannot be dense while other matrices of {name} are seeds")
    parts = {}
    for part, of in own.items():
        short = part.removeprefix(f"{name}.")
        weight = getattr(module, f"weight_{short}")
        parts[short] = seeded.Linear(weight.shape[1], weight.shape[0], of.bias, **_options(of))
    return seeded.LSTM.from_linears(parts, module.num_layers, module.batch_first, module.dropout, module.bidirectional)
