"""Which block edge each matrix gets: the least forecast loss under a number of bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe import formats, search
from rbe.errors import RbeError
from rbe.train.config import Config
from rbe.train.networks import dense
from rbe.train.planting import matrices
from rbe.train.task import NOTHING, Task

EDGES = (64, 32, 16, 8)
# Steps of the dense network that is trained briefly where no teacher is at hand, and its learning rate.
BRIEF, BRIEF_RATE = 200, 2e-3
# Batches whose gradients are squared.
BATCHES = 16
# Side of the corner of a matrix that is encoded to see what an edge loses.
CORNER = 512


@dataclass(frozen=True)
class Choice:
    """One way to hold a matrix.

    Attributes:
        edge: of its blocks.
        bytes: of its seeds.
        loss: forecast increase of the training loss.
    """

    edge: int
    bytes: int
    loss: float


@dataclass(frozen=True)
class Share:
    """What a matrix gets.

    >>> Share("linear0", 256, 784, sensitivity=1e-4, edge=16, bytes=12_544, loss=0.02).to_json()["edge"]
    16

    Attributes:
        name, rows, columns: of the matrix.
        sensitivity: mean squared gradient of a weight.
        edge, bytes, loss: as in `Choice`.
    """

    name: str
    rows: int
    columns: int
    sensitivity: float
    edge: int
    bytes: int
    loss: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def allocate(options: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """The choice for every matrix: from the cheapest on, always the step that saves most loss for a byte and fits.

    >>> ways = [Choice(32, 10, 5.0), Choice(16, 40, 1.0)]
    >>> {name: c.edge for name, c in allocate({"a": ways, "b": [Choice(32, 10, 0.5), Choice(16, 40, 0.1)]}, 50).items()}
    {'a': 16, 'b': 32}

    Raises:
        RbeError: even the cheapest choices take more than the budget.
    """
    chosen = {name: min(ways, key=lambda c: (c.bytes, c.loss)) for name, ways in options.items()}
    spent = sum(c.bytes for c in chosen.values())
    if spent > budget:
        raise RbeError(
            f"train: [seeds] bytes is {budget}, but the largest blocks take {spent} already; allow more, or make the "
            "network smaller"
        )
    while True:
        steps = [
            ((chosen[name].loss - way.loss) / (way.bytes - chosen[name].bytes), name, way)
            for name, ways in options.items()
            for way in ways
            if way.bytes > chosen[name].bytes and way.loss < chosen[name].loss
        ]
        fitting = [s for s in steps if spent + s[2].bytes - chosen[s[1]].bytes <= budget]
        if not fitting:
            return chosen
        _, name, way = max(fitting, key=lambda s: s[0])
        spent += way.bytes - chosen[name].bytes
        chosen[name] = way


def plan(config: Config, task: Task, teacher: nn.Module | None) -> tuple[Share, ...]:
    """Measure every matrix, and divide the bytes of the configuration among those that have no block of their own.

    The forecast is half the mean squared gradient of a weight, at the teacher or at a briefly trained dense network,
    times the energy of the matrix that blocks of an edge lose.

    Raises:
        RbeError: the bytes are too few.
    """
    network = _reference(config, task, teacher)
    found = {m.name: m.weight.detach().flatten(1).clone() for m in matrices(network)}
    squares = _squared_gradients(network, task)
    options: dict[str, list[Choice]] = {}
    fixed = 0
    for number, (name, weight) in enumerate(found.items()):
        made = config.seeds.of(name, number)
        if made.format == "dense":
            fixed += 4 * weight.numel()
            continue
        # A block that a pattern asks for stays, also where it is that of all.
        asked = any(layer.block is not None and fnmatchcase(name, layer.pattern) for layer in config.seeds.layer)
        own = asked or made != config.seeds
        edges = (made.block,) if own else EDGES
        options[name] = [
            Choice(
                edge,
                8 * spec.blocks * formats.get(made.format).words(spec),
                0.5 * squares[name] * _lost(weight, edge, made.stages) if made.format == "outer128" else 0.0,
            )
            for edge in edges
            for spec in [formats.make_spec(made.format, tuple(weight.shape), block=edge, stages=made.stages)]  # type: ignore[arg-type]
        ]
    if fixed >= config.seeds.bytes:
        raise RbeError(
            f"train: [seeds] bytes is {config.seeds.bytes}, but what [[seeds.layer]] leaves dense takes {fixed}; "
            "allow more"
        )
    chosen = allocate(options, config.seeds.bytes - fixed)
    return tuple(
        Share(name, *found[name].shape, squares[name], c.edge, c.bytes, c.loss)  # type: ignore[call-arg]
        for name, c in chosen.items()
    )


def _reference(config: Config, task: Task, teacher: nn.Module | None) -> nn.Module:
    """The teacher, if it is the same network, else a dense one after a few steps."""
    torch.manual_seed(config.train.seed)
    network = dense(config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if teacher is not None and shapes == {name: tensor.shape for name, tensor in teacher.state_dict().items()}:
        network.load_state_dict(teacher.state_dict())
        return network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), BRIEF_RATE)
    generator = torch.Generator().manual_seed(config.train.seed)
    done = 0
    while done < BRIEF:
        for batch in task.batches(generator):
            optimizer.zero_grad()
            _loss(network, batch.inputs, batch.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == BRIEF:
                break
    return network


def _loss(network: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    out = network(*inputs)
    return functional.cross_entropy(out.flatten(0, -2), targets.flatten(), ignore_index=NOTHING)


def _squared_gradients(network: nn.Module, task: Task) -> dict[str, float]:
    """Mean over weights and batches; networks are measured as they are when trained."""
    total = {m.name: 0.0 for m in matrices(network)}
    generator = torch.Generator().manual_seed(1)
    network.train()
    count = 0
    for batch in task.batches(generator):
        network.zero_grad()
        _loss(network, batch.inputs, batch.targets).backward()  # type: ignore[no-untyped-call]
        for m in matrices(network):
            gradient = m.weight.grad
            assert gradient is not None
            total[m.name] += float(gradient.square().mean())
        count += 1
        if count == BATCHES:
            break
    return {name: value / count for name, value in total.items()}


def _lost(weight: Tensor, edge: int, stages: int) -> float:
    """Energy of a matrix that outer128 in blocks of an edge loses, from a corner of it."""
    corner = weight[:CORNER, :CORNER].contiguous()
    matrix = search.encode(corner, format="outer128", block=edge, stages=stages)
    energy = float(corner.square().sum())
    share = float((matrix.decode() - corner).square().sum()) / energy if energy else 0.0
    return share * float(weight.square().sum()) if math.isfinite(share) else 0.0
