"""The networks that can be trained, of seeds or dense."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from rbe.nn import Seeded, SeededVector, Stream, stored_bytes
from rbe.train import pictures, texts
from rbe.train.config import Config, Seeds
from rbe.train.planting import matrices, plant

_KINDS: dict[str, Callable[[Config], nn.Module]] = {
    "mlp": pictures.mlp,
    "lenet5": pictures.lenet5,
    "resnet20": lambda config: pictures.ResNet20(16 * config.model.width),
    "lstm": lambda config: texts.CharacterLSTM(config.model),
    "transformer": lambda config: texts.Translator(config.model),
    "gpt": texts.Gpt,
}


@dataclass(frozen=True)
class Part:
    """Matrices that a configuration makes of the same.

    Attributes:
        pattern: of the [[seeds.layer]] that decides about them; "" where none does.
        format: of their seeds, or "dense".
        weights: of them; bytes: that stand for these.
    """

    pattern: str
    format: str
    weights: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Against float32."""
        return 4 * self.weights / self.bytes


def build(config: Config) -> nn.Module:
    """The network of a configuration, freshly initialised from torch's global generator.

    Raises:
        RbeError: the format does not offer the blocks asked for, or a pattern fits no matrix.
    """
    return plant(dense(config), config.seeds)


def dense(config: Config) -> nn.Module:
    """The same network without seeds."""
    return _KINDS[config.model.kind](config)


def sizes(model: nn.Module, stored: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Weights and bytes of a model.

    Args:
        stored: what `rbe.nn.pack` made of it, if that is what is kept.

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
            matrix = module.matrix
            # The one seed of a bias stands for no weight.
            weights += 0 if isinstance(module, SeededVector) else math.prod(module.spec.shape)
            seed_bytes += matrix.seeds.numel() * 8
            whole += matrix.nbytes
            own |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
            bias = module._parameters.get("bias")
            if bias is not None:
                own.discard(id(bias))
        elif isinstance(module, Stream):
            matrix_weights, matrix_bytes = module.stored()
            # The scale is a float32.
            weights, seed_bytes, whole = weights + matrix_weights, seed_bytes + matrix_bytes, whole + matrix_bytes + 4
            own |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
        elif callable(own_stored := getattr(module, "stored", None)):
            matrix_weights, matrix_bytes = own_stored()
            weights, seed_bytes, whole = weights + matrix_weights, seed_bytes + matrix_bytes, whole + matrix_bytes
            tensors = (*module._parameters.items(), *module._buffers.items())
            own |= {id(t) for name, t in tensors if t is not None and name != "bias"}
    names = {id(p): name for name, p in model.named_parameters()}
    for one in matrices(model):
        weights += one.weight.numel()
        seed_bytes += 4 * one.weight.numel() if stored is None else stored[names[id(one.weight)]].nbytes
    if stored is not None:
        return {"weights": weights, "seed_bytes": seed_bytes, "bytes": stored_bytes(stored)}
    every: list[Tensor] = [*model.parameters(), *model.buffers()]
    # The counter of batch norms takes part in nothing.
    kept = [t for t in every if id(t) not in own and t.is_floating_point()]
    return {"weights": weights, "seed_bytes": seed_bytes, "bytes": whole + sum(t.numel() * 4 for t in kept)}


def parts(model: nn.Module, seeds: Seeds, stored: Mapping[str, Tensor] | None = None) -> tuple[Part, ...]:
    """Weights and bytes of every kind of matrix.

    >>> model = nn.Sequential(nn.Linear(16, 16), plant(nn.Sequential(nn.Linear(32, 16)), Seeds())[0])
    >>> [(part.format, part.weights, part.bytes, part.ratio) for part in parts(model, Seeds())]
    [('outer128', 512, 32, 64.0), ('dense', 256, 1024, 1.0)]

    Args:
        model: seeds frozen.
        seeds: what it was made of.
        stored: as for `sizes`.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def add(name: str, form: str, weights: int, nbytes: int) -> None:
        own = [layer.pattern for layer in seeds.layer if fnmatchcase(name, layer.pattern)]
        before = found.get(key := (own[-1] if own else "", form), (0, 0))
        found[key] = before[0] + weights, before[1] + nbytes

    for name, module in model.named_modules():
        if isinstance(module, Seeded) and module.owner is module and not isinstance(module, SeededVector):
            add(name, module.spec.format, math.prod(module.spec.shape), module.matrix.seeds.numel() * 8)
        elif isinstance(module, Stream):
            add(name, "stream", *module.stored())
        elif callable(own_stored := getattr(module, "stored", None)):
            add(name, type(module).__name__, *own_stored())
    names = {id(p): name for name, p in model.named_parameters()}
    for one in matrices(model):
        nbytes = 4 * one.weight.numel() if stored is None else stored[names[id(one.weight)]].nbytes
        add(one.name, "dense", one.weight.numel(), nbytes)
    return tuple(Part(*key, *value) for key, value in found.items())
