"""Layers of streams in a model: what a file says about them, and how a loader finds their places again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from rbe.errors import CorruptFile, RbeError
from rbe.formats import stream
from rbe.nn.stream import Stream, StreamConv2d, StreamEmbedding, StreamLinear
from rbe.nn.stream_lstm import StreamLSTM


@dataclass(frozen=True)
class Form:
    """How the seed of a stream is read, and which dense tensors it stands for.

    >>> form = Form("linear", (4, 3), 1, True, "a.weight", (4, 3), "a.bias")
    >>> Form.from_json(form.to_json()) == form
    True

    Attributes:
        kind: "linear", "conv", "embedding" or "recurrent".
        shape, cells, bias: as in `rbe.nn.Stream`.
        tensor, sides: name and shape of the dense weight; offset: name of the dense bias, empty where there is none.
    """

    kind: str
    shape: tuple[int, int]
    cells: int
    bias: bool
    tensor: str
    sides: tuple[int, ...]
    offset: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON, with the version of the format."""
        return {**asdict(self), "shape": list(self.shape), "sides": list(self.sides), "version": stream.VERSION}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Form":
        """The inverse of `to_json`.

        Raises:
            RbeError: the seed is of another version of the format.
            CorruptFile: the entry makes no sense.
        """
        # Version 0 was the same, before it was promised to stay so.
        if entry["version"] not in (0, stream.VERSION):
            raise RbeError(
                f"a stream is of version {entry['version']} of its format, this rbe reads {stream.VERSION}: "
                "install the rbe that wrote it, or train again"
            )
        shape, sides = tuple(entry["shape"]), tuple(entry["sides"])
        whole = all(type(number) is int and 0 < number < 1 << 31 for number in (*shape, *sides, entry["cells"]))
        names = all(isinstance(entry[name], str) for name in ("kind", "tensor", "offset"))
        if not whole or not names or type(entry["bias"]) is not bool or bool(entry["offset"]) != entry["bias"]:
            raise CorruptFile(f"a stream is described as {dict(entry)}, which makes no sense; fetch the folder again")
        form = cls(entry["kind"], shape, entry["cells"], entry["bias"], entry["tensor"], sides, entry["offset"])
        try:
            stream.check_shape(shape, form.cells)
            torch.empty(sides, device="meta").view(shape)
        except RuntimeError as cause:
            raise CorruptFile(f"a weight of shape {sides} is no {shape} matrix; fetch the folder again") from cause
        return form

    @property
    def weights(self) -> int:
        """Of the matrix, the bias counted."""
        return self.shape[0] * (self.shape[1] + self.bias)


def describe_streams(model: nn.Module) -> dict[str, Form]:
    """The form of every stream, by its path.

    >>> describe_streams(nn.Sequential(StreamLinear(4, 3)))["0"].tensor
    '0.weight'
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Stream):
            place, _, leaf = path.rpartition(".")
            recurrent = isinstance(model.get_submodule(place), StreamLSTM)
            prefix = f"{place}." if place else ""
            weight, bias = (f"{prefix}{what}_{leaf}" if recurrent else f"{path}.{what}" for what in ("weight", "bias"))
            kind = "recurrent" if recurrent else _KINDS[type(module)]
            own = module.shape, module.cells, module.bias
            found[path] = Form(kind, *own, weight, module.sides, bias if module.bias else "")
    return found


_KINDS: dict[type[Stream], str] = {StreamLinear: "linear", StreamConv2d: "conv", StreamEmbedding: "embedding"}


def check_stream(model: nn.Module, path: str, form: Form) -> None:
    """Refuse a model that has no place for a stream.

    Raises:
        RbeError: there is no such layer, or it is another one.
    """
    parts = dict(model.named_modules())
    place, _, leaf = path.rpartition(".")
    old, parent = parts.get(path), parts.get(place)
    if isinstance(old, Stream):
        has: tuple[Any, ...] = (old.shape, old.cells, old.bias)
        wanted: tuple[Any, ...] = (form.shape, form.cells, form.bias)
    elif isinstance(parent, nn.LSTM) and f"weight_{leaf}" in parent._parameters:
        has = tuple(parent.get_parameter(f"weight_{leaf}").shape), parent.bias and leaf.startswith("ih")
        wanted = form.shape, form.bias
    elif isinstance(old, nn.Linear | nn.Embedding) or (isinstance(old, nn.Conv2d) and _is_plain(old)):
        has = (old.weight.shape[0], old.weight[0].numel()), getattr(old, "bias", None) is not None
        wanted = form.shape, form.bias
    else:
        what = "no such layer" if old is None else f"a {type(old).__name__} there"
        raise RbeError(f"load: the folder holds a stream for {path}, but the given model has {what}")
    if has != wanted:
        raise RbeError(
            f"load: {path} is {has} in the given model, but {wanted} in the folder; build the model as it was saved"
        )


def _is_plain(old: nn.Conv2d) -> bool:
    return old.groups == 1 and set(old.dilation) == {1} and old.padding_mode == "zeros"


def place_stream(model: nn.Module, path: str, form: Form) -> None:
    """Put an unfilled frozen stream where a layer stands that `check_stream` has passed."""
    place, _, _ = path.rpartition(".")
    parent = model.get_submodule(place)
    if isinstance(parent, nn.LSTM):
        sizes = parent.input_size, parent.hidden_size, parent.num_layers
        with torch.device("meta"):
            new: nn.Module = StreamLSTM(*sizes, parent.bias, parent.batch_first, parent.dropout, parent.bidirectional)
        _take_place(model, parent, new)
    old = model.get_submodule(path)
    if not isinstance(old, Stream):
        with torch.device("meta"):
            new = _like(old, form)
        _take_place(model, old, new)
    layer = model.get_submodule(path)
    assert isinstance(layer, Stream)
    layer.shut()


def _like(old: nn.Module, form: Form) -> Stream:
    if isinstance(old, nn.Embedding):
        return StreamEmbedding(old.num_embeddings, old.embedding_dim)
    if isinstance(old, nn.Conv2d):
        kernel, stride = (old.kernel_size[0], old.kernel_size[1]), (old.stride[0], old.stride[1])
        return StreamConv2d(old.in_channels, old.out_channels, kernel, stride, old.padding, form.bias)  # type: ignore[arg-type]
    return StreamLinear(form.shape[1], form.shape[0], form.bias, cells=form.cells)


def _take_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that the old layer has."""
    new.training = old.training
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
