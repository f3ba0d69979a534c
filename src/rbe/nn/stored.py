"""Stored tensors on their way into a layer: what may come in, and how points of more digits do."""

from typing import Any

import torch
from torch import Tensor

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, outer128
from rbe.nn.latents import LATENT


def rounded(radius: Tensor) -> Tensor:
    """Radii as float32, which would round those next to the rim to 1; what is no radius stays none.

    >>> (1 - rounded(torch.tensor([1 - 2.0**-32, 2.0], dtype=torch.float64))).tolist() == [2.0**-24, -1.0]
    True
    """
    nearest = radius.to(torch.float32)
    return torch.where(radius < 1, nearest.clamp_max(1 - 2.0**-24), nearest)


def check_stored(spec: SeedSpec, seeds: Tensor | None, scale: Tensor | None, row_scale: Tensor | None) -> None:
    """Refuse seeds that stand for no weights, and scales that are no numbers.

    What is absent or has no values yet passes, and seeds of another shape do, which the loader refuses by itself.

    Raises:
        RbeError: a value is none.
    """
    fits = seeds is not None and seeds.dtype == torch.int64 and tuple(seeds.shape) == formats.seeds_shape(spec)
    if seeds is not None and fits and not seeds.is_meta:
        formats.get(spec.format).check_seeds(seeds, spec)
    for name, factor in (("scale", scale), ("row_scale", row_scale)):
        if factor is not None and not factor.is_meta and not bool(torch.isfinite(factor).all()):
            raise RbeError(f"{name} is NaN or infinite; the source is damaged, or training had diverged")


def convert_state(state_dict: dict[str, Any], prefix: str, spec: SeedSpec, trainable: bool) -> None:
    """A state of frozen seeds opens for an open layer, and an open one packs for a frozen layer; in place."""
    definition = formats.disk(spec.format)
    if trainable and f"{prefix}seeds" in state_dict:
        code, radius, angle = definition.split(state_dict.pop(f"{prefix}seeds"), spec)
        bits = {"latent": LATENT * outer128.sign_bits(code, spec)} if definition.SIGNS else {"code": code}
        for name, part in {**bits, "radius": rounded(radius), "angle": angle}.items():
            state_dict[f"{prefix}{name}"] = part
    elif not trainable and all(f"{prefix}{name}" in state_dict for name in ("radius", "angle")):
        name = "latent" if definition.SIGNS else "code"
        code, radius, angle = (state_dict.pop(f"{prefix}{name}") for name in (name, "radius", "angle"))
        code = outer128.code_of(code, spec) if definition.SIGNS else code
        state_dict[f"{prefix}seeds"] = definition.join(code, radius, angle, spec)
