"""From atoms to the fields of `packed128`, so that the amplitude comes out to about a millionth.

A = 2 geo_amp / 4095 - 1 has twelve bits. But sinh and cosh are divided by their value at alpha K, and the same profile,
alpha K r, is reached with many frequencies and a smaller r: the frequency is a second, finer knob of the amplitude.
"""

import math

import torch
from torch import Tensor

from rbe.formats import SeedSpec, packed128
from rbe.search.proposal import Atoms

# alpha K of one step of hyp_freq.
STEP = packed128.LARGEST_FREQUENCY / 4095.0 * packed128.GAIN
# The steps of the format stretch by K: below this radius the faithful mode's clamp is never met.
LARGEST_RADIUS = 0.99
# Frequencies tried for the amplitude.
_TRIED = 64
# Faithful: A is 1, the amplitude is sinh(alpha K r), and r is at most one half.
_FAITHFUL_FREQUENCY = math.ceil(math.asinh(1.0) / (0.5 * STEP))


def _least_frequency(atoms: Atoms) -> Tensor:
    """The smallest hyp_freq with which the radius stays inside."""
    return (atoms.steepness / (LARGEST_RADIUS * STEP)).ceil().clamp(1, 4095)


def _top(quadrant: Tensor, steepest: Tensor) -> Tensor:
    """What the format divides f by."""
    return torch.where(quadrant == 3, 1.0, packed128.basis(quadrant, steepest)[0])


def _size(atoms: Atoms) -> Tensor:
    """Amplitude of the wave; signed at q = 0, where there is no phase."""
    return torch.where(atoms.wave == 0, atoms.cosine, torch.hypot(atoms.cosine, atoms.sine))


def needed_scale(atoms: Atoms, mode: str | None) -> float:
    """The smallest scale with which every amplitude fits."""
    size = _size(atoms).abs()
    if mode == "radial":
        size = size * _top(atoms.quadrant, _least_frequency(atoms) * STEP)
    return float(size.max())


def is_coarse(atoms: Atoms, scale: float) -> Tensor:
    """Whether a block has an amplitude so small, of a function without a second knob, that its rounding shows."""
    small = _size(atoms).abs() * _top(atoms.quadrant, _least_frequency(atoms) * STEP) < 0.003 * scale
    return (small & (atoms.quadrant >= 2)).any(1)


def quantise(atoms: Atoms, scale: float, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(code, radius, angle) of atoms whose amplitudes are within the scale: int64 and float64 (blocks, stages)."""
    q, size = atoms.wave, _size(atoms) / (scale if scale > 0 else 1.0)
    if spec.mode == "radial":
        quadrant, frequency, amplitude, radius = _radial(atoms, size)
    else:
        quadrant, frequency = torch.zeros_like(q), torch.full_like(q, _FAITHFUL_FREQUENCY)
        amplitude = torch.where(size < 0, 0, 4095)
        radius = torch.asinh(size.abs().clamp_max(1.0)) / (_FAITHFUL_FREQUENCY * STEP)
    nothing = size == 0
    quadrant, radius = torch.where(nothing, 0, quadrant), torch.where(nothing, 0.0, radius)
    # cos(q (a + tau)) is cos(q tau) cos(q a) - sin(q tau) sin(q a); sin(q (a + tau)) likewise.
    phase = torch.where(q < 32, torch.atan2(-atoms.sine, atoms.cosine), torch.atan2(atoms.cosine, atoms.sine))
    sequence = torch.zeros_like(q)
    angle = torch.where(q == 0, 0.0, phase / q.clamp_min(1)) - packed128.turn(sequence)
    angle = torch.remainder(angle + math.pi, math.tau) - math.pi
    return packed128.code_of(quadrant, frequency, amplitude, q, sequence), radius, angle


def _radial(atoms: Atoms, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(quadrant, hyp_freq, geo_amp, radius) with the frequency that brings A nearest to one of its values."""
    quadrant, least = atoms.quadrant, _least_frequency(atoms)
    room = 1.0 / size.abs().clamp_min(1e-300)
    steepest = torch.where(quadrant == 0, torch.asinh(room), torch.acosh(room.clamp_min(1.0))) / STEP
    most = torch.where(quadrant < 2, steepest.floor().clamp_max(4095.0), 4095.0)
    most = torch.maximum(most, least)
    tried = (most[..., None] - torch.arange(_TRIED)).clamp_min(least[..., None])
    amplitude = size[..., None] * _top(quadrant[..., None], tried * STEP)
    level = ((amplitude + 1.0) * 2047.5).round().clamp(0, 4095)
    wrong = (level / 2047.5 - 1.0 - amplitude).abs() / amplitude.abs().clamp_min(1e-300)
    best = wrong.argmin(-1, keepdim=True)
    frequency = tried.gather(-1, best)[..., 0]
    radius = (atoms.steepness / (frequency * STEP)).clamp_max(LARGEST_RADIUS)
    return quadrant, frequency.long(), level.gather(-1, best)[..., 0].long(), radius
