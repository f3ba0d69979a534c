"""Which weights of a model seeds could hold, and what shares them; nothing is changed here."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "embedding", "conv", "recurrent", "keep"]


@dataclass(frozen=True)
class Site:
    """One weight that seeds could hold, with everything that shares it.

    Attributes:
        module: path of the module that will own the seeds.
        kind: "linear", "embedding", "conv", "recurrent", or "keep" where it stays dense.
        shape: (rows, columns) = (out, in) of the matrix, whatever the layer's own layout; of a kernel all sides but the
            first are its columns.
        transposed: the layer stores (in, out).
        shared: paths of the other modules that use the same weight: the same module again, or one tied to it.
        reason: why it is kept; empty otherwise.
        group: path of the recurrent layer whose matrices can only be replaced together; empty for other layers.
    """

    module: str
    kind: Kind
    shape: tuple[int, int]
    transposed: bool = False
    shared: tuple[str, ...] = ()
    reason: str = ""
    group: str = ""

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
        if self.group or self.module.startswith("."):  # of a recurrent layer that may be the whole model
            return (f"{self.group}.weight_{self.module.rpartition('.')[2]}".removeprefix("."),)
        return tuple(f"{path}.weight".removeprefix(".") for path in self.names)


def _role(module: nn.Module) -> tuple[Kind, bool, str] | None:
    """(kind, transposed, reason to keep) of a layer with a weight of two sides or more, None for everything else."""
    weight = module._parameters.get("weight")
    name = type(module).__name__
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    if not isinstance(module, known) and not (name == "Conv1D" and hasattr(module, "nf")):
        return None
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return "keep", False, "its weight is not a plain parameter (parametrized, hooked or lazy)"
    if name == "NonDynamicallyQuantizableLinear":
        return "keep", False, "torch's MultiheadAttention multiplies by this weight outside of the layer"
    if type(module) is nn.Linear:
        return "linear", False, ""
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return "conv", False, ""
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
    if multiplier(module) is not None:
        return "embedding", False, ""
    return "keep", False, f"{name} computes something of its own around the weight"


def multiplier(module: nn.Module) -> tuple[float, bool] | None:
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
    rows, *others = (int(side) for side in weight.shape)
    return (math.prod(others), rows) if transposed else (rows, math.prod(others))


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
        if reason and (weight is None or weight.ndim < 2):
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
        elif kind == "conv" and len({id(layer) for _, layer in layers}) > 1:
            reason = "it is the kernel of several layers"
        elif min(shape) == 0:
            reason = "it is empty"
        elif any(matches(path, exclude) for path in (owner, *shared)):
            reason = "excluded"
        elif include and not any(matches(path, include) for path in (owner, *shared)):
            reason = "not included"
        sites.append(Site(owner, "keep" if reason else kind, shape, transposed, shared, reason))
    return [*sites, *_recurrent(model, include, exclude)]


def _recurrent(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Site]:
    """The matrices of torch's LSTM and GRU layers."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) in (nn.LSTM, nn.GRU):
            places.setdefault(id(module), []).append(path)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.LSTM, nn.GRU)):
            continue
        weights = {n: p for n, p in module._parameters.items() if p is not None and n.startswith("weight_")}
        for name, weight in weights.items():
            site = Site(f"{path}.{name.removeprefix('weight_')}", "recurrent", tuple(weight.shape), group=path)  # type: ignore[arg-type]
            reason = ""
            if type(module) not in (nn.LSTM, nn.GRU):
                reason = f"{type(module).__name__} computes something of its own around the weight"
            elif module.proj_size:
                reason = "an LSTM with projections has no seed layer"
            elif len(weights) != (1 + module.bidirectional) * 2 * module.num_layers:
                reason = "a weight of its layer is not a plain parameter (parametrized or hooked)"
            elif not path:
                reason = "it is the whole model; use rbe.nn.convert_layer instead"
            elif len(places[id(module)]) > 1 or any(uses[id(p)] > 1 for p in module._parameters.values()):
                reason = "its layer shares weights with another"
            elif any(matches(name, exclude) for name in (site.module, *site.tensors)):
                reason = "excluded"
            elif include and not any(matches(name, include) for name in (site.module, *site.tensors)):
                reason = "not included"
            yield replace(site, kind="keep", reason=reason) if reason else site


def dense(model: nn.Module, site: Site) -> Tensor:
    """The dense (rows, columns) weight of a site, detached, as the layers hold it."""
    path, _, name = site.tensor.rpartition(".")
    weight: Tensor = model.get_submodule(path)._parameters[name]  # type: ignore[assignment]
    return weight.detach().T if site.transposed else weight.detach().flatten(1)
