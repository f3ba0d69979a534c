"""Where a fresh layer starts: random seeds whose weights have a wanted size."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from rbe import formats
from rbe.formats import SeedSpec, outer128, packed128

# Cells of a block that are generated to measure the size of random weights.
_SAMPLE = 64


def fresh_points(spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Random (code, radius, angle) for every block and stage, from torch's global generator.

    >>> code, radius, angle = fresh_points(formats.make_spec("packed128", (32, 32)))
    >>> code.shape, radius.shape, bool((radius < 1).all())
    (torch.Size([4, 1]), torch.Size([4, 1]), True)

    packed64 and packed128: radii are uniform over the area of a disk inside the rim, where every gradient is alive; the
    discrete bits are uniform, except that the amplitude stays away from 0 and, in faithful mode, alpha below 1: at
    alpha = 10 one block in four would be thousands of times the others. outer128: random signs, all terms as strong.

    Returns:
        code int64 (blocks, stages or 0); radius in [0.1, 0.9] and angle in [-pi, pi), float32 (blocks, stages).
    """
    shape = (spec.blocks, spec.stages)
    if spec.format == "outer128":
        two = outer128.terms(spec) == 2
        radius = torch.full(shape, math.tanh(0.5 * math.sqrt(2.0 if two else 1.0)))
        return torch.randint(-(1 << 63), (1 << 63) - 1, shape), radius, torch.full(shape, math.pi / 4 if two else 0.0)
    radius = (0.01 + 0.8 * torch.rand(shape)).sqrt()
    angle = (2.0 * torch.rand(shape) - 1.0) * math.pi
    if spec.format != "packed128":
        return torch.empty((spec.blocks, 0), dtype=torch.int64), radius, angle
    highest = 4096 if spec.mode == "radial" else 410
    amplitude = torch.randint(0, 1024, shape)
    code = packed128.code_of(
        quadrant=torch.randint(0, 4, shape),
        hyp_freq=torch.randint(1, highest, shape),
        geo_amp=torch.where(torch.rand(shape) < 0.5, amplitude, 4095 - amplitude),
        basis_sel=torch.randint(0, 64, shape),
        cordic_seq=torch.randint(0, 1 << 32, shape),
    )
    return code, radius, angle


def unit_scale(spec: SeedSpec, code: Tensor, radius: Tensor, angle: Tensor) -> float:
    """The scale that makes the root mean square of these weights 1, measured on some blocks, or a corner of one."""
    if spec.block is None:
        small = (min(spec.shape[0], _SAMPLE), min(spec.shape[1], _SAMPLE))
        spec = replace(spec, shape=small, bits=spec.bits * spec.shape[0] * spec.shape[1] / (small[0] * small[1]))
    some = slice(0, max(1, (1 << 18) // (spec.block_shape[0] * spec.block_shape[1])))
    w = formats.disk(spec.format).values(code[some], radius[some], angle[some], spec)
    size = w.square().mean().sqrt().item()
    return 1.0 / size if size > 0 else 1.0
