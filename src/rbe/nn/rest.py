"""What is stored beside the seeds, small: batch norms folded away, biases, gains and row scales in 16 or 8 bits.

The model computes in the dtypes it always has; only its values lie on a coarser grid, so that `pack` loses nothing
more. What `pack` returns is what a file holds, byte for byte.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rbe.errors import RbeError
from rbe.nn.conv import Conv1d, Conv2d
from rbe.nn.linear import Linear
from rbe.nn.norm import BatchNorm, fold
from rbe.nn.seeded import Seeded
from rbe.nn.stream import Stream

BITS = (32, 16, 8)
# The name of a tensor in 8 bits plus this is that of its step.
STEP = ".step"
# A float16 reaches this far.
_FAR = 65504.0
# Never in 8 bits: a variance that rounds to 0 makes a norm explode, and outliers are what a common step cannot say.
_FINE = ("running_mean", "running_var", "outlier_values")
_COUNTER = "num_batches_tracked"
_NORMS = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class _Tracer(fx.Tracer):
    """Sees layers as wholes, ours too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Seeded, Stream, *_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def fold_norms(model: nn.Module) -> int:
    """Fold every batch norm that follows a seed layer, and nothing else does, into this layer; in place.

    >>> model = nn.Sequential(Linear(16, 8, format="outer128"), nn.BatchNorm1d(8), nn.ReLU()).eval()
    >>> fold_norms(model), model
    (1, Sequential(
      (0): Linear(in_features=16, out_features=8, bias=True, format=outer128, bits=0.5 (2.25 stored))
      (1): Identity()
      (2): ReLU()
    ))

    The norm's running statistics, gain and shift become a float16 factor a row and a dense bias, see `rbe.nn.fold`.
    A model that cannot be traced, or a norm that stands somewhere else, stays as it is.

    Returns:
        how many norms are gone.
    """
    parts = dict(model.named_modules())
    if not any(isinstance(part, _NORMS) for part in parts.values()):
        return 0
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # what a model does while it is traced is its own affair
        return 0
    calls: dict[str, int] = {}
    for node in nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    owners = [part.owner for part in parts.values() if isinstance(part, Seeded)]  # twice where a matrix is tied
    folded = 0
    for node in nodes:
        norm = parts.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        if not isinstance(norm, _NORMS) or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer, name = parts[str(before.target)], str(before.target)
        once = len(before.users) == 1 and calls[name] == 1 and calls[str(node.target)] == 1
        if not once or not isinstance(layer, Linear | Conv1d | Conv2d) or owners.count(layer) != 1:
            continue
        if norm.running_mean is None or layer.spec.rotation[0]:
            continue
        alone: Linear | Conv1d | Conv2d = fold(layer, norm)  # type: ignore[type-var]  # whichever it is
        if alone.bias is not None:
            alone.bias.requires_grad_(any(p.requires_grad for p in (*layer.parameters(), *norm.parameters())))
        _put(model, name, alone)
        _put(model, str(node.target), nn.Identity())
        folded += 1
    return folded


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def pack(model: nn.Module, bits: int = 16) -> dict[str, Tensor]:
    """The tensors of a model with frozen seeds as they are stored: a state dict whose rest is small.

    >>> model = nn.Sequential(Linear(16, 8, format="outer128").freeze(), nn.ReLU())
    >>> {name: str(tensor.dtype)[6:] for name, tensor in pack(model, bits=8).items()}
    {'0.bias': 'int8', '0.bias.step': 'float32', '0.seeds': 'int64', '0.scale': 'float32'}

    Args:
        bits: 32 leaves everything as it is. 16 makes floating tensors float16, but for those whose numbers are too
            large for it. 8 makes vectors int8 with one float32 step each, and the others, and the running
            statistics of norms, float16. Seeds, and the one scale of each matrix, stay what they are. The counter
            of a batch norm's batches takes part in nothing and is left out.

    Raises:
        RbeError: the bits are not offered, a layer is open, or a number that needs 8 bits is not finite.
    """
    if bits not in BITS:
        raise RbeError(f"pack: bits {bits!r} are not offered; choose one of {', '.join(map(str, BITS))}")
    for name, module in model.named_modules():
        if isinstance(module, Seeded | Stream) and module.trainable:
            raise RbeError(f"pack: the seeds of {name or 'the model'} are open; call .freeze() first")
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(_COUNTER):
            continue
        out[name] = tensor
        if bits == 32 or not tensor.is_floating_point() or tensor.ndim == 0:
            continue
        if bits == 8 and tensor.ndim == 1 and not name.endswith(_FINE):
            if not bool(torch.isfinite(tensor).all()):
                raise RbeError(
                    f"pack: {name} has numbers that are not finite; train with a lower rate, or give 16 bits"
                )
            step = tensor.abs().max().float() / 127
            codes = torch.where(step > 0, tensor.float() / step, 0.0).round()
            out[name], out[name + STEP] = codes.clamp(-127, 127).to(torch.int8), step
        elif tensor.abs().max() <= _FAR or not tensor.numel():
            out[name] = tensor.to(torch.float16)
    return out


def unpack(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Fill a model with what `pack` made; its tensors keep the dtypes that they have.

    >>> layer = Linear(16, 8, format="outer128").freeze()
    >>> unpack(layer, pack(layer, bits=8))

    Raises:
        RbeError: a tensor is missing, has no place in the model, or has another shape.
    """
    state = {}
    for name, tensor in stored.items():
        if not name.endswith(STEP) or name.removesuffix(STEP) not in stored:
            step = stored.get(name + STEP)
            state[name] = tensor if step is None else tensor.float() * step
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as cause:
        raise RbeError(f"unpack: the tensors are not of this model ({cause}); fold_norms() comes before it") from cause
    missing = [name for name in missing if not name.endswith(_COUNTER)]
    if missing or unexpected:
        raise RbeError(
            f"unpack: {', '.join(missing) or 'nothing'} missing, {', '.join(unexpected) or 'nothing'} too much; the "
            "model must be built as the stored one was, fold_norms() included"
        )


def round_rest(model: nn.Module, bits: int = 16) -> dict[str, Tensor]:
    """Fold norms, then put everything beside the seeds on the grid of `pack`; in place.

    >>> model = nn.Sequential(Linear(16, 8, format="outer128").freeze(), nn.BatchNorm1d(8)).eval()
    >>> stored = round_rest(model, bits=16)
    >>> stored_bytes(stored)  # a seed of 16, a scale of 4, and a factor and a bias of two for each of 8 rows
    52

    Returns:
        what a file is to hold; see `pack`, which also says what is refused.
    """
    fold_norms(model)
    stored = pack(model, bits)
    unpack(model, stored)
    return stored


def stored_bytes(stored: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of `pack`.

    >>> stored_bytes({"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros((), dtype=torch.float32)})
    7
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
