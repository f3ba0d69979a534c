"""Find the layers of a model that can hold seeds, put seed layers in their place, and take them out again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn.embedding import Embedding
from rbe.nn.linear import Linear
from rbe.nn.seeded import Seeded, SeededVector
from rbe.shards import dtype_name

Kind = Literal["linear", "embedding", "conv", "recurrent", "keep"]
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Site:
    """One weight that seeds could hold, with everything that shares it.

    Attributes:
        module: path of the module that will own the seeds.
        kind: "linear", "embedding", or "keep" where it stays dense.
        shape: (rows, columns) = (out, in) of the matrix, whatever the layer's own layout.
        transposed: the layer stores (in, out).
        shared: paths of the other modules that use the same weight: the same module again, or one tied to it.
        reason: why it is kept; empty otherwise.
    """

    module: str
    kind: Kind
    shape: tuple[int, int]
    transposed: bool = False
    shared: tuple[str, ...] = ()
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every path, the owner's first."""
        return (self.module, *self.shared)

    @property
    def tensor(self) -> str:
        """Name of the dense weight."""
        return self.tensors[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every name of the dense weight, the owner's first."""
        return self.names if self.kind == "recurrent" else tuple(f"{path}.weight" for path in self.names)


def _role(module: nn.Module) -> tuple[Kind, bool, str] | None:
    """(kind, transposed, reason to keep) of a layer with a two-sided weight, None for everything else."""
    weight = module._parameters.get("weight")
    name = type(module).__name__
    if not isinstance(module, (nn.Linear, nn.Embedding)) and not (name == "Conv1D" and hasattr(module, "nf")):
        return None
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return "keep", False, "its weight is not a plain parameter (parametrized, hooked or lazy)"
    if name == "NonDynamicallyQuantizableLinear":
        return "keep", False, "torch's MultiheadAttention multiplies by this weight outside of the layer"
    if type(module) is nn.Linear:
        return "linear", False, ""
    if type(module) is nn.Embedding:
        options = [
            option
            for option, active in (
                ("max_norm", module.max_norm is not None),
                ("sparse", module.sparse),
                ("scale_grad_by_freq", module.scale_grad_by_freq),
            )
            if active
        ]
        return "embedding", False, f"an Embedding with {', '.join(options)} changes its own table" if options else ""
    if name == "Conv1D":
        return "linear", True, ""
    if _multiplier(module) is not None:
        return "embedding", False, ""
    return "keep", False, f"{name} computes something of its own around the weight"


def _multiplier(module: nn.Module) -> tuple[float, bool] | None:
    """(factor, whether it is rounded to the rows' dtype) of transformers' scaled word embeddings, None for the rest."""
    kind = type(module)
    if not (kind.__module__.startswith("transformers.") and kind.__name__.endswith("ScaledWordEmbedding")):
        return None
    rounds = isinstance(module.embed_scale, Tensor)
    factor = getattr(module, "scalar_embed_scale" if rounds else "embed_scale", None)
    return None if factor is None else (float(factor), rounds)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module path, or its weight's name, fits one of the shell patterns.

    >>> matches("encoder.layer.0.query", ["*.query"]), matches("encoder.layer.0.query", ["encoder.layer.1.*"])
    (True, False)
    """
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern) for pattern in patterns)


def _groups(model: nn.Module) -> Iterator[list[tuple[str, nn.Module | None]]]:
    """For every weight that seeds could hold: all (module path, module) that use it; None for an unknown user."""
    declared: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    groups: dict[int, list[tuple[str, nn.Module | None]]] = {}
    key_of: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            # transformers ties by declaration while its models are on the meta device.
            key = key_of.get(declared.get(full, ""), id(parameter))
            for other, source in declared.items():
                if source == full and other in key_of:
                    key = key_of[other]
            key_of[full] = key
            user = module if name == "weight" and _role(module) is not None else None
            groups.setdefault(key, []).append((path if user is not None else full, user))
    for users in groups.values():
        if any(module is not None for _, module in users):
            yield users


def _shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    weight = module._parameters["weight"]
    assert weight is not None
    rows, columns = (int(side) for side in weight.shape)
    return (columns, rows) if transposed else (rows, columns)


def find(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Site]:
    """Every weight of a model that seeds could hold, in the model's order; nothing is changed or encoded.

    >>> [(site.module, site.kind) for site in find(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))]
    [('0', 'linear'), ('2', 'linear')]

    Args:
        model: any torch module; one on the meta device will do.
        include: shell patterns of module paths; when given, everything else is kept.
        exclude: shell patterns of module paths that are kept.

    Returns:
        one `Site` a weight, those to be kept with their reason.
    """
    sites = []
    for users in _groups(model):
        layers = [(path, module) for path, module in users if module is not None]
        # An embedding owns what a head shares with it: its rows must be generated one by one.
        layers.sort(key=lambda user: not isinstance(user[1], nn.Embedding))
        owner, module = layers[0]
        roles = [role for _, layer in layers if (role := _role(layer)) is not None]
        kind, transposed, _ = roles[0]
        shared = tuple(path for path, _ in layers[1:])
        strangers = [path for path, layer in users if layer is None]
        reason = next((why for _, _, why in roles if why), "")
        weight = module._parameters.get("weight")
        if reason and (weight is None or weight.ndim != 2):
            continue
        shape = _shape(module, transposed)
        if reason:
            pass
        elif owner == "" or "" in shared:
            reason = "it is the whole model; build rbe.nn.Linear.from_matrix(rbe.encode(weight), bias) instead"
        elif strangers:
            reason = f"{strangers[0]} uses the same weight in a way that is not known"
        elif len({layout for _, layout, _ in roles}) > 1:
            reason = "it is shared between layers of opposite layout"
        elif min(shape) == 0:
            reason = "it is empty"
        elif any(matches(path, exclude) for path in (owner, *shared)):
            reason = "excluded"
        elif include and not any(matches(path, include) for path in (owner, *shared)):
            reason = "not included"
        sites.append(Site(owner, "keep" if reason else kind, shape, transposed, shared, reason))
    return sites


def dense(model: nn.Module, site: Site) -> Tensor:
    """The dense (rows, columns) weight of a site, detached, as the layers hold it."""
    weight: Tensor = model.get_submodule(site.module)._parameters["weight"]  # type: ignore[assignment]
    return weight.detach().T if site.transposed else weight.detach()


def place(model: nn.Module, site: Site, spec: SeedSpec, row_scale: bool) -> list[Seeded]:
    """Put unfilled seed layers on the meta device in place of a site's layers, for a loader to fill.

    Returns:
        the new modules, the owner first.
    """
    return _put(model, site, spec, row_scale, None)


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
    built: dict[int, Seeded] = {}
    for path in site.names:
        old = model.get_submodule(path)
        if id(old) not in built:
            owner = next(iter(built.values()), None)
            built[id(old)] = _like(old, spec, row_scale, site.transposed, owner)
            if owner is None and matrix is not None:
                built[id(old)]._adopt(matrix)
        _set(model, path, built[id(old)])
    _forget_ties(model)
    return list(built.values())


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
        scaled = _multiplier(old)
        if scaled is not None:
            new.multiply_rows(*scaled, type(old))
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
    if not isinstance(parent, Linear) or not path.endswith("bias_seed"):
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
        for name in ("code", "radius", "angle", "scale"):
            delattr(module, name)
        words = (module.spec.blocks, formats.get(module.spec.format).words(module.spec))
        module.register_buffer("seeds", torch.empty(words, dtype=torch.int64, device="meta"))
        module.register_buffer("scale", torch.empty((), dtype=torch.float32, device="meta"))
        module._prepared = None


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as files hold it: the seeds of open layers packed.

    >>> sorted(packed_state(nn.Sequential(Linear(32, 32, bias=False, format="packed128"))))
    ['0.scale', '0.seeds']

    Raises:
        RbeError: a radius was trained out of [0, 1), or a number is not finite.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    packed: dict[int, SeedMatrix] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Seeded) or module.owner is not module or not module.trainable:
            continue
        prefix = f"{path}." if path else ""
        try:
            matrix = packed.setdefault(id(module), module.matrix)
        except RbeError as cause:
            raise RbeError(f"{path or 'model'}: {cause}") from cause
        for name in ("code", "radius", "angle"):
            del state[f"{prefix}{name}"]
        state.update({f"{prefix}{name}": tensor for name, tensor in matrix.to_tensors().items()})
    return state


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
        if not isinstance(module, Seeded) or isinstance(module, SeededVector):  # a layer takes its vectors with it
            continue
        if id(module) not in layers:
            owner = id(module.owner)
            if owner not in weights:
                weight = module.owner.weight
                weights[owner] = nn.Parameter(weight.to(dtype or weight.dtype).contiguous())
            layers[id(module)] = _dense_layer(module, weights[owner], dtype)
        _set(model, path, layers[id(module)])
    for module in model.modules():
        if isinstance(module.__dict__.get("_tied_weights_keys"), dict):
            del module._tied_weights_keys
            expand: Any = getattr(module, "get_expanded_tied_weights_keys", None)
            if expand is not None:
                module.all_tied_weights_keys = expand(all_submodels=True)
    return model


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
    else:
        new = nn.Linear(columns, rows, bias=False, device="meta")
    new.weight = weight
    if isinstance(module, Linear):
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


def _kind(module: Seeded) -> str:
    if isinstance(module, SeededVector):
        return "vector"
    return "embedding" if isinstance(module, Embedding) else "linear"


def _original(path: str, module: Seeded) -> dict[str, Any]:
    """Name and shape of the dense tensor that a layer stands for, where they are not the usual ones."""
    if isinstance(module, SeededVector):
        return {"tensor": path.removesuffix("_seed"), "sides": [module.spec.shape[0]]}
    return {}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a loader must know to rebuild the seed layers: for every owner's path a JSON-ready entry.

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
            "kind": _kind(owner),
            "row_scale": owner.row_scale is not None,
            "transposed": owner.transposed,
            "dtype": dtype_name(owner.weight_dtype),
            "tied": [path for path in paths[key] if path != own[0]],
            **_original(own[0], owner),
        }
    return entries
