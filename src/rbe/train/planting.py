"""Seeds in place of the matrices of a network: which there are, and what a configuration makes of each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import rbe.nn as seeded
from rbe.errors import RbeError
from rbe.nn import Seeded, SeededVector, Stream
from rbe.train.config import Seeds

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


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

    @property
    def bias(self) -> Tensor | None:
        """What is added to its products, if anything; of the two biases of a recurrent layer the sum, at its inputs."""
        if not isinstance(self.module, nn.LSTM):
            bias: Tensor | None = getattr(self.module, "bias", None)
            return bias
        side, _, part = self.parameter.removeprefix("weight_").partition("_")
        if side == "hh" or not self.module.bias:
            return None
        first, second = (getattr(self.module, f"bias_{which}_{part}") for which in ("ih", "hh"))
        whole: Tensor = first + second
        return whole


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

    Streams of a plain chain of layers are fresh too, and know which cells a layer makes of an output of the one before;
    elsewhere they start at the weights of the network.

    Returns:
        the network.

    Raises:
        RbeError: a pattern fits no matrix, a format does not offer the block, or only some matrices of a recurrent
            layer would be seeds.
    """
    found = list(matrices(network))
    _check_patterns([m.name for m in found], seeds)
    made = {m.name: seeds.of(m.name, number) for number, m in enumerate(found)}
    chain = _Chain(network, found, made) if isinstance(network, nn.Sequential) else None
    for name, module in list(network.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.LSTM):
            new = _lstm(name, module, made)
        elif name in made and chain is not None:
            corner, cells = chain.next(name)
            if made[name].format == "stream":
                new = _stream(module, made[name], corner, cells)
                new.slim = chain.slim(name)
        elif name in made and made[name].format == "stream":
            new = _stream(module, made[name])
        if new is None and name in made and made[name].format not in ("stream", "dense"):
            new = _layer(module, made[name])
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new)
    if chain is None:
        _start(network, found)
    return network


def start(network: nn.Module, source: nn.Module) -> None:
    """Give a network the weights of a dense one of the same shape: all tensors of the same name, and open streams.

    Other seeds stay as they are.

    >>> dense = nn.Sequential(nn.Linear(32, 16))
    >>> network = plant(nn.Sequential(nn.Linear(32, 16)), Seeds("stream", spread=0.1, bytes=99))
    >>> start(network, dense)
    >>> bool((network[0].weight - dense[0].weight).abs().max() < 0.01)
    True

    Raises:
        RbeError: the source is in seeds, a matrix of one has none of its name and shape in the other, or attention
            other heads.
    """
    seeds = [name for name, m in source.named_modules() if isinstance(m, Seeded | Stream)]
    if seeds:
        raise RbeError(f"train: the network to start from has seeds, in {seeds[0]}; name the run of a dense network")
    parts = dict(network.named_modules())
    given = {m.name: m for m in matrices(source)}
    own = {m.name: tuple(m.weight.shape) for m in matrices(network)}
    own |= {name: m.shape for name, m in parts.items() if isinstance(m, Stream)}
    own |= {
        name: m.spec.shape for name, m in parts.items() if isinstance(m, Seeded) and not isinstance(m, SeededVector)
    }
    for name in given:
        if name not in parts and name not in own:
            raise RbeError(f"train: the network to start from has a matrix {name}, this one has not; use its shape")
    for name, module in source.named_modules():
        if isinstance(module, _NORMS) and name not in parts:
            raise RbeError(f"train: the network to start from has a norm {name}, this one has not; give it its norms")
        theirs, here = getattr(module, "heads", None), getattr(parts.get(name), "heads", None)
        if theirs != here and isinstance(theirs, int) and isinstance(here, int):
            raise RbeError(f"train: {name} of the network to start from has {theirs} heads, here {here}; use as many")
    for name, shape in own.items():
        one = given.get(name)
        if one is None or shape not in (tuple(one.weight.shape), tuple(one.weight.flatten(1).shape)):
            there = "missing" if one is None else f"{tuple(one.weight.shape)}"
            raise RbeError(f"train: {name} is {shape}, but in the network to start from it is {there}; use its shape")
    kept = source.state_dict()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name in kept and kept[name].shape == tensor.shape:
                tensor.copy_(kept[name])
    _start(network, list(given.values()))


def _start(network: nn.Module, given: list[Matrix]) -> None:
    """Open streams begin at the matrices of their names."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Stream)}
    for m in given:
        if m.name in layers:
            layers[m.name].start(m.weight, m.bias)


class _Chain:
    """Where each matrix of a plain chain of layers stands: what one layer leaves 0, the next need not read.

    Attributes:
        rows, open: outputs of the layer before, and how many of them may have weights.
    """

    def __init__(self, network: nn.Module, found: list[Matrix], made: dict[str, Seeds]) -> None:
        self.found, self.made, self.numbers = found, made, {m.name: k for k, m in enumerate(found)}
        self.norms = any(isinstance(module, _NORMS) for module in network.modules())
        self.rows = self.open = 1

    def next(self, name: str) -> tuple[tuple[int, int], int]:
        """(open rows and columns, columns of a group) of the next matrix."""
        number = self.numbers[name]
        weight, made = self.found[number].weight, self.made[name]
        rows, columns = weight.shape[0], weight[0].numel()
        corner = made.rows[number] if made.rows else rows, columns * self.open // self.rows
        # The cells that one output of the layer before became; pixels of a row of a picture, in the first, if it is
        # square.
        side = math.isqrt(columns)
        cells = columns // self.rows if number else side if side * side == columns else 1
        self.rows, self.open = rows, corner[0]
        return corner, cells

    def slim(self, name: str) -> bool:
        """Whether the layer after takes what is left of the outputs; norms and other formats want all of them."""
        after = self.numbers[name] + 1
        return not self.norms and after < len(self.found) and self.made[self.found[after].name].format == "stream"


def _check_patterns(names: list[str], seeds: Seeds) -> None:
    for layer in seeds.layer:
        if not any(fnmatchcase(name, layer.pattern) for name in names):
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


def _stream(module: nn.Module, made: Seeds, corner: tuple[int, int] | None = None, cells: int = 1) -> Stream:
    if isinstance(module, nn.Embedding):
        return seeded.StreamEmbedding(module.num_embeddings, module.embedding_dim, spread=made.spread)
    bias = module.bias is not None and bool(made.bias)
    if isinstance(module, nn.Linear):
        return seeded.StreamLinear(
            module.in_features, module.out_features, bias, cells=cells, spread=made.spread, open_shape=corner
        )
    assert isinstance(module, nn.Conv2d)
    return seeded.StreamConv2d(
        module.in_channels,
        module.out_channels,
        (module.kernel_size[0], module.kernel_size[1]),
        (module.stride[0], module.stride[1]),
        module.padding,  # type: ignore[arg-type]
        bias,
        spread=made.spread,
        open_shape=corner,
    )


def _lstm(name: str, module: nn.LSTM, made: dict[str, Seeds]) -> nn.Module | None:
    own = {part: of for part, of in made.items() if part.startswith(f"{name}.")}
    dense = [part for part, of in own.items() if of.format == "dense"]
    if len(dense) == len(own):
        return None
    if dense:
        raise RbeError(f"train: {', '.join(dense)} cannot be dense while other matrices of {name} are seeds")
    if any(of.format == "stream" for of in own.values()):
        of = next(iter(own.values()))
        bias = module.bias and bool(of.bias)
        sizes = module.input_size, module.hidden_size, module.num_layers
        options = module.batch_first, module.dropout, module.bidirectional
        return seeded.StreamLSTM(*sizes, bias, *options, spread=of.spread)
    parts = {}
    for part, of in own.items():
        short = part.removeprefix(f"{name}.")
        weight = getattr(module, f"weight_{short}")
        parts[short] = seeded.Linear(weight.shape[1], weight.shape[0], of.bias, **_options(of))
    return seeded.LSTM.from_linears(parts, module.num_layers, module.batch_first, module.dropout, module.bidirectional)
