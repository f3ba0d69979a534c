"""The networks that can be trained, of seeds or dense."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

import rbe.nn as seeded
from rbe.nn import Seeded
from rbe.train.config import Config


def build(config: Config) -> nn.Module:
    """The network of a configuration, freshly initialised from torch's global generator.

    Raises:
        RbeError: the format does not offer the blocks asked for.
    """
    widths, batch = config.model.widths, config.model.norm == "batch"
    layers: list[nn.Module] = []
    if config.model.kind == "mlp":
        layers.append(nn.Flatten())
        for k, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(_linear(config, k, inputs, outputs))
            if k < len(widths) - 2:
                layers += [nn.BatchNorm1d(outputs)] if batch else []
                layers.append(nn.ReLU())
        return nn.Sequential(*layers)
    first, second, units, classes = widths
    for k, (inputs, outputs) in enumerate(((1, first), (first, second))):
        layers.append(_conv(config, k, inputs, outputs))
        layers += [nn.BatchNorm2d(outputs)] if batch else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    # 28x28 images: 5x5 without padding and halving, twice, leave 4x4.
    layers += [nn.Flatten(), _linear(config, 2, 16 * second, units)]
    layers += [nn.BatchNorm1d(units)] if batch else []
    return nn.Sequential(*layers, nn.ReLU(), _linear(config, 3, units, classes))


def _options(config: Config, number: int) -> dict[str, Any]:
    seeds = config.seeds
    block = seeds.blocks[number] if seeds.blocks else seeds.block
    return {"format": seeds.format, "block": block, "mode": seeds.mode, "stages": seeds.stages}


def _linear(config: Config, number: int, inputs: int, outputs: int) -> nn.Module:
    if config.seeds.format == "dense":
        return nn.Linear(inputs, outputs, bool(config.seeds.bias))
    return seeded.Linear(inputs, outputs, config.seeds.bias, **_options(config, number))


def _conv(config: Config, number: int, inputs: int, outputs: int) -> nn.Module:
    if config.seeds.format == "dense":
        return nn.Conv2d(inputs, outputs, 5, bias=bool(config.seeds.bias))
    return seeded.Conv2d(inputs, outputs, 5, bias=config.seeds.bias, **_options(config, number))


def sizes(model: nn.Module) -> dict[str, int]:
    """Weights and bytes of a model.

    Returns:
        weights: of the matrices; seed_bytes: that stand for them (all of them, where they are dense); bytes: of
        everything that must be stored, scales, biases, norms and their running statistics included.

    A layer that is neither seeds nor torch's has a method `stored() -> (weights, bytes)`: of its matrix, and what
    stands for it. These bytes take the place of its own parameters and buffers, but not of a `bias`.
    """
    weights = seed_bytes = whole = 0
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, Seeded) and module.owner is module:
            rows, columns = module.spec.shape
            weights += rows * columns
            matrix = module.matrix
            seed_bytes += matrix.seeds.numel() * 8
            whole += matrix.nbytes
            own |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
            bias = module._parameters.get("bias")
            if bias is not None:
                own.discard(id(bias))
        elif callable(stored := getattr(module, "stored", None)):
            matrix_weights, matrix_bytes = stored()
            weights, seed_bytes, whole = weights + matrix_weights, seed_bytes + matrix_bytes, whole + matrix_bytes
            tensors = (*module._parameters.items(), *module._buffers.items())
            own |= {id(t) for name, t in tensors if t is not None and name != "bias"}
        elif isinstance(module, nn.Linear | nn.Conv2d):
            weights += module.weight.numel()
            seed_bytes += 4 * module.weight.numel()
    every: list[Tensor] = [*model.parameters(), *model.buffers()]
    # The counter of batch norms takes part in nothing.
    kept = [t for t in every if id(t) not in own and t.is_floating_point()]
    return {"weights": weights, "seed_bytes": seed_bytes, "bytes": whole + sum(t.numel() * 4 for t in kept)}
