"""How points (r, theta) move: in the tangent plane, along geodesics of the disk, or as two plain numbers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

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
    """Riemannian Adam: the gradient by the inverse metric, one second moment a point, the step along a geodesic.

    The first moment keeps its direction in the plane when its point moves: parallel transport would turn it by an angle
    of the order of the step.
    """
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


def adam_step(
    states: Sequence[dict[str, Any]],
    shapes: Sequence[torch.Size],
    gradient: Tensor,
    group: dict[str, Any],
    together: bool,
) -> Tensor:
    """Adam's step for the gradients (n, 2) of the points of some modules, whose moments are in `states`.

    Args:
        states: all of one number of steps, or empty. `born`, where there is one, is the step at which the moments of a
            point were forgotten: their bias is corrected from there.
        shapes: of the points of each module.
        together: one second moment for both components.
    """
    size = gradient.square().sum(-1, keepdim=True) if together else gradient.square()
    for shape, state in zip(shapes, states, strict=True):
        if "mean" not in state:
            state["step"] = 0
            state["mean"] = gradient.new_zeros((*shape, 2))
            state["square"] = size.new_zeros((*shape, size.shape[-1]))
        state["step"] += 1
    first, second = group["betas"]
    count: float | Tensor = states[0]["step"]
    if any("born" in state for state in states):
        born = [state.get("born", gradient.new_zeros(shape)) for shape, state in zip(shapes, states, strict=True)]
        count = count - torch.cat([b.flatten() for b in born])[:, None].to(gradient)
    moments = []
    for name, new, beta in (("mean", gradient, first), ("square", size, second)):
        moment = torch.cat([state[name].flatten(0, -2) for state in states]).lerp_(new, 1 - beta)
        parts = moment.split([shape.numel() for shape in shapes])  # type: ignore[no-untyped-call]
        for state, part in zip(states, parts, strict=True):
            state[name].copy_(part.view_as(state[name]))
        moments.append(moment)
    mean, root = moments[0], moments[1].div_(1 - second**count).sqrt_().add_(group["eps"])
    return mean.div_(root).mul_(group["lr"] / (1 - first**count))


METHODS = {"tangent": tangent, "riemannian": riemannian, "polar": polar}
