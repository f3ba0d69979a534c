"""`HybridAdam`: one optimizer for the points, the signs and everything else of a model with open seeds."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rbe import disk
from rbe.errors import RbeError
from rbe.nn.seeded import Seeded
from rbe.optim import transitions
from rbe.optim.seeds import Points, points, wrap
from rbe.optim.transitions import Outcome

Method = Literal["tangent", "riemannian", "polar"]
METHODS: tuple[Method, ...] = ("tangent", "riemannian", "polar")


class HybridAdam(Optimizer):
    """Adam for seeds: points move in the tangent plane, signs by their latents, the rest as in Adam.

    >>> from rbe.nn import Linear
    >>> model = nn.Sequential(Linear(16, 32, format="outer128"), nn.ReLU(), Linear(32, 4, format="packed128"))
    >>> optimizer = HybridAdam(model, lr=1e-2)
    >>> model(torch.randn(8, 16)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.freeze()
    >>> sorted(model[0].state_dict())
    ['bias', 'scale', 'seeds']

    How a point (r, theta) moves:

    * "tangent": as the vector v = 2 artanh(r) (cos theta, sin theta) of the tangent plane at the origin, by Adam, and
      back. Nothing has to be clipped, and an angle of a small radius has no exaggerated steps.
    * "riemannian": Riemannian Adam in the disk: the gradient by the inverse metric, one second moment a point, the step
      along a geodesic.
    * "polar": Adam on r and theta themselves, then clipped and wrapped, as the paper has it.

    Parameter groups have a "role": "point", "latent" or "dense"; schedulers see them like any others.

    Args:
        model: its Seeded modules must be open where they are to be trained.
        lr: learning rate of points.
        method: how points move.
        latent_lr, dense_lr: learning rates of latents and of everything else; lr when left out.
        betas, eps: as in Adam.
        weight_decay: decoupled, of the dense parameters only.
        pull: lambda of the penalty lambda artanh(r)^2 on every point.
        latent_limit: latents are kept in [-limit, limit], so that a sign can turn again.
        clip_norm: longest gradient of all the seeds together; None does not clip.
        seed: of the draws of `flip`.

    Raises:
        RbeError: an argument out of range, or nothing to train.

    Source: Poincare-ball learning, sections 4.3.3, 4.4 and 4.5.3; G. Becigneul, O. Ganea, arXiv 1810.00760.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        method: Method = "tangent",
        latent_lr: float | None = None,
        dense_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        pull: float = 0.0,
        latent_limit: float = 1.0,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        rates = {"lr": lr, "latent_lr": lr if latent_lr is None else latent_lr}
        rates["dense_lr"] = lr if dense_lr is None else dense_lr
        numbers = {**rates, "eps": eps, "weight_decay": weight_decay, "pull": pull}
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise RbeError(f"HybridAdam: {name} is {value}; give 0 or more")
        if method not in METHODS:
            raise RbeError(f"HybridAdam: method {method!r} is not offered; choose one of {', '.join(METHODS)}")
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise RbeError(f"HybridAdam: betas are {betas}; give two numbers in [0, 1)")
        if not latent_limit > 0 or (clip_norm is not None and not clip_norm > 0):
            raise RbeError(f"HybridAdam: latent_limit {latent_limit} and clip_norm {clip_norm} must be positive")
        self.model, self.method, self.pull = model, method, pull
        self.latent_limit, self.clip_norm = latent_limit, clip_norm
        self.points: list[Points] = points(model)
        own = {id(p) for one in self.points for p in (one.radius, one.angle)}
        latents = [m.latent for m in _open(model) if "latent" in m._parameters]
        dense = [p for p in model.parameters() if id(p) not in own | {id(p) for p in latents}]
        groups = [
            {"role": "point", "lr": lr, "params": [p for one in self.points for p in (one.radius, one.angle)]},
            {"role": "latent", "lr": rates["latent_lr"], "params": latents},
            {"role": "dense", "lr": rates["dense_lr"], "weight_decay": weight_decay, "params": dense},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise RbeError("HybridAdam: the model has no parameters; .unfreeze() its seed layers first")
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0})
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients there are.

        Args:
            closure: evaluates the model and returns the loss, with its gradients; called once, before the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = self._clipping()
        for group in self.param_groups:
            if group["role"] == "point":
                for one in self.points:
                    if one.radius.grad is not None and one.angle.grad is not None:
                        self._move(one, group, factor)
                continue
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                gradient = p.grad * factor if group["role"] == "latent" else p.grad
                p.sub_(self._adam(self.state[p], gradient, group))
                if group["role"] == "latent":
                    p.clamp_(-self.latent_limit, self.latent_limit)
        return loss

    def flip(
        self,
        closure: Callable[[], Tensor],
        *,
        share: float = 0.01,
        temperature: float = 0.1,
        fields: Sequence[str] = transitions.FIELDS,
        tolerance: float = 0.0,
        variety: float = 0.0,
    ) -> Outcome:
        """Turn discrete bits, one a seed, by the state-transition rule; call it every few steps.

        >>> from rbe.nn import Linear
        >>> model = Linear(32, 32, format="packed128")
        >>> optimizer = HybridAdam(model)
        >>> x = torch.randn(8, 32)
        >>> outcome = optimizer.flip(lambda: model(x).square().mean(), share=1.0)
        >>> outcome.accepted <= outcome.proposed, outcome.after <= outcome.before
        (True, True)

        A share of the seeds is drawn. Every one-bit neighbour of these has a score, the change of the loss forecast
        from its gradient, and softmax(-score / temperature) over staying and all neighbours decides. The draws are made
        in all layers together; the loss of the same batch decides whether they stay, and what is refused is tried again
        by halves. Adam starts anew at the seeds that changed. Anneal `share` and `temperature` from outside: printed
        are shares by `PowerDecay(exponent=2)` and temperatures 0.1 / (1 + 0.1 epoch).

        Args:
            closure: returns the loss of the batch; called once with gradients and a few times without.
            share: of the seeds that may change.
            temperature: in units of the scores' root mean square.
            fields: of packed128 whose bits may turn; in outer128 every sign may.
            tolerance: how much worse the loss may become.
            variety: lambda of the reward lambda H for the entropy H of the quadrants in use.

        Raises:
            RbeError: no layer has discrete bits, or an argument is out of range.

        Source: Poincare-ball learning, sections 4.3.2, 4.3.3, 4.4.3 and 4.5.3, with the sign of both softmax and
        entropy put right.
        """
        if not 0 < share <= 1 or not temperature > 0 or not tolerance >= 0 or not variety >= 0:
            raise RbeError(
                f"flip: share {share} is in (0, 1], temperature {temperature} positive, tolerance {tolerance} and "
                f"variety {variety} 0 or more"
            )
        modules = [m for m in _open(self.model) if m.spec.format != "packed64"]
        if not modules:
            raise RbeError("flip: no open layer has discrete bits; packed128 and outer128 have")
        kept = {p: p.grad for group in self.param_groups for p in group["params"]}
        self.zero_grad(set_to_none=True)
        outcome, changed = transitions.flip(
            modules,
            closure,
            share=share,
            temperature=temperature,
            fields=fields,
            tolerance=tolerance,
            variety=variety,
            generator=self.generator,
        )
        for p, grad in kept.items():
            p.grad = grad
        for module, mark in zip(modules, changed, strict=True):
            for value in self.state.get(module.radius, {}).values():
                if isinstance(value, Tensor):
                    value[mark] = 0
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """The state, that of the draws included."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was called."""
        self.generator.set_state(state_dict["generator"])
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "generator"})

    def freeze(self) -> None:
        """Pack the seeds of every layer of the model; what is left is what a file holds. The optimizer is then done."""
        for module in _open(self.model):
            module.freeze()

    def _clipping(self) -> float:
        """The factor that brings the seeds' gradients down to the longest allowed."""
        if self.clip_norm is None:
            return 1.0
        grads = [p.grad for g in self.param_groups if g["role"] != "dense" for p in g["params"] if p.grad is not None]
        total = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        return min(1.0, self.clip_norm / total) if total > 0 else 1.0

    def _adam(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any], scalar: bool = False) -> Tensor:
        """Adam's step for a gradient; with `scalar`, one second moment for each vector of the last side."""
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(gradient)
            state["square"] = torch.zeros_like(gradient[..., :1] if scalar else gradient)
        first, second = group["betas"]
        state["step"] += 1
        size = gradient.square().sum(-1, keepdim=True) if scalar else gradient.square()
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(size, 1 - second)
        root = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        step: Tensor = state["mean"] / root * (group["lr"] / (1 - first ** state["step"]))
        return step

    def _move(self, one: Points, group: dict[str, Any], factor: float) -> None:
        """One step of the points of a module."""
        assert one.radius.grad is not None and one.angle.grad is not None
        radius, angle = one.radius.double(), one.angle.double()
        outward, around = one.radius.grad.double() * factor, one.angle.grad.double() * factor
        if self.pull:
            outward = outward + 2 * self.pull * torch.atanh(radius) / disk.radial_gap(radius)
        state = self.state[one.radius]
        if self.method == "polar":
            step = self._adam(state, torch.stack([outward, around], -1).to(one.radius.dtype), group)
            radius, angle = radius - step[..., 0], angle - step[..., 1]
        elif self.method == "tangent":
            length = 2 * torch.atanh(radius)
            # d length = 2 dr / (1 - r^2); across it the vector moves by length dtheta. The shortest vector has a finite
            # derivative too: the one of a point a little farther out.
            along, across = outward * disk.radial_gap(radius) / 2, around / length.clamp_min(LEAST_LENGTH)
            v = _polar(length, angle) - self._adam(state, _turned(along, across, angle).float(), group)
            length = v.norm(dim=-1)
            radius, angle = torch.tanh(length / 2), torch.where(length > 0, torch.atan2(v[..., 1], v[..., 0]), angle)
        else:
            x = _polar(radius, angle)
            slope = disk.riemannian_gradient(x, _turned(outward, around / radius.clamp_min(LEAST_LENGTH), angle))
            # Measured by the metric, so that the second moment is a property of the point and not of its coordinates.
            stretch = disk.conformal_factor(x)[..., None]
            step = self._adam(state, (slope * stretch).float(), group, scalar=True) / stretch
            x = disk.exp(x, -step)
            radius, angle = disk.to_polar(x)
        one.radius.copy_(radius.clamp(one.least, one.most))
        one.angle.copy_(wrap(angle))


# Vectors shorter than this take the direction of an angle's derivative as if they were this long.
LEAST_LENGTH = 1e-6


def _open(model: nn.Module) -> Iterator[Seeded]:
    """Every open module, owners only."""
    for module in model.modules():
        if isinstance(module, Seeded) and module.owner is module and module.trainable:
            yield module


def _polar(length: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([length * angle.cos(), length * angle.sin()], -1)


def _turned(along: Tensor, across: Tensor, angle: Tensor) -> Tensor:
    """The vector with these components along the direction of an angle, and across it."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([along * cos - across * sin, along * sin + across * cos], -1)
