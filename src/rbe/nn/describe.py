"""What a file says about the seed layers of a model, and their tensors as files hold them."""

from typing import Any

from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.nn.conv import Conv1d, Conv2d, Convolution
from rbe.nn.embedding import Embedding
from rbe.nn.norm import Affine
from rbe.nn.recurrent import Recurrent
from rbe.nn.seeded import Seeded, SeededVector
from rbe.nn.stream import Stream
from rbe.shards import dtype_name


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as files hold it: the seeds of open layers and streams packed.

    >>> from rbe.nn import Linear
    >>> sorted(packed_state(nn.Sequential(Linear(32, 32, bias=False, format="packed128"))))
    ['0.scale', '0.seeds']

    Raises:
        RbeError: a radius was trained out of [0, 1), or a number is not finite.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    packed: dict[int, SeedMatrix] = {}
    streams: dict[int, dict[str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Stream) and module.trainable:
            prefix = f"{path}." if path else ""
            if id(module) not in streams:
                streams[id(module)] = {"seed": module.pack(), "scale": module.log_scale.detach().exp()}
            del state[f"{prefix}latent"], state[f"{prefix}log_scale"]
            state.update({f"{prefix}{name}": tensor for name, tensor in streams[id(module)].items()})
        if not isinstance(module, Seeded) or module.owner is not module or not module.trainable:
            continue
        prefix = f"{path}." if path else ""
        try:
            matrix = packed.setdefault(id(module), module.matrix)
        except RbeError as cause:
            raise RbeError(f"{path or 'model'}: {cause}") from cause
        for name in module.opened:
            del state[f"{prefix}{name}"]
        state.update({f"{prefix}{name}": tensor for name, tensor in matrix.to_tensors().items()})
    return state


def _kind(module: Seeded, parent: nn.Module) -> str:
    kinds = {SeededVector: "vector", Embedding: "embedding", Conv1d: "conv", Conv2d: "conv"}
    return "recurrent" if isinstance(parent, Recurrent) else kinds.get(type(module), "linear")


def _original(path: str, module: Seeded, model: nn.Module) -> dict[str, Any]:
    """What the dense tensor that a layer stands for is, where it is not the matrix `<path>.weight`."""
    place, _, leaf = path.rpartition(".")
    parent = model.get_submodule(place)
    if isinstance(module, SeededVector):
        sides = parent.shape if isinstance(parent, Affine) else module.spec.shape[:1]
        gain = isinstance(parent, Affine) and leaf == "weight_seed" and not parent.printed
        name = dense_name(path.removesuffix("_seed"), model)
        return {"tensor": name, "sides": list(sides), **({"offset": 1.0} if gain else {})}
    if isinstance(module, Convolution):
        return {"sides": list(module.weight_shape)}
    name = dense_name(f"{path}.weight", model)
    return {} if name == f"{path}.weight" else {"tensor": name}


def dense_name(name: str, model: nn.Module) -> str:
    """The name that a dense tensor of a model in seeds has in the dense model: recurrent layers have them flat.

    >>> from rbe.nn import LSTM
    >>> dense_name("0.ih_l0.bias", nn.Sequential(LSTM(16, 16)))
    '0.bias_ih_l0'
    """
    *layer, part, leaf = ["", *name.split(".")]
    place = ".".join(layer[1:])
    if not layer or not isinstance(model.get_submodule(place), Recurrent):
        return name
    return f"{place}.{leaf}_{part}".removeprefix(".")


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a loader must know to rebuild the seed layers: for every owner's path a JSON-ready entry.

    >>> from rbe.nn import Linear
    >>> describe(nn.Sequential(Linear(16, 16)))["0"]["kind"]
    'linear'

    Returns:
        {path: {"spec", "kind", "row_scale", "transposed", "dtype", "tied"}}; dtype is that of the virtual weight, tied
        are the paths that share the owner's seeds. Where the dense tensor is not a matrix `<path>.weight`, its name is
        "tensor" and its shape "sides".
    """
    paths: dict[int, list[str]] = {}
    modules: dict[int, Seeded] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Seeded):
            paths.setdefault(id(module.owner), []).append(path)
            if module.owner is module:
                modules.setdefault(id(module), module)
    entries = {}
    for key, owner in modules.items():
        own = [path for path in paths[key] if model.get_submodule(path) is owner]
        entries[own[0]] = {
            "spec": owner.spec.to_json(),
            "kind": _kind(owner, model.get_submodule(own[0].rpartition(".")[0])),
            "row_scale": owner.row_scale is not None,
            "transposed": owner.transposed,
            "dtype": dtype_name(owner.weight_dtype),
            "tied": [path for path in paths[key] if path != own[0]],
            **({} if owner.outlier_index is None else {"outliers": len(owner.outlier_index)}),
            **_original(own[0], owner, model),
        }
    return entries
