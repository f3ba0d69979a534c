"""`HybridAdam`: one optimizer for the points, the signs and everything else of a model with open seeds."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rbe.errors import RbeError
from rbe.nn.seeded import Seeded
from rbe.optim import transitions
from rbe.optim.motion import METHODS, Method, adam_step
from rbe.optim.penalties import total_entropy
from rbe.optim.seeds import Points, gradients, open_layers, points, wrap
from rbe.optim.state import adam_all, check, lay, refuse_streams
from rbe.optim.transitions import Outcome
from rbe.search.blocks import Blocks

# A beam search that the loss refuses is made again with so much more curvature, this often in all; after one that was
# right it starts with less.
_STEEPER, _FLATTER, _TRIES = 4.0, 0.5, 4


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

    The scale of a matrix moves by its logarithm: it is as small as weights are, and steps of the size of a learning
    rate would throw it about, and with it the statistics of a norm behind it.

    Parameter groups have a "role": "point", "latent", "scale" or "dense"; schedulers see them like any others.

    Args:
        model: its Seeded modules must be open where they are to be trained.
        lr: learning rate of points, and of the logarithms of scales.
        method: how points move.
        latent_lr, dense_lr: learning rates of latents and of everything else; lr when left out.
        betas, eps: as in Adam.
        weight_decay: decoupled, of the dense parameters only.
        pull: lambda of the penalty lambda artanh(r)^2 on every point.
        latent_limit: latents are kept in [-limit, limit], so that a sign can turn again.
        clip_norm: longest gradient of all the seeds together, the pull's included; None does not clip, since Adam's
            steps are as long whatever the gradients' common factor.
        clip_value: largest component of a point's gradient instead; the paper has 0.1.
        seed: of the draws of `flip` and `beam`.

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
        clip_value: float | None = None,
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
        limits = {"latent_limit": latent_limit, "clip_norm": clip_norm, "clip_value": clip_value}
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise RbeError(f"HybridAdam: {name} is {limit}; it must be positive")
        if clip_norm is not None and clip_value is not None:
            raise RbeError("HybridAdam: clip_norm and clip_value are both given; components so clipped never reach it")
        self.model, self.method, self.pull = model, method, pull
        self.latent_limit, self.clip_norm, self.clip_value = latent_limit, clip_norm, clip_value
        self.points: list[Points] = points(model)
        own = {id(p) for one in self.points for p in (one.radius, one.angle)}
        latents = [m.latent for m in open_layers(model) if "latent" in m._parameters]
        scales = [m.scale for m in open_layers(model) if "scale" in m._parameters]
        own |= {id(p) for p in (*latents, *scales)}
        refuse_streams(model)
        dense = [p for p in model.parameters() if id(p) not in own]
        groups = [
            {"role": "point", "lr": lr, "params": [p for one in self.points for p in (one.radius, one.angle)]},
            {"role": "latent", "lr": rates["latent_lr"], "params": latents},
            {"role": "scale", "lr": lr, "params": scales},
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
                self._move_all(group, factor)
            elif group["role"] == "scale":
                self._stretch(group)
            else:
                self._descend(group, factor if group["role"] == "latent" else 1.0)
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
        by halves. Where a seed changed Adam starts anew at its point, and its latents lose their momentum. Anneal
        `share` and `temperature` from outside: printed are shares by `PowerDecay(exponent=2)` and temperatures
        0.1 / (1 + 0.1 epoch).

        Args:
            closure: returns the loss of the batch; called once with gradients and a few times without.
            share: of the seeds that may change.
            temperature: in units of the scores' root mean square.
            fields: of packed128 whose bits may turn; in outer128 every sign may.
            tolerance: how much worse the loss may become.
            variety: lambda of the reward lambda H for the entropy H of the quadrants in use; it is taken off the loss,
                in proposals and when they are judged.

        Raises:
            RbeError: no layer has discrete bits, or an argument is out of range.

        Source: Poincare-ball learning, sections 4.3.2, 4.3.3, 4.4.3 and 4.5.3, with the sign of both softmax and
        entropy put right.
        """
        transitions.check_options("flip", share=share, tolerance=tolerance)
        if not temperature > 0:
            raise RbeError(f"flip: temperature is {temperature}; it must be positive")
        if not variety >= 0:
            raise RbeError(f"flip: variety is {variety}; give 0 or more")
        modules = [m for m in open_layers(self.model) if m.spec.format != "packed64"]
        if not modules:
            raise RbeError("flip: no open layer has discrete bits; packed128 and outer128 have")
        if variety and all(m.spec.format != "packed128" for m in modules):
            raise RbeError(
                f"flip: variety is {variety}, but no open layer has the quadrants of packed128; leave it out"
            )
        propose = partial(
            transitions.draw,
            generator=self.generator,
            fields=fields,
            share=share,
            temperature=temperature,
            variety=variety,
        )

        def reward() -> float:
            return variety * total_entropy(self.model) if variety else 0.0

        return self._transit(modules, closure, lambda m, g: propose(m, g, free=self._free(m)), tolerance, reward=reward)

    def beam(
        self,
        closure: Callable[[], Tensor],
        *,
        share: float = 0.05,
        width: int = 16,
        rounds: int = 4,
        fields: Sequence[str] = (*transitions.FIELDS, "basis_sel"),
        tolerance: float = 0.0,
    ) -> Outcome:
        """Change several bits of packed128 seeds together, by a beam search over their fields; dearer than `flip`.

        >>> from rbe.nn import Linear
        >>> model = Linear(32, 32, format="packed128")
        >>> optimizer = HybridAdam(model)
        >>> x = torch.randn(8, 32)
        >>> outcome = optimizer.beam(lambda: model(x).square().mean(), share=1.0)
        >>> outcome.accepted <= outcome.proposed, outcome.after <= outcome.before
        (True, True)

        A share of the seeds is drawn. Of each the `width` best codes are kept, all their one-bit neighbours scored by
        the forecast of the loss, gradient and curvature, and the best of both go into the next round. As in `flip` the
        loss of the same batch decides. What it refuses is searched anew with a larger curvature, for nearer codes, and
        at last tried by halves, the largest forecast gain first. The curvature found is where the next call starts.
        Adam starts anew at the seeds that changed.

        Args:
            closure: as in `flip`.
            share: of the seeds that may change.
            width: codes kept (K); rounds: the most bits that a code can differ in.
            fields: of packed128 whose bits may turn.
            tolerance: how much worse the loss may become.

        Raises:
            RbeError: no open layer is of packed128, or an argument is out of range.

        Source: Poincare-ball learning, sections 4.3.2.3 and 4.3.3.
        """
        transitions.check_options("beam", share=share, tolerance=tolerance)
        if width < 1 or rounds < 1:
            raise RbeError(f"beam: width is {width}, rounds {rounds}; give at least 1 of each")
        modules = [m for m in open_layers(self.model) if m.spec.format == "packed128"]
        if not modules:
            raise RbeError("beam: no open layer is of packed128, whose fields are searched; outer128 has flip()")

        def curvature(module: Seeded, gradient: Blocks) -> float:
            state = self.state[module.radius]
            if not state.get("curvature"):
                state["curvature"] = transitions.curvature(module, gradient)
            return float(state["curvature"])

        def rescale(factor: float) -> None:
            for module in modules:
                state = self.state[module.radius]
                state["curvature"] = state.get("curvature", 0.0) * factor

        def propose(module: Seeded, gradient: Blocks) -> transitions.Moves:
            h = curvature(module, gradient)
            return transitions.beam(
                module, gradient, self.generator, fields=fields, share=share, width=width, rounds=rounds, h=h
            )

        outcome = self._transit(modules, closure, propose, tolerance, _TRIES, lambda: rescale(_STEEPER))
        if outcome.accepted == outcome.proposed:
            rescale(_FLATTER)
        return outcome

    def hold(self, share: float) -> int:
        """Fix this share of every layer's signs, those whose latents are largest; the rest goes on.

        >>> from rbe.nn import Linear
        >>> model = Linear(16, 16, format="outer128")
        >>> HybridAdam(model).hold(0.25)
        16

        What is held stays held when the share grows; a smaller share lets go of the least certain. `flip` leaves it
        alone too.

        Args:
            share: in [0, 1]; 0 lets all go.

        Returns:
            how many signs are held.

        Raises:
            RbeError: the share is out of range, or no layer has latents.

        Source: in the way of MIRACLE, M. Havasi, R. Peharz, J. M. Hernandez-Lobato, arXiv 1810.00440: fix some, let
        the rest make up for it.
        """
        latents = [p for group in self.param_groups if group["role"] == "latent" for p in group["params"]]
        if not 0 <= share <= 1:
            raise RbeError(f"hold: share is {share}; give a number in [0, 1]")
        if not latents:
            raise RbeError("hold: no open layer has latents, whose signs are held; outer128 has")
        held = 0
        for p in latents:
            state, count = self._moments(p), round(share * p.numel())
            certain = p.detach().abs()
            if "free" in state:
                # Those held come first, in their own order.
                certain = torch.where(state["free"] == 0, certain + 2 * certain.max() + 1, certain)
            free = torch.ones_like(p)
            free.view(-1)[certain.flatten().topk(count).indices] = 0
            # Without gradient and without momentum a step of Adam is exactly 0.
            state["free"] = free
            state["mean"] *= free
            held += count
        return held

    def _free(self, module: Seeded) -> Tensor | None:
        """1 where a sign may turn, 0 where it is held; None where all may."""
        latent = module._parameters.get("latent")
        return None if latent is None else self.state.get(latent, {}).get("free")

    def _transit(
        self,
        modules: list[Seeded],
        closure: Callable[[], Tensor],
        propose: Callable[[Seeded, Blocks], transitions.Moves],
        tolerance: float,
        tries: int = 1,
        humbler: Callable[[], object] = lambda: None,
        reward: Callable[[], float] = lambda: 0.0,
    ) -> Outcome:
        """Change bits; gradients and running statistics stay as they were, moments start anew where a code changed."""
        with self._undisturbed():
            outcome, changed = transitions.transit(modules, closure, propose, tolerance, tries, humbler, reward)
        for module, mark in zip(modules, changed, strict=True):
            state = self.state.get(module.radius, {})
            if "mean" in state and mark.any():
                state["mean"][mark] = state["square"][mark] = 0
                # What corrects the bias of young moments is counted from here.
                state.setdefault("born", torch.zeros(mark.shape, device=mark.device))[mark] = state["step"]
            latent = module._parameters.get("latent")
            if latent is not None and "mean" in self.state.get(latent, {}):
                self.state[latent]["mean"][mark] = 0
        return outcome

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put gradients, and the buffers that a forward pass changes, back as they were."""
        grads = {p: p.grad for group in self.param_groups for p in group["params"]}
        # DistributedDataParallel may have gradients that are parts of its buckets, which trials write to.
        values = {p: grad.clone() for p, grad in grads.items() if grad is not None}
        own = {id(b) for m in self.model.modules() if isinstance(m, Seeded) for b in m._buffers.values()}
        buffers = {b: b.clone() for b in self.model.buffers() if id(b) not in own}
        self.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            for p, grad in grads.items():
                p.grad = None if grad is None else grad.copy_(values[p])
            for b, value in buffers.items():
                b.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The state, that of the draws included.

        >>> from rbe.nn import Linear
        >>> model = Linear(16, 16, format="outer128")
        >>> state = HybridAdam(model).state_dict()  # for torch.save
        >>> HybridAdam(model).load_state_dict(state)
        """
        return {**super().state_dict(), "generator": self.generator.get_state(), "method": self.method}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was called.

        Raises:
            RbeError: the state is of another model, method or optimizer; nothing is changed then.
        """
        check(self, state_dict, self._shapes)
        if state_dict.get("method", self.method) != self.method:
            raise RbeError(f"HybridAdam: the state is of method {state_dict['method']}, here it is {self.method}")
        generator = torch.Generator()
        try:
            generator.set_state(state_dict["generator"])
        except (KeyError, TypeError, RuntimeError) as cause:
            raise RbeError(
                f"HybridAdam: the state has no draws to go on with ({cause}); give what its state_dict() returned"
            ) from cause
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.generator = generator
        lay(self.state)

    def _shapes(self, role: str, key: str, p: Tensor) -> tuple[torch.Size, ...]:
        """Of a tensor of the state."""
        if role != "point" or key == "born":
            return (p.shape,)
        return (torch.Size((*p.shape, 1 if key == "square" and self.method == "riemannian" else 2)),)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have everything; torch's own keep groups and state alone."""
        own = ("model", "method", "pull", "latent_limit", "clip_norm", "clip_value", "points", "generator")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of no use from outside, where it is refused."""
        if hasattr(self, "generator"):
            raise RbeError("HybridAdam: groups cannot be added; build a new HybridAdam of the whole model instead")
        super().add_param_group(param_group)

    def freeze(self) -> None:
        """Pack the seeds of every layer of the model; what is left is what a file holds. The optimizer is then done."""
        for module in open_layers(self.model):
            module.freeze()

    def _clipping(self) -> float:
        """The factor that brings the seeds' gradients down to the longest allowed."""
        if self.clip_norm is None:
            return 1.0
        latents = [
            p.grad for g in self.param_groups if g["role"] == "latent" for p in g["params"] if p.grad is not None
        ]
        points = [part for one in self.points for part in gradients([one], self.pull)]
        total = float(nn.utils.get_total_norm([*latents, *points]))
        return min(1.0, self.clip_norm / total) if total > 0 else 1.0

    def _moments(self, p: Tensor) -> dict[str, Any]:
        """Adam's state of a latent or dense parameter."""
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    def _descend(self, group: dict[str, Any], factor: float) -> None:
        """One step of all latents, or of everything dense: torch's own Adam, fused over the tensors."""
        moving = [p for p in group["params"] if p.grad is not None]
        if not moving:
            return
        states = [self._moments(p) for p in moving]
        grads = [p.grad if factor == 1.0 else p.grad * factor for p in moving]
        grads = [g * state["free"] if "free" in state else g for g, state in zip(grads, states, strict=True)]
        adam_all(moving, grads, states, group)
        if group["role"] == "latent":
            for p in moving:
                p.clamp_(-self.latent_limit, self.latent_limit)

    def _stretch(self, group: dict[str, Any]) -> None:
        """One step of all scales: Adam on their logarithms."""
        moving = [p for p in group["params"] if p.grad is not None]
        if not moving:
            return
        moves = [torch.zeros_like(p) for p in moving]
        grads = [p.grad * p for p in moving]
        adam_all(moves, grads, [self._moments(p) for p in moving], group)
        for p, move in zip(moving, moves, strict=True):
            p.mul_(move.exp())

    def _move_all(self, group: dict[str, Any], factor: float) -> None:
        """One step of the points, those of all modules side by side where limits and number of steps are the same."""
        alike: dict[Any, list[Points]] = defaultdict(list)
        for one in self.points:
            if one.radius.grad is not None or one.angle.grad is not None:
                step = self.state[one.radius].get("step", 0)
                alike[one.least, one.most, one.radius.dtype, one.radius.device, step].append(one)
        for some in alike.values():
            self._move(some, group, factor)

    def _move(self, some: list[Points], group: dict[str, Any], factor: float) -> None:
        radius, angle = (torch.cat([getattr(one, n).flatten() for one in some]).double() for n in ("radius", "angle"))
        outward, around = gradients(some, self.pull)
        if factor != 1.0:
            outward, around = outward * factor, around * factor
        if self.clip_value is not None:
            outward, around = (g.clamp(-self.clip_value, self.clip_value) for g in (outward, around))
        states, shapes = [self.state[one.radius] for one in some], [one.radius.shape for one in some]

        def step(gradient: Tensor, together: bool) -> Tensor:
            return adam_step(states, shapes, gradient.to(some[0].radius.dtype), group, together)

        radius, angle = METHODS[self.method](radius, angle, outward, around, step)
        sizes = [one.radius.numel() for one in some]
        parts = radius.clamp(some[0].least, some[0].most).split(sizes), wrap(angle).split(sizes)  # type: ignore[no-untyped-call]
        for one, r, theta in zip(some, *parts, strict=True):
            # Half of a point may be fixed: it has no gradient.
            if one.radius.grad is not None:
                one.radius.copy_(r.view_as(one.radius))
            if one.angle.grad is not None:
                one.angle.copy_(theta.view_as(one.angle))
