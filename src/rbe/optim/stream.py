"""`StreamAdam`: training of streams under a number of bytes; every level is weighed by the bits it costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.kernels import stream
from rbe.nn.stream import Stream, streams
from rbe.optim.state import check

# Steps between two estimates of what the streams cost, at most, and estimates of a run at least.
EVERY, LEAST = 10, 200
# Share of the run after which the number of bytes is reached, and how much faster bytes fall at the start than evenly:
# levels that are gone come back slowly, so that the end must be reached gently.
REACH, EASE = 0.5, 1.5
# The pressure at the start, in mean gradients a bit; what an error of the bytes, and what its change, does to it.
PRESSURE, INTEGRAL, PROPORTIONAL = 0.05, 0.2, 5.0
# The logarithm of the pressure changes by no more at once.
LIMIT = 0.7
# From this share of that time on the true bytes are counted at every so many estimates; before, they decide nothing.
NEAR, COUNTED = 0.8, 5
# The bytes aimed at, below those allowed: the last steps turn single levels on and off.
AIM = 0.995
# Of a group, so that a state dict has them: the pressure, steps done, bits at the start, true to estimated, and how far
# the bits are from those of the moment, in logarithm.
ABOUT = {"pressure": 0.0, "done": 0, "fresh": 0.0, "true": 1.0, "error": 0.0}


def price(latent: Tensor) -> tuple[float, Tensor]:
    """Bits that the levels of a matrix take, about, and what one more step away from 0 costs at each place.

    The odds of a level other than 0 are those of its row times those of its column over those of the matrix, as
    `rbe.formats.stream` learns them while it reads.

    >>> bits, each = price(torch.eye(4))
    >>> bits > 4, each.shape
    (True, torch.Size([4, 4]))

    Args:
        latent: (rows, columns).
    """
    # In place where it can be: a copy of the largest matrix is most of what training holds.
    size = latent.abs().round_()
    there = (size > 0).to(latent.dtype)
    rows, columns = there.shape
    in_row, in_column, count = there.sum(1, keepdim=True), there.sum(0, keepdim=True), there.sum()

    def odds(some: Tensor, every: int) -> Tensor:
        return torch.log((some + 0.3) / (every - some + 0.3))

    logit = (odds(in_row, columns) + odds(in_column, rows)).sub_(odds(count, rows * columns))
    # The product of the odds is shifted until it expects as many levels as there are.
    for _ in range(3):
        p = torch.sigmoid(logit)
        logit -= ((p.sum() - count) / ((1 - p).mul_(p).sum() + 1e-6)).clamp(-2, 2)
    del p
    places = _bits(logit, there)
    learning = 0.5 * float(torch.log2(1 + in_row).sum() + torch.log2(1 + in_column).sum())
    sizes, further, left, level = 0.0, 0.7, float(count), 1
    while left and level < 20:
        more = float((size > level).sum())
        p_more = (more + 0.5) / (left + 1)
        sizes += 2 - more * math.log2(p_more) - (left - more) * math.log2(1 - p_more)
        further = max(0.7, math.log2((1 - p_more) / p_more)) if level == 1 else further
        left, level = more, level + 1
    each = logit.neg_().div_(math.log(2)).clamp_min_(0.3).add_(1).masked_fill_(latent.abs() >= 1, further)
    return places + learning + float(count) + sizes, each


def _bits(logit: Tensor, there: Tensor) -> float:
    """Bits of yes and no answers whose log-odds are known."""
    return float(nn.functional.softplus(torch.where(there > 0, -logit, logit)).sum()) / math.log(2)


def _least(layer: Stream) -> int:
    """Bytes of the seed of a layer without any level."""
    zeros = torch.zeros(layer.shape[0], layer.shape[1] + layer.bias, dtype=torch.int16)
    return len(stream.pack(zeros, cells=layer.cells, bias=layer.bias))


class StreamAdam(torch.optim.Adam):
    """Adam that brings the streams of a model to a number of bytes within half of the steps, and keeps them there.

    To the gradient of every latent it adds what one more step away from 0 costs there in bits, times a pressure that
    follows how far the streams are from the bytes of the moment, and how that changes: those go down in logarithm, from
    the bytes of the fresh model, ever more slowly. A level is thus given up where it serves the loss less than its bits
    do elsewhere, and comes back where the gradient says it is worth them.

    >>> from rbe.nn import StreamLinear
    >>> model = nn.Sequential(StreamLinear(16, 32), nn.ReLU(), StreamLinear(32, 4))
    >>> optimizer = StreamAdam(model, bytes=100, steps=50)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 16)).square().mean().backward()
    ...     optimizer.step()
    >>> optimizer.fit() <= 100
    True

    Args:
        model: with open stream layers.
        bytes: of all seeds together; or pairs (layers, bytes of their seeds together) that name every open stream once.
        steps: of the whole run.
        lr: learning rate of latents, in levels; dense_lr: of everything else, logarithms of scales too.
        betas, eps: as in Adam.

    Raises:
        RbeError: there is no open stream, a number is not positive, bytes are too few for any level, or the pairs leave
            out a stream or name it twice.
    """

    def __init__(
        self,
        model: nn.Module,
        bytes: int | Sequence[tuple[Sequence[Stream], int]],
        steps: int,
        lr: float = 2e-2,
        *,
        dense_lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        layers = [layer for layer in streams(model) if layer.trainable]
        if not layers:
            raise RbeError("StreamAdam: the model has no open streams; build it of rbe.nn.StreamLinear, StreamConv2d")
        parts = [(layers, bytes)] if isinstance(bytes, int | float) else bytes
        self.parts = [(list(some), size) for some, size in parts]
        numbers = [("steps", steps), ("lr", lr), ("dense_lr", dense_lr), *(("bytes", size) for _, size in self.parts)]
        for name, value in numbers:
            if not 0 < value < math.inf:
                raise RbeError(f"StreamAdam: {name} is {value}; it must be positive")
        named = [id(layer) for some, _ in self.parts for layer in some]
        if sorted(named) != sorted(map(id, layers)):
            raise RbeError("StreamAdam: the pairs of layers and bytes must name every open stream once")
        for some, size in self.parts:
            least = sum(map(_least, some))
            if size < least:
                raise RbeError(f"StreamAdam: bytes is {size}, but streams without any level take {least}; allow more")
        own = {id(layer.latent) for layer in layers}
        dense = [p for p in model.parameters() if id(p) not in own]
        groups = [
            {"role": "latent", "lr": lr, "params": [layer.latent for layer in some], **ABOUT} for some, _ in self.parts
        ]
        groups += [{"role": "dense", "lr": dense_lr, "params": dense}] if dense else []
        super().__init__(groups, lr, betas, eps)
        self.steps, self.every = steps, max(1, min(EVERY, steps // LEAST))
        self.costs: dict[Tensor, Tensor] = {}

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
        groups = self.param_groups[: len(self.parts)]
        if not self.costs and groups[0]["done"]:
            # Latents that have never had a gradient are where they were: their costs are made again, not saved.
            every = [latent for group in groups for latent in group["params"]]
            known = {p: self.state[p].get("cost") for p in every if p in self.state}
            self.costs = {p: price(p)[1] if known.get(p) is None else known[p] for p in every}
        weigh = groups[0]["done"] % self.every == 0
        # `.grad` is as backward left it again afterwards, for who adds to it or reads it.
        kept = {latent: latent.grad for group in groups for latent in group["params"] if latent.grad is not None}
        for group, (layers, size) in zip(groups, self.parts, strict=True):
            if weigh:
                self._weigh(group, layers, size)
            for latent in group["params"]:
                if latent in kept:
                    latent.grad = kept[latent].addcmul(self.costs[latent], latent.sign(), value=group["pressure"])
            group["done"] += 1
        try:
            super().step()
        finally:
            for latent, grad in kept.items():
                latent.grad = grad
        # Only after Adam has made its own state; saved and resumed with it.
        for latent, cost in self.costs.items():
            if self.state.get(latent) and (weigh or "cost" not in self.state[latent]):
                self.state[latent]["cost"] = cost
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what levels cost is that of the state.

        Raises:
            RbeError: the state is of another model or optimizer; nothing is changed then.
        """
        check(self, state_dict, lambda role, key, p: (p.shape,))
        if any(name not in group for group in state_dict["param_groups"][: len(self.parts)] for name in ABOUT):
            raise RbeError("StreamAdam: the state is of another optimizer; give what its own state_dict() returned")
        super().load_state_dict(state_dict)
        self.costs = {}

    def freeze(self) -> int:
        """Bring the streams to the bytes allowed and pack them, in place. The optimizer is then done.

        >>> from rbe.nn import StreamLinear
        >>> model = StreamLinear(16, 32)
        >>> StreamAdam(model, bytes=50, steps=50).freeze() == len(model.seed) <= 50
        True

        Returns:
            the bytes of all.
        """
        size = self.fit()
        for layers, _ in self.parts:
            for layer in layers:
                layer.freeze()
        return size

    def __getstate__(self) -> dict[str, Any]:
        """Copies have everything; torch's own keep groups and state alone."""
        own = ("parts", "steps", "every", "costs")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _weigh(self, group: dict[str, Any], layers: list[Stream], size: int) -> None:
        bits = 0.0
        for latent in group["params"]:
            part_bits, self.costs[latent] = price(latent)
            bits += part_bits
        if not group["pressure"]:
            group["fresh"], group["pressure"] = bits, PRESSURE * self._gradient(group)
        part = min(1.0, group["done"] / (REACH * self.steps))
        # Writing the streams takes longer than a step where there are millions of weights.
        if part >= NEAR and group["done"] % (COUNTED * self.every) == 0:
            group["true"] = 8 * _size(layers) / bits
        aim = 8 * AIM * size / group["true"]
        target = group["fresh"] * (aim / group["fresh"]) ** (1 - (1 - part) ** EASE)
        error = math.log(bits / target)
        change = INTEGRAL * error + PROPORTIONAL * (error - group["error"])
        group["pressure"] *= math.exp(max(-LIMIT, min(LIMIT, change)))
        group["error"] = error

    def _gradient(self, group: dict[str, Any]) -> float:
        """Mean gradient of a latent for a mean bit; next to nothing where there is none yet."""
        latents = [latent for latent in group["params"] if latent.grad is not None]
        cost = sum(float(self.costs[latent].sum()) for latent in latents)
        return sum(float(latent.grad.abs().sum()) for latent in latents) / cost + 1e-12 if cost else 1e-12

    def count(self) -> int:
        """Bytes of all seeds now.

        >>> from rbe.nn import StreamLinear
        >>> model = StreamLinear(16, 32)
        >>> StreamAdam(model, bytes=100, steps=50).count() == len(model.pack())
        True
        """
        return sum(_size(layers) for layers, _ in self.parts)

    def settle(self) -> bool:
        """Whether the streams should have their bytes by now; if so, they are made to fit.

        >>> from rbe.nn import StreamLinear
        >>> StreamAdam(StreamLinear(16, 32), bytes=100, steps=50).settle()  # no step is done
        False
        """
        settled: bool = self.param_groups[0]["done"] >= REACH * self.steps
        if settled:
            self.fit()
        return settled

    @torch.no_grad()
    def fit(self) -> int:
        """Set the weakest levels, those nearest to being rounded to 0, to 0 until the seeds have the bytes allowed.

        Returns:
            the bytes of all.
        """
        whole = 0
        for layers, allowed in self.parts:
            while (size := _size(layers)) > allowed:
                every = torch.cat([layer.latent.abs().flatten() for layer in layers])
                there = every[every.round() > 0].sort().values
                if not len(there):
                    break
                share = max(1, int(len(there) * min(0.5, 0.7 * (1 - allowed / size))))
                for layer in layers:
                    layer.latent[layer.latent.abs() <= there[share - 1]] = 0
            whole += size
        return whole


def _size(layers: Sequence[Stream]) -> int:
    """Bytes of the seeds of some layers."""
    return sum(len(layer.pack()) for layer in layers)
