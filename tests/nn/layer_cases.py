"""Small seed layers of every kind, with an input each: the cases that the laws of all layers run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rbe.nn

OPEN: dict[str, dict[str, Any]] = {
    "packed64": {"format": "packed64", "block": 4},
    "packed64-whole": {"format": "packed64", "block": None, "precision": 64, "stages": 2},
    "radial": {"format": "packed128", "block": 4},
    "faithful": {"format": "packed128", "block": 4, "mode": "faithful"},
    "outer128": {"format": "outer128", "block": 8},
}
EVERY: dict[str, dict[str, Any]] = {**OPEN, "trellis": {"format": "trellis", "rotation": (3, 5)}}


@dataclass(frozen=True)
class Case:
    """How a layer is built from format options, and an input to it."""

    build: Callable[[dict[str, Any]], nn.Module]
    x: Callable[[], Tensor]


# Their seeds make matrices only: biases and norms stay dense.
NO_VECTORS = ("trellis", "outer128")


def _seed(options: dict[str, Any]) -> bool | str:
    return True if options["format"] in NO_VECTORS else "seed"


def _block(options: dict[str, Any]) -> nn.Module:
    return rbe.nn.TransformerBlock(8, 2, 12, 0.0, "gelu", bias=_seed(options), batch_first=True, **options)


CASES: dict[str, Case] = {
    "linear": Case(lambda o: rbe.nn.Linear(6, 5, bias=_seed(o), **o), lambda: torch.randn(3, 6)),
    "embedding": Case(
        lambda o: rbe.nn.Embedding(7, 6, **{**o, "rotation": (0, 0)}), lambda: torch.tensor([[1, 6], [1, 0]])
    ),
    "attention": Case(lambda o: rbe.nn.MultiheadAttention(8, 2, batch_first=True, **o), lambda: torch.randn(2, 3, 8)),
    "feedforward": Case(lambda o: rbe.nn.FeedForward(6, 7, "silu", bias=_seed(o), **o), lambda: torch.randn(3, 6)),
    "layernorm": Case(
        lambda o: rbe.nn.LayerNorm(6, parameters="dense" if o["format"] in NO_VECTORS else "seed", **o),
        lambda: torch.randn(3, 6),
    ),
    "rmsnorm": Case(
        lambda o: rbe.nn.RMSNorm(6, parameters="dense" if o["format"] in NO_VECTORS else "seed", **o),
        lambda: torch.randn(3, 6),
    ),
    "batchnorm": Case(
        lambda o: rbe.nn.BatchNorm1d(
            6, track_running_stats=False, parameters="dense" if o["format"] in NO_VECTORS else "seed", **o
        ),
        lambda: torch.randn(5, 6),
    ),
    "position": Case(lambda o: rbe.nn.SeededEncoding(7, 6, **{**o, "rotation": (0, 0)}), lambda: torch.randn(3, 2, 6)),
    "block": Case(_block, lambda: torch.randn(2, 3, 8)),
    "conv1d": Case(
        lambda o: rbe.nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=_seed(o), **o), lambda: torch.randn(2, 4, 5)
    ),
    "conv2d": Case(lambda o: rbe.nn.Conv2d(3, 5, 3, stride=2, padding=1, **o), lambda: torch.randn(2, 3, 5, 4)),
    "conv2d-1x1": Case(lambda o: rbe.nn.Conv2d(6, 5, 1, bias=_seed(o), **o), lambda: torch.randn(2, 6, 2, 2)),
    "lstm": Case(lambda o: rbe.nn.LSTM(3, 4, bidirectional=True, **o), lambda: torch.randn(3, 2, 3)),
    "gru": Case(lambda o: rbe.nn.GRU(3, 4, num_layers=2, bias=_seed(o), **o), lambda: torch.randn(3, 2, 3)),
}

# Every layer in one format, those with matrices in the one made for training, and every operation (product, rows,
# decode, vector) in every format.
PAIRS = [(name, "radial") for name in CASES]
PAIRS += [(name, "outer128") for name in CASES if not name.endswith("norm")]
PAIRS += [
    (name, format)
    for format in OPEN
    if format not in ("radial", "outer128")
    for name in ("linear", "embedding", "conv2d")
]


def make(name: str, format: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """(layer, input) of a case in a format, the same every time."""
    torch.manual_seed(seed)
    layer = CASES[name].build(EVERY[format])
    return layer, CASES[name].x()


def first(output: Any) -> Tensor:
    """The tensor of a layer's output that is no state and no map of weights."""
    return output[0] if isinstance(output, tuple) else output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal to the tolerance, relative to the largest entry."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30))
