"""Matrices of a folder that are streams: what config.json says about each, and what its bytes make."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rbe.errors import CorruptFile, RbeError
from rbe.kernels import stream
from rbe.nn.streams import Form
from rbe.shards import Stored

# In quantization_config, beside the modules in blocks.
STREAMS = "streams"


def forms(config: Mapping[str, Any]) -> dict[str, Form]:
    """The form of every stream of a folder, by the name of its module.

    Raises:
        RbeError: one is of another version.
        CorruptFile: an entry makes no sense.
    """
    return {name: Form.from_json(entry) for name, entry in config["quantization_config"].get(STREAMS, {}).items()}


def names(module: str) -> tuple[str, str]:
    """Of the seed and the scale of a module."""
    return f"{module}.seed", f"{module}.scale"


def check_headers(module: str, tensors: Mapping[str, Stored]) -> None:
    """Refuse tensors that cannot be a seed and a scale.

    Raises:
        CorruptFile: one is missing, or has another dtype or shape.
    """
    seed, scale = (tensors.get(name) for name in names(module))
    if seed is None or (seed.dtype, len(seed.shape)) != ("U8", 1):
        raise CorruptFile(f"{module}.seed should be there as U8 in a row; fetch the folder again")
    if scale is None or (scale.dtype, scale.shape) != ("F32", ()):
        raise CorruptFile(f"{module}.scale should be there as F32; fetch the folder again")


def dense(module: str, form: Form, tensors: Mapping[str, Stored]) -> tuple[Tensor, Tensor | None]:
    """(weight, bias or None) that a stream stands for, float32.

    Raises:
        CorruptFile: the bytes are no seed of this form, or the scale is no number.
    """
    seed, scale = (tensors[name].read() for name in names(module))
    if not torch.isfinite(scale):
        raise CorruptFile(f"{module}.scale is {scale.item()}; fetch the folder again")
    try:
        levels = stream.unpack(seed, form.shape, cells=form.cells, bias=form.bias)
    except RbeError as cause:
        raise CorruptFile(f"{module}: {cause}") from cause
    whole = levels.float() * scale
    return whole[:, : form.shape[1]].reshape(form.sides), whole[:, -1].contiguous() if form.bias else None
