"""How points (r, theta) move: in the tangent plane, along geodesics of the disk, or as two plain numbers."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rbe import disk

Method = Literal["tangent", "riemannian", "polar"]
# Adam's step for a gradient (..., 2); with True, one second moment for both components.
Step = Callable[[Tensor, bool], Tensor]

# Vectors shorter than this take the direction of an angle's derivative as if they were this long.
LEAST_LENGTH = 1e-6


def tangent(radius: Tensor, angle: Tensor, outward: Tensor, around: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Adam on v = 2 artanh(r) (cos theta, sin theta), and back.

    d|v| = 2 dr / (1 - r^2), and across it the vector moves by |v| dtheta. The shortest vector has a finite derivative
    too: the one of a point a little farther out.
    """
    length, cos, sin = 2 * torch.atanh(radius), angle.cos(), angle.sin()
    along, across = outward * disk.radial_gap(radius) / 2, around / length.clamp_min(LEAST_LENGTH)
    moved = step(torch.stack([along * cos - across * sin, along * sin + across * cos], -1), False)
    x, y = length * cos - moved[..., 0], length * sin - moved[..., 1]
    length = torch.hypot(x, y)
    return torch.tanh(length / 2), torch.where(length > 0, torch.atan2(y, x), angle)


def riemannian(radius: Tensor, angle: Tensor, outward: Tensor, around: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Riemannian Adam: the gradient by the inverse metric, one second moment a point, the step along a geodesic."""
    cos, sin = angle.cos(), angle.sin()
    x = torch.stack([radius * cos, radius * sin], -1)
    across = around / radius.clamp_min(LEAST_LENGTH)
    slope = torch.stack([outward * cos - across * sin, outward * sin + across * cos], -1)
    # Measured by the metric, so that the second moment is a property of the point and not of its coordinates.
    stretch = disk.conformal_factor(x)[..., None]
    moved = step(disk.riemannian_gradient(x, slope) * stretch, True) / stretch
    return disk.to_polar(disk.exp(x, -moved))


def polar(radius: Tensor, angle: Tensor, outward: Tensor, around: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Adam on r and theta themselves, as the paper has it."""
    moved = step(torch.stack([outward, around], -1), False)
    return radius - moved[..., 0], angle - moved[..., 1]


METHODS = {"tangent": tangent, "riemannian": riemannian, "polar": polar}
