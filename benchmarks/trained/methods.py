"""The methods of the table: how each makes a network that fits a number of bytes, and the settings that are tuned."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

import rbe.nn as seeded
from benchmarks.trained.layers import BasisLinear, HashedLinear, LowRankLinear, NolaLinear, QuantLinear
from benchmarks.trained.pruned import Pruned, SparseLinear
from benchmarks.trained.stored import Shift, rest_bytes
from rbe import formats
from rbe.train.config import Seeds

HOST = (784, 256, 128, 10)
CLASSES = HOST[-1]
WEIGHTS = sum(a * b for a, b in pairwise(HOST))
RATIOS = (64, 256, 1000)
# Edges of the blocks of `outer128`, of each matrix in turn: the seeds come nearest to the ratio.
BLOCKS = {64: (16, 16, 16), 256: (32, 32, 16), 1000: (64, 64, 64)}
RATES = (1e-2, 3e-3, 3e-2)
# Factors by which the hidden layers of a peer may be narrower.
NARROW = (1, 2, 4)

Make = Callable[[int, int, int], nn.Module]


@dataclass(frozen=True)
class Task:
    """What a network must fit: the bytes of everything, the ratio that names them, and the steps of its training."""

    whole: int
    ratio: int
    steps: int


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        build: (task, settings) to a fresh network; ValueError where none is that small.
        grid: settings to tune, the first of each being the start.
        recipe: of the training run.
        seeds: what the configuration says of the matrices, where the harness has to know.
    """

    build: Callable[..., nn.Sequential]
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seeds: Callable[[Task], Seeds] = lambda _: Seeds(format="dense", bias=False)


def seed_bytes(ratio: int) -> int:
    """Bytes of the seeds of `outer128` at a ratio, scales included."""
    shapes = zip(shapes_of(HOST), BLOCKS[ratio], strict=True)
    return sum(16 * -(-inputs // b) * -(-outputs // b) + 4 for (inputs, outputs), b in shapes)


def whole_of(ratio: int) -> int:
    """Bytes that every method may fill: those of the host in `outer128`, norms and biases included."""
    return seed_bytes(ratio) + rest_bytes(HOST)


def shapes_of(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(inputs, outputs) of each matrix."""
    return list(pairwise(widths))


def network(widths: tuple[int, ...], make: Make, pool: bool = False) -> Iterator[nn.Module]:
    """The layers of the harness's MLP, every matrix without bias.

    Args:
        make: (number, inputs, outputs) to a layer.
        pool: the images are halved first.
    """
    if pool:
        yield nn.AvgPool2d(2)
    yield nn.Flatten()
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        yield make(k, inputs, outputs)
        if k < len(widths) - 2:
            yield nn.BatchNorm1d(outputs)
            yield nn.ReLU()
    yield Shift(widths[-1])


def shares(nbytes: int, widths: tuple[int, ...] = HOST) -> list[int]:
    """Bytes for each matrix: by weights^(3/4), for a weight of a small matrix matters more."""
    sizes = [(inputs * outputs) ** 0.75 for inputs, outputs in shapes_of(widths)]
    return [int(nbytes * size / sum(sizes)) for size in sizes]


def narrowed(task: Task, narrow: int) -> tuple[tuple[int, ...], int]:
    """The host with its hidden layers narrower by a factor, and the bytes that its norms and biases leave for matrices.

    At high ratios norms of all units would take half of the bytes.

    Raises:
        ValueError: they leave nothing.
    """
    widths = (HOST[0], *(units // narrow for units in HOST[1:-1]), CLASSES)
    nbytes = task.whole - rest_bytes(widths)
    if nbytes < 64:
        raise ValueError(f"norms and biases of {widths} leave {nbytes} of {task.whole} bytes")
    return widths, nbytes


def quantised(task: Task, *, bits: int, pool: bool) -> nn.Sequential:
    """The widest network (h, max(h/2, 16)) of weights of few bits that fits."""
    inputs = 196 if pool else 784

    def widths(hidden: int) -> tuple[int, ...]:
        return inputs, hidden, max(hidden // 2, 16), CLASSES

    def fits(hidden: int) -> bool:
        matrices = sum(-(-a * b * bits // 8) + 2 for a, b in shapes_of(widths(hidden)))
        return matrices + rest_bytes(widths(hidden)) <= task.whole

    hidden = max((h for h in range(1, 1025) if fits(h)), default=0)
    if not hidden:
        raise ValueError(f"no network of {bits} bits fits {task.whole} bytes")
    return nn.Sequential(*network(widths(hidden), lambda _, a, b: QuantLinear(a, b, bits), pool))


def _of_host(task: Task, narrow: int, make: Callable[[int, int, int, int], nn.Module]) -> nn.Sequential:
    widths, nbytes = narrowed(task, narrow)
    given = shares(nbytes, widths)
    return nn.Sequential(*network(widths, lambda k, a, b: make(k, a, b, given[k])))


def shared(task: Task, *, bits: int, narrow: int = 1) -> nn.Sequential:
    """HashedNets."""
    return _of_host(task, narrow, lambda k, a, b, nbytes: HashedLinear(a, b, nbytes, bits, k))


def basis(task: Task, *, bits: int, narrow: int = 1) -> nn.Sequential:
    """Coefficients of a random basis."""
    return _of_host(task, narrow, lambda k, a, b, nbytes: BasisLinear(a, b, nbytes, bits, k))


def nola(task: Task, *, bits: int, rank: int, narrow: int = 1) -> nn.Sequential:
    """Coefficients of random bases of two factors; each factor has a step of its own."""
    return _of_host(task, narrow, lambda k, a, b, nbytes: NolaLinear(a, b, rank, nbytes - 4, bits, 10 * k))


def low_rank(task: Task, *, bits: int, narrow: int = 1) -> nn.Sequential:
    """Ranks grow where bytes lag behind the shares."""
    widths, nbytes = narrowed(task, narrow)
    shapes, given = shapes_of(widths), shares(nbytes, widths)
    ranks = [1] * len(shapes)

    def used(k: int, rank: int) -> int:
        return LowRankLinear.nbytes(*shapes[k], rank, bits)

    if sum(used(k, 1) for k in range(len(shapes))) > nbytes:
        raise ValueError(f"rank one at {bits} bits does not fit {nbytes} bytes")
    while True:
        left = nbytes - sum(used(k, rank) for k, rank in enumerate(ranks))
        more = [
            k for k, rank in enumerate(ranks) if rank < min(shapes[k]) and used(k, rank + 1) - used(k, rank) <= left
        ]
        if not more:
            break
        ranks[min(more, key=lambda k: used(k, ranks[k]) / given[k])] += 1
    return nn.Sequential(*network(widths, lambda k, a, b: LowRankLinear(a, b, ranks[k], bits)))


def pruned(task: Task, *, levels: int, narrow: int = 1) -> nn.Sequential:
    """Few weights of few values, entropy-coded."""
    widths, nbytes = narrowed(task, narrow)
    layers = network(widths, lambda _, a, b: SparseLinear(a, b, levels))
    return Pruned(*layers, nbytes=nbytes, steps=task.steps)


def ours(task: Task) -> nn.Sequential:
    """`outer128` at the blocks of the ratio."""
    blocks = BLOCKS[task.ratio]
    if seed_bytes(task.ratio) + rest_bytes(HOST) > task.whole:
        raise ValueError(f"outer128 in blocks of {blocks} does not fit {task.whole} bytes")

    def make(k: int, a: int, b: int) -> nn.Module:
        return seeded.Linear(a, b, False, format="outer128", block=blocks[k])

    return nn.Sequential(*network(HOST, make))


def streamed(task: Task) -> nn.Sequential:
    """The host in `stream`, biases within and no norms."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in shapes_of(HOST):
        layers += [seeded.StreamLinear(inputs, outputs, cells=28 if inputs == HOST[0] else 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def printed(task: Task, *, format: str) -> nn.Sequential:
    """A format of the papers, in the smallest blocks from 16 on that fit; one seed a block, no stages."""
    mode = "faithful" if format == "packed128" else None
    for block in (16, 32, 64):
        specs = [formats.make_spec(format, (b, a), block=block, mode=mode) for a, b in shapes_of(HOST)]
        words = sum(spec.blocks * formats.get(format).words(spec) for spec in specs)
        if 8 * words <= task.whole - rest_bytes(HOST):
            break
    else:
        raise ValueError(f"{format} in blocks of 64 does not fit {task.whole} bytes")
    return nn.Sequential(
        *network(HOST, lambda _, a, b: seeded.Linear(a, b, False, format=format, block=block, mode=mode))
    )


METHODS: dict[str, Method] = {
    "outer128": Method(ours, {"lr": RATES}),
    "stream": Method(
        streamed,
        {"lr": (2e-2, 1e-2, 4e-2)},
        # A float32 scale a matrix is beside the streams.
        seeds=lambda task: Seeds(format="stream", bytes=task.whole - 4 * len(shapes_of(HOST))),
    ),
}
for _bits in (4, 2, 1):
    for _pool in (False, True):
        _name = f"dense {_bits}-bit" + (" 14x14" if _pool else "")
        METHODS[_name] = Method(partial(quantised, bits=_bits, pool=_pool), {"lr": RATES})
METHODS |= {
    "hashed": Method(shared, {"narrow": NARROW, "bits": (4, 2, 1), "lr": RATES}),
    "random basis": Method(basis, {"narrow": NARROW, "bits": (4, 2), "lr": RATES}),
    "nola": Method(nola, {"narrow": NARROW, "bits": (4, 2), "rank": (32,), "lr": RATES}),
    "low rank": Method(low_rank, {"narrow": NARROW, "bits": (4, 2, 1), "lr": RATES}),
    "pruned": Method(pruned, {"narrow": NARROW, "levels": (4, 2), "lr": RATES}),
    # As printed: Adam on r and theta themselves; state transitions with the printed annealing.
    "packed64": Method(partial(printed, format="packed64"), {"lr": RATES}, {"method": "polar"}),
    "packed128": Method(partial(printed, format="packed128"), {"lr": RATES}, {"method": "polar", "flip_every": 10}),
}
