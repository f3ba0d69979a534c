"""Put seed layers in place of the layers of a model, and take them out again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.conv import Conv1d, Conv2d, Convolution
from rbe.nn.describe import dense_name, describe, packed_state
from rbe.nn.embedding import Embedding
from rbe.nn.linear import Linear
from rbe.nn.norm import Affine
from rbe.nn.recurrent import GRU, LSTM, Recurrent
from rbe.nn.seeded import Seeded, SeededVector
from rbe.nn.sites import Kind, Site, dense, find, matches, multiplier

__all__ = [
    "Kind",
    "Site",
    "decompress_",
    "dense",
    "dense_name",
    "describe",
    "find",
    "matches",
    "packed_state",
    "place",
    "place_vector",
    "replace",
    "room_for_outliers",
    "shut",
]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def place(model: nn.Module, site: Site, spec: SeedSpec, row_scale: bool, outliers: int = 0) -> list[Seeded]:
    """Put unfilled seed layers on the meta device in place of a site's layers, for a loader to fill.

    Returns:
        the new modules, the owner first.
    """
    new = _put(model, site, spec, row_scale, None)
    room_for_outliers(new[0], outliers)
    return new


def room_for_outliers(module: Seeded, count: int) -> None:
    """Buffers for so many outliers, for a loader to fill."""
    sides = (count,) if count else None
    for name, dtype in (("outlier_index", torch.int32), ("outlier_values", torch.float16)):
        module.register_buffer(name, None if sides is None else torch.empty(sides, dtype=dtype, device="meta"))


def replace(model: nn.Module, site: Site, matrix: SeedMatrix) -> list[Seeded]:
    """Put seed layers around an encoded matrix in place of a site's layers.

    >>> from rbe.matrix import SeedMatrix
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> zero = SeedMatrix.from_seeds(torch.zeros(1, 8, dtype=torch.int64), (16, 16), "trellis", scale=0.0)
    >>> replace(model, find(model)[0], zero)[0] is model[0], bool((model(torch.ones(16)) == model[0].bias).all())
    (True, True)

    Returns:
        the new modules, the owner first.

    Raises:
        RbeError: the matrix has another shape.
    """
    return _put(model, site, matrix.spec, matrix.row_scale is not None, matrix)


def _put(model: nn.Module, site: Site, spec: SeedSpec, row_scale: bool, matrix: SeedMatrix | None) -> list[Seeded]:
    if spec.shape != site.shape:
        raise RbeError(f"{site.module}: the layer is {site.shape}, but the seeds make {spec.shape}")
    if site.group:
        _unfold(model, site.group)
    built: dict[int, Seeded] = {}
    for path in site.names:
        old = model.get_submodule(path)
        if id(old) not in built:
            owner = next(iter(built.values()), None)
            built[id(old)] = _like(old, spec, row_scale, site.transposed, owner)
            if owner is None and matrix is not None:
                built[id(old)]._adopt(matrix)
                weight = old._parameters["weight"]
                if weight is not None and not weight.is_meta:
                    built[id(old)].to(weight.device)
        _set(model, path, built[id(old)])
    _forget_ties(model)
    return list(built.values())


def _unfold(model: nn.Module, path: str) -> None:
    """Put a recurrent layer of ours, its parts still dense, in place of torch's."""
    old = model.get_submodule(path)
    if not isinstance(old, nn.RNNBase):
        return
    kind = LSTM if isinstance(old, nn.LSTM) else GRU
    new = kind.__new__(kind)
    new._arrange(old.input_size, old.hidden_size, old.num_layers, old.batch_first, old.dropout, old.bidirectional)
    for name, _ in new._parts():
        part = nn.Linear(1, 1, bias=False, device="meta")
        part.register_parameter("weight", old._parameters[f"weight_{name}"])
        part.register_parameter("bias", old._parameters.get(f"bias_{name}"))
        part.training = old.training
        setattr(new, name, part)
    new.training = old.training
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    _set(model, path, new)


def _like(old: nn.Module, spec: SeedSpec, row_scale: bool, transposed: bool, owner: Seeded | None) -> Seeded:
    """The unfilled seed layer that takes a dense layer's place, with its bias, mode and hooks."""
    weight = old._parameters["weight"]
    dtype = None if weight is None else weight.dtype
    new: Seeded
    if isinstance(old, nn.Embedding):
        padding = old.padding_idx
        if owner is None:
            new = Embedding.from_spec(spec, padding, row_scale=row_scale, device="meta", dtype=dtype)
        else:
            new = Embedding.tied(owner, padding)
        scaled = multiplier(old)
        if scaled is not None:
            new.multiply_rows(*scaled, type(old))
    elif isinstance(old, (nn.Conv1d, nn.Conv2d)):
        new = _convolution(old, spec, row_scale, dtype)
        if owner is not None:
            raise RbeError("a kernel is shared between layers, which seeds cannot be")
    else:
        if owner is None:
            new = Linear.from_spec(spec, False, row_scale=row_scale, transposed=transposed, device="meta", dtype=dtype)
        else:
            new = Linear.tied(owner)
        new.bias = old._parameters.get("bias")  # the very Parameter: it may be tied too
    new.training = old.training
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    return new


def _convolution(old: nn.Conv1d | nn.Conv2d, spec: SeedSpec, row_scale: bool, dtype: torch.dtype | None) -> Seeded:
    kind = Conv1d if isinstance(old, nn.Conv1d) else Conv2d
    new = kind.from_spec(
        spec,
        old.in_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        old.groups,
        False,
        old.padding_mode,
        row_scale=row_scale,
        device="meta",
        dtype=dtype,
    )
    new.bias = old._parameters.get("bias")
    return new


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, leaf, module)
    is_dense = not any(isinstance(child, Seeded) for child in parent.children())
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fused kernel would decode the weights on every call; without it the layer calls its children.
        kinds = {nn.functional.relu: 1, nn.functional.gelu: 2}
        parent.activation_relu_or_gelu = kinds.get(parent.activation, 0) if is_dense else 0
        for ancestor in _ancestors(model, parent_path):
            if isinstance(ancestor, nn.TransformerEncoder):  # only the fused kernel takes the nested tensors it makes
                before = ancestor.__dict__.setdefault("_dense_use_nested_tensor", ancestor.use_nested_tensor)
                ancestor.use_nested_tensor = is_dense and before


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def _forget_ties(model: nn.Module) -> None:
    """Take tied names that are no longer parameters out of transformers' bookkeeping: our modules tie themselves."""
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(tied, dict) or not tied:
            continue
        left = {target: source for target, source in tied.items() if _is_parameter(module, target, source)}
        if left != tied:
            module.all_tied_weights_keys = left  # type: ignore[assignment]
            module._tied_weights_keys = left  # type: ignore[assignment]  # shadows the class's list on this instance


def place_vector(model: nn.Module, path: str, spec: SeedSpec) -> None:
    """Put an unfilled vector on the meta device in place of the dense bias of a seed layer, for a loader to fill.

    Raises:
        RbeError: the layer cannot have one.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(parent, Linear | Convolution) or not path.endswith("bias_seed"):
        raise RbeError(f"{path}: the seeds of a vector cannot be put into {type(parent).__name__}")
    parent.bias = None
    parent.bias_seed = SeededVector(
        spec.shape[0],
        format=spec.format,
        mode=spec.mode,
        precision=spec.precision,
        stages=spec.stages,
        device="meta",
        dtype=parent.weight_dtype,
    )
    shut(parent.bias_seed)


def shut(module: Seeded) -> None:
    """Bring a layer into the state that files have, its tensors unfilled, for a loader to fill."""
    if module.trainable and module.owner is module:
        for name in (*module.opened, "scale"):
            delattr(module, name)
        words = (module.spec.blocks, formats.get(module.spec.format).words(module.spec))
        module.register_buffer("seeds", torch.empty(words, dtype=torch.int64, device="meta"))
        module.register_buffer("scale", torch.empty((), dtype=torch.float32, device="meta"))
        module._prepared = None


def _is_parameter(model: nn.Module, *names: str) -> bool:
    for name in names:
        path, _, leaf = name.rpartition(".")
        if model.get_submodule(path)._parameters.get(leaf) is None:
            return False
    return True


def decompress_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every seed layer, in place, by the ordinary dense layer that computes the same.

    Args:
        dtype: of the dense weights; by default each layer's own.

    Returns:
        the model.
    """
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Affine):
            _dense_affine(module, dtype)
        if not isinstance(module, Seeded) or isinstance(module, SeededVector):  # a layer takes its vectors with it
            continue
        if id(module) not in layers:
            owner = id(module.owner)
            if owner not in weights:
                weight = module.owner.weight
                weights[owner] = nn.Parameter(weight.to(dtype or weight.dtype).contiguous())
            layers[id(module)] = _dense_layer(module, weights[owner], dtype)
        _set(model, path, layers[id(module)])
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(module, Recurrent):
            _set(model, path, layers.setdefault(id(module), _dense_recurrent(module)))
    for module in model.modules():
        if isinstance(module.__dict__.get("_tied_weights_keys"), dict):
            del module._tied_weights_keys
            expand: Any = getattr(module, "get_expanded_tied_weights_keys", None)
            if expand is not None:
                module.all_tied_weights_keys = expand(all_submodels=True)
    return model


def _dense_affine(module: Affine, dtype: torch.dtype | None) -> None:
    """Give a norm dense parameters in place of its seeds."""
    with torch.no_grad():
        for name, values in (("weight", module.gain()), ("bias", module.shift())):
            if getattr(module, f"{name}_seed") is not None and values is not None:
                setattr(module, f"{name}_seed", None)
                setattr(module, name, nn.Parameter(values.to(dtype or values.dtype).clone()))


def _dense_recurrent(module: Recurrent) -> nn.Module:
    """torch's layer with the parts of one whose matrices are dense already."""
    parts: dict[str, Any] = {name: getattr(module, name) for name, _ in module._parts()}
    kind = nn.LSTM if isinstance(module, LSTM) else nn.GRU
    bias = any(part.bias is not None for part in parts.values())
    sizes = (module.input_size, module.hidden_size, module.num_layers)
    new = kind(*sizes, bias=bias, batch_first=module.batch_first, bidirectional=module.bidirectional, device="meta")
    new.dropout = module.dropout
    for name, part in parts.items():
        setattr(new, f"weight_{name}", part.weight)
        if bias:
            zeros = torch.zeros(part.weight.shape[0], dtype=part.weight.dtype, device=part.weight.device)
            setattr(new, f"bias_{name}", nn.Parameter(zeros) if part.bias is None else part.bias)
    new.training = module.training
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(module, hooks))
    return new


def _dense_layer(module: Seeded, weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Module:
    rows, columns = module.spec.shape
    new: Any
    if isinstance(module, Embedding) and module.dense_class is not None:
        new = module.dense_class(rows, columns, module.padding_idx, module.multiplier)
    elif isinstance(module, Embedding):
        new = nn.Embedding(rows, columns, module.padding_idx, _weight=weight.detach())
    elif module.transposed:
        from transformers.pytorch_utils import Conv1D  # only such a model has this layer

        new = Conv1D(rows, 0)  # type: ignore[no-untyped-call]
    elif isinstance(module, Convolution):
        new = (nn.Conv1d if isinstance(module, Conv1d) else nn.Conv2d)(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            False,
            module.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
    else:
        new = nn.Linear(columns, rows, bias=False, device="meta")
    new.weight = weight
    if isinstance(module, Linear | Convolution):
        bias = module.bias
        if module.bias_seed is not None:
            with torch.no_grad():
                bias = nn.Parameter(module.bias_seed().to(weight.dtype))
        if isinstance(bias, nn.Parameter) and dtype is not None:
            bias.data = bias.data.to(dtype)
        new.bias = bias
    if module.transposed:
        new.nx = columns
    new.training = module.training
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(module, hooks))
    return new  # type: ignore[no-any-return]
