"""`StreamAdam`: training of streams under a number of bytes; every level is weighed by the bits it costs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn.stream import streams

# Steps between two estimates of what the streams cost.
EVERY = 10
# Share of the run after which the number of bytes is reached.
REACH = 0.5
# From this share of that time on the true bytes are counted at every so many estimates; before, they decide nothing.
NEAR, COUNTED = 0.8, 5
# The bytes aimed at, below those allowed: the last steps turn single levels on and off.
AIM = 0.995


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
    size = latent.abs().round()
    there = (size > 0).to(latent.dtype)
    rows, columns = there.shape
    in_row, in_column, count = there.sum(1, keepdim=True), there.sum(0, keepdim=True), there.sum()

    def odds(some: Tensor, every: int) -> Tensor:
        return torch.log((some + 0.3) / (every - some + 0.3))

    logit = odds(in_row, columns) + odds(in_column, rows) - odds(count, rows * columns)
    # The product of the odds is shifted until it expects as many levels as there are.
    for _ in range(3):
        p = torch.sigmoid(logit)
        logit = logit - ((p.sum() - count) / ((p * (1 - p)).sum() + 1e-6)).clamp(-2, 2)
    places = _bits(logit, there)
    learning = 0.5 * float(torch.log2(1 + in_row).sum() + torch.log2(1 + in_column).sum())
    sizes, further, left, level = 0.0, 0.7, float(count), 1
    while left and level < 20:
        more = float((size > level).sum())
        p_more = (more + 0.5) / (left + 1)
        sizes += 2 - more * math.log2(p_more) - (left - more) * math.log2(1 - p_more)
        further = max(0.7, math.log2((1 - p_more) / p_more)) if level == 1 else further
        left, level = more, level + 1
    first = (-logit / math.log(2)).clamp_min(0.3) + 1
    each = torch.where(latent.abs() < 1, first, torch.full_like(first, further))
    return places + learning + float(count) + sizes, each


def _bits(logit: Tensor, there: Tensor) -> float:
    """Bits of yes and no answers whose log-odds are known."""
    yes, no = nn.functional.softplus(-logit), nn.functional.softplus(logit)
    return float((yes * there + no * (1 - there)).sum()) / math.log(2)


class StreamAdam(torch.optim.Adam):
    """Adam that brings the streams of a model to a number of bytes within half of the steps, and keeps them there.

    To the gradient of every latent it adds what one more step away from 0 costs there in bits, times a pressure that
    follows how far the streams are from the bytes of the moment: those go down evenly, in logarithm, from the bytes of
    the fresh model. A level is thus given up where it serves the loss less than its bits do elsewhere, and comes back
    where the gradient says it is worth them.

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
        bytes: of all seeds together.
        steps: of the whole run.
        lr: learning rate of latents, in levels; dense_lr: of everything else, logarithms of scales too.
        betas, eps: as in Adam.

    Raises:
        RbeError: there is no open stream, or a number is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        bytes: int,
        steps: int,
        lr: float = 2e-2,
        *,
        dense_lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in {"bytes": bytes, "steps": steps, "lr": lr, "dense_lr": dense_lr}.items():
            if not 0 < value < math.inf:
                raise RbeError(f"StreamAdam: {name} is {value}; it must be positive")
        self.layers = [layer for layer in streams(model) if layer.trainable]
        if not self.layers:
            raise RbeError("StreamAdam: the model has no open streams; build it of rbe.nn.StreamLinear, StreamConv2d")
        latents = [layer.latent for layer in self.layers]
        own = {id(p) for p in latents}
        dense = [p for p in model.parameters() if id(p) not in own]
        # In the group, so that a state dict has them: the pressure, steps done, bits at the start, true to estimated.
        about = {"pressure": 1e-7, "done": 0, "fresh": 0.0, "true": 1.0}
        groups = [{"role": "latent", "lr": lr, "params": latents, **about}]
        groups += [{"role": "dense", "lr": dense_lr, "params": dense}] if dense else []
        super().__init__(groups, lr, betas, eps)
        self.bytes, self.steps = bytes, steps
        self.costs: list[Tensor] = []

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
        group = self.param_groups[0]
        if not self.costs and group["done"]:
            self.costs = [self.state[latent]["cost"] for latent in group["params"]]
        weigh = group["done"] % EVERY == 0
        if weigh:
            self._weigh(group)
        for latent, cost in zip(group["params"], self.costs, strict=True):
            if latent.grad is not None:
                latent.grad.addcmul_(cost, latent.sign(), value=group["pressure"])
        super().step()
        if weigh:
            # Only after Adam has made its own state; saved and resumed with it.
            for latent, cost in zip(group["params"], self.costs, strict=True):
                self.state[latent]["cost"] = cost
        group["done"] += 1
        return loss

    def _weigh(self, group: dict[str, Any]) -> None:
        found = [price(latent) for latent in group["params"]]
        self.costs = [cost for _, cost in found]
        bits = sum(bits for bits, _ in found)
        group["fresh"] = group["fresh"] or bits
        part = min(1.0, group["done"] / (REACH * self.steps))
        # Writing the streams takes longer than a step where there are millions of weights.
        if part >= NEAR and group["done"] % (COUNTED * EVERY) == 0:
            group["true"] = 8 * self.count() / bits
        aim = 8 * AIM * self.bytes / group["true"]
        target = group["fresh"] * (aim / group["fresh"]) ** part
        group["pressure"] *= math.exp(max(-0.3, min(0.3, 0.1 * math.log(bits / target))))

    def count(self) -> int:
        """Bytes of all seeds now."""
        return sum(len(layer.pack()) for layer in self.layers)

    def settle(self) -> bool:
        """Whether the streams should have their bytes by now; if so, they are made to fit."""
        settled: bool = self.param_groups[0]["done"] >= REACH * self.steps
        if settled:
            self.fit()
        return settled

    @torch.no_grad()
    def fit(self) -> int:
        """Set the weakest levels, those nearest to being rounded to 0, to 0 until the seeds have the bytes allowed.

        Returns:
            their bytes.
        """
        while (size := self.count()) > self.bytes:
            every = torch.cat([layer.latent.abs().flatten() for layer in self.layers])
            there = every[every.round() > 0].sort().values
            if not len(there):
                break
            share = max(1, int(len(there) * min(0.5, 0.7 * (1 - self.bytes / size))))
            for layer in self.layers:
                layer.latent[layer.latent.abs() <= there[share - 1]] = 0
        return size
