"""What keeps seeds in the disk while an ordinary torch optimizer moves them: `guard`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rbe import disk
from rbe.errors import RbeError
from rbe.nn.seeded import Seeded

# Where seeds are kept after a step: a radius of 0 has no angle, at a radius of 1 nothing moves any more.
RADII = {"packed64": (1e-6, 0.999), "packed128": (0.01, 0.99), "outer128": (0.0, 0.9999)}
TURNS = 10.0 * math.pi


@dataclass(frozen=True)
class Points:
    """The open seeds of one module, see `points`.

    >>> from rbe.nn import Linear
    >>> points(Linear(32, 32, format="outer128"))[0].radius.shape
    torch.Size([4, 1])

    Attributes:
        name: of the module.
        radius, angle: its Parameters, (blocks, stages).
        least, most: radii allowed after a step.
    """

    name: str
    radius: nn.Parameter
    angle: nn.Parameter
    least: float
    most: float


def points(model: nn.Module) -> list[Points]:
    """The open seeds of all modules in a model, each once.

    >>> from rbe.nn import Linear
    >>> [(p.name, p.most) for p in points(nn.Sequential(nn.Linear(4, 4), Linear(16, 32, format="packed128")))]
    [('1', 0.99)]
    """
    return list(_points(model))


def _points(model: nn.Module) -> Iterator[Points]:
    for name, module in model.named_modules():
        radius, angle = module._parameters.get("radius"), module._parameters.get("angle")
        if isinstance(module, Seeded) and radius is not None and angle is not None:
            yield Points(name, radius, angle, *RADII.get(module.spec.format, (1e-6, 0.999)))


def open_layers(model: nn.Module) -> Iterator[Seeded]:
    """Every open module of seeds, owners only."""
    for module in model.modules():
        if isinstance(module, Seeded) and module.owner is module and module.trainable:
            yield module


def gradients(some: list[Points], pull: float) -> tuple[Tensor, Tensor]:
    """Gradients by all radii and angles of some modules, flat, in float64; those of the pull on what moves too."""
    outward, around = (torch.cat([_gradient(getattr(one, n)) for one in some]) for n in ("radius", "angle"))
    if pull:
        # At the origin nothing pulls.
        radii = [one.radius.new_zeros(one.radius.shape) if one.radius.grad is None else one.radius for one in some]
        outward = outward + _pulled(torch.cat([r.flatten() for r in radii]).double(), pull)
    return outward, around


def _gradient(p: Tensor) -> Tensor:
    """Of a parameter, flat, in float64; 0 where it has none."""
    return p.new_zeros(p.numel(), dtype=torch.float64) if p.grad is None else p.grad.flatten().double()


def _pulled(radius: Tensor, strength: float) -> Tensor:
    """Derivative of strength artanh(r)^2."""
    return 2 * strength * torch.atanh(radius) / disk.radial_gap(radius)


def groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the seeds without its weight decay, everything else with it.

    >>> from rbe.nn import Linear
    >>> model = Linear(16, 32, format="packed128")
    >>> [(len(g["params"]), g["weight_decay"]) for g in groups(model, weight_decay=0.1)]
    [(2, 0.0), (2, 0.1)]

    Decay of an angle turns a weight towards whatever angle 0 means, and for `packed64` to zero; the decay of seeds is
    `guard(weight_decay=...)`.
    """
    own = {id(p) for one in _points(model) for p in (one.radius, one.angle)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in own], "weight_decay": 0.0},
        {"params": [p for p in parameters if id(p) not in own], "weight_decay": weight_decay},
    ]


def damping(radius: Tensor, strength: float = 20.0, threshold: float = 0.95, least: float = 0.1) -> Tensor:
    """Factor of an outward step near the rim: 1 up to the threshold, then down to `least`.

    >>> [round(v, 4) for v in damping(torch.tensor([0.5, 0.95, 0.97, 0.999])).tolist()]
    [1.0, 1.0, 0.6, 0.1]

    1 - strength (r - threshold), not below `least`. Strength 20 reaches 0 at the rim itself.
    """
    return (1 - strength * (radius - threshold)).clamp(least, 1.0)


def wrap(angle: Tensor) -> Tensor:
    """The angle in [-10 pi, 10 pi), changed by a multiple of 20 pi, so that no cosine of a whole multiple changes.

    >>> wrap(torch.tensor([1.0, 32.0])).tolist()
    [1.0, -30.83185386657715]
    """
    inside = (angle >= -TURNS) & (angle < TURNS)
    # Computed in float64: a float32 remainder of a large angle would lose what it is about.
    far = torch.remainder(angle.double() + TURNS, 2 * TURNS) - TURNS
    return torch.where(inside, angle, far.to(angle.dtype))


@dataclass(frozen=True)
class Guard:
    """The hooks of `guard` on an optimizer.

    >>> from rbe.nn import Linear
    >>> model = Linear(16, 32, format="packed128")
    >>> watch = guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    >>> len(watch.points)
    1
    >>> watch.remove()

    Attributes:
        points: the seeds that it watches.
    """

    points: list[Points]
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self.handles:
            handle.remove()


def guard(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    riemannian: bool = False,
    boundary_damping: float = 20.0,
    boundary: float = 0.95,
    clip_norm: float | None = 1.0,
    clip_value: float | None = None,
    weight_decay: float = 0.0,
) -> Guard:
    """Make an optimizer treat the open seeds of a model as points of the disk, at every `step`.

    >>> from rbe.nn import Linear
    >>> model = Linear(16, 32, format="packed128")
    >>> adam = torch.optim.Adam(groups(model), lr=0.01)
    >>> watch = guard(adam, model, weight_decay=1e-4)
    >>> model(torch.randn(8, 16)).square().mean().backward()
    >>> adam.step()
    >>> bool((model.radius <= 0.99).all())
    True

    Before a step the gradients of radius and angle, summed over as many backward passes as there were, get the decay
    term, are scaled by the inverse metric, damped near the rim and clipped, in this order. After it the radius is
    clipped and the angle wrapped; what has requires_grad=False stays as it is. `.grad` is as backward left it again
    when `step` returns.

    Args:
        optimizer: any whose `step()` uses `.grad`, such as Adam or SGD.
        model: its modules with Parameters `radius` and `angle`.
        riemannian: multiply by the inverse metric, ((1 - r^2) / 2)^2 and the same over r^2. For plain gradient descent;
            Adam divides most of it out again.
        boundary_damping, boundary: strength and threshold of `damping`, on outward gradients of the radius; 0 is none.
        clip_norm: longest gradient of all the model's seeds together; None does not clip.
        clip_value: largest component instead of the norm; give clip_norm=None with it.
        weight_decay: lambda of the penalty lambda artanh(r)^2, which pulls the radius inwards and leaves the angle.

    Raises:
        RbeError: no open seeds, an argument out of range, both ways of clipping, or an optimizer with a decay of its
            own on the seeds; while stepping: a closure, whose gradients come too late.
    """
    found = points(model)
    settings = {"boundary_damping": boundary_damping, "weight_decay": weight_decay}
    limits = {"clip_norm": clip_norm, "clip_value": clip_value}
    _check(optimizer, found, settings, limits, boundary)
    saved: list[tuple[nn.Parameter, Tensor | None]] = []

    def before(_: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if named.get("closure") is not None or any(callable(a) for a in arguments):
            raise RbeError(
                "guard: step(closure) makes new gradients after they were treated; call backward() first, then step()"
            )
        saved[:] = [(p, p.grad) for one in found for p in (one.radius, one.angle) if p.grad is not None]
        with torch.no_grad():
            for one in found:
                _treat(one, riemannian, boundary_damping, boundary, weight_decay)
        seeds = [p for p, _ in saved]
        if clip_norm is not None and seeds:
            nn.utils.clip_grad_norm_(seeds, clip_norm)
        if clip_value is not None and seeds:
            nn.utils.clip_grad_value_(seeds, clip_value)

    def after(*_: Any) -> None:
        for p, grad in saved:
            p.grad = grad
        saved.clear()
        with torch.no_grad():
            for one in found:
                if one.radius.requires_grad:
                    one.radius.clamp_(one.least, one.most)
                if one.angle.requires_grad:
                    one.angle.copy_(wrap(one.angle))

    handles = (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
    return Guard(found, handles)


def _treat(one: Points, riemannian: bool, strength: float, threshold: float, decay: float) -> None:
    """Put new gradients in place of those of one module; of radius and angle either may have none."""
    radius = one.radius.detach()
    outward, around = (torch.zeros_like(radius) if p.grad is None else p.grad.clone() for p in (one.radius, one.angle))
    if decay:
        outward += _pulled(radius, decay)
    if riemannian:
        outward, around = disk.polar_gradient(radius, outward, around, least_radius=one.least)
    if strength:
        # A step goes against the gradient: a negative one moves outwards.
        outward = torch.where(outward < 0, outward * damping(radius, strength, threshold), outward)
    for p, grad in ((one.radius, outward), (one.angle, around)):
        p.grad = None if p.grad is None else grad


def _check(
    optimizer: Optimizer,
    found: list[Points],
    settings: dict[str, float],
    limits: dict[str, float | None],
    boundary: float,
) -> None:
    if not found:
        raise RbeError("guard: the model has no open seeds; call .unfreeze() on its seed layers, or train it without")
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise RbeError(f"guard: {name} is {value}; give 0 or more")
    for name, limit in limits.items():
        if limit is not None and not 0 < limit < math.inf:
            raise RbeError(f"guard: {name} is {limit}; give a positive number, or None not to clip")
    if None not in limits.values():
        raise RbeError("guard: clip_norm and clip_value are both given; components so clipped never reach the norm")
    if not 0 <= boundary < 1:
        raise RbeError(f"guard: boundary is {boundary}; it is a radius in [0, 1)")
    seeds = {id(p) for one in found for p in (one.radius, one.angle)}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0.0) and any(id(p) in seeds for p in group["params"]):
            raise RbeError(
                f"guard: the optimizer has weight_decay {group['weight_decay']} on seeds and turns their angles to 0; "
                "make it with rbe.optim.groups(model, weight_decay), and give guard the decay of the seeds"
            )
