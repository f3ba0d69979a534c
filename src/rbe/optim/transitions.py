"""Discrete bits by state transitions: scores for all one-bit neighbours, a draw, and the real loss to decide."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, outer128, packed128
from rbe.nn.seeded import Seeded
from rbe.rotation import rotate

FIELDS = ("quadrant", "hyp_freq", "geo_amp")
# Rejected proposals are tried again by halves, this often: one bad turn must not undo all good ones.
HALVINGS = 3
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Outcome:
    """What one call of `flip` did.

    Attributes:
        proposed, accepted: bits turned in the trial, and kept.
        before, after: the loss of the batch without and with what was kept.
    """

    proposed: int
    accepted: int
    before: float
    after: float


def neighbours(spec: SeedSpec, fields: Sequence[str]) -> Tensor:
    """The bits of a code word that may turn, as int64 masks (neighbours,).

    >>> neighbours(formats.make_spec("packed128", (16, 16)), ("quadrant",)).tolist()
    [4611686018427387904, -9223372036854775808]

    Raises:
        RbeError: there is no such field, or the format has no discrete bits.
    """
    if spec.format == "packed64":
        raise RbeError("flip: packed64 has no discrete bits")
    if spec.format == "outer128":
        edge, room = spec.block_shape[0], 32 // outer128.terms(spec)
        bits = [room * part + i for part in range(64 // room) for i in range(min(edge, room))]
    else:
        places, top = {}, 64
        for field in packed128.LAYOUT.words[0]:
            top -= field.width
            # Of the CORDIC bits only the first twenty steer a step.
            places[field.name] = range(top, top + min(field.width, packed128.STEPS))
        unknown = [name for name in fields if name not in places]
        if unknown or not fields:
            raise RbeError(f"flip: fields {list(fields)} are not of packed128; choose among {', '.join(places)}")
        bits = [bit for name in fields for bit in places[name]]
    return torch.tensor([(1 << bit) - (1 << 64 if bit == 63 else 0) for bit in bits])


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient


def _gradients(modules: Sequence[Seeded], closure: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    """The loss, and its gradient by every module's blocks (blocks, h, w) of unscaled weights."""
    sums = [torch.zeros(m.spec.shape) for m in modules]
    with ExitStack() as stack, torch.enable_grad():
        for module, total in zip(modules, sums, strict=True):
            stack.enter_context(module.listening(partial(_add, total)))
        loss = closure()
        if loss.ndim or not loss.requires_grad:
            raise RbeError("flip: the closure must return the loss of the batch, one number with a gradient")
        loss.backward()  # type: ignore[no-untyped-call]
    blocks = []
    for module, total in zip(modules, sums, strict=True):
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
            total /= distributed.get_world_size()
        spec = module.spec
        total = rotate(rotate(total, spec.rotation[1]).T, spec.rotation[0]).T * module.scale.detach()
        if module.row_scale is not None:
            total = total * module.row_scale.float()[:, None]
        (height, width), (rows, columns) = spec.block_shape, spec.shape
        padded = torch.nn.functional.pad(total, (0, spec.padded[1] - columns, 0, spec.padded[0] - rows))
        grid = padded.reshape(spec.grid[0], height, spec.grid[1], width)
        blocks.append(grid.transpose(1, 2).reshape(-1, height, width))
    return _agreed(loss.detach()), blocks


def _agreed(loss: Tensor) -> float:
    """The loss, the mean over all processes of a distributed run."""
    if distributed.is_available() and distributed.is_initialized():
        loss = loss.clone()
        distributed.all_reduce(loss)
        loss /= distributed.get_world_size()
    return float(loss)


def _scores(module: Seeded, chosen: Tensor, gradient: Tensor, masks: Tensor) -> Tensor:
    """Forecast of the change of the loss by each neighbour of the chosen seeds: (chosen, neighbours).

    First order alone would always prefer the largest change. The curvature added is that of a loss for which a step of
    the size of the weights, against the gradient, is the best one.
    """
    spec, disk = module.spec, formats.disk(module.spec.format)
    one = formats.make_spec(spec.format, spec.block_shape, block=spec.block, mode=spec.mode)
    block, stage = chosen // spec.stages, chosen % spec.stages
    code = module.read_code()[block, stage]
    radius, angle = module.radius.detach()[block, stage], module.angle.detach()[block, stage]
    now = disk.values(code[:, None], radius[:, None], angle[:, None], one)
    weights = disk.values(module.read_code(), module.radius.detach(), module.angle.detach(), spec)
    size = weights.norm()
    curvature = gradient.norm() / size if size > 0 else size
    height, width = spec.block_shape
    step = max(1, _CHUNK // (height * width * len(masks)))
    found = []
    for k in range(0, len(chosen), step):
        part = slice(k, k + step)
        turned = (code[part, None] ^ masks).reshape(-1, 1)
        r, theta = (p[part, None].expand(-1, len(masks)).reshape(-1, 1) for p in (radius, angle))
        change = disk.values(turned, r, theta, one).reshape(-1, len(masks), height, width) - now[part, None]
        slope = (change * gradient[block[part]][:, None]).sum((2, 3))
        found.append(slope + curvature / 2 * change.square().sum((2, 3)))
    return torch.cat(found)


def _variety(code: Tensor) -> Tensor:
    """Change of the entropy of the quadrants, in nats, by turning each quadrant to each other: (4, 4)."""
    counts = torch.bincount(packed128.fields(code)["quadrant"].flatten(), minlength=4).double()

    def entropy(n: Tensor) -> Tensor:
        p = n / n.sum()
        return -torch.xlogy(p, p).sum()

    change = torch.zeros(4, 4, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            if a != b and counts[a] > 0:
                moved = counts.clone()
                moved[a] -= 1
                moved[b] += 1
                change[a, b] = entropy(moved) - entropy(counts)
    return change


def _draw(
    module: Seeded,
    gradient: Tensor,
    fields: Sequence[str],
    share: float,
    temperature: float,
    variety: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Seeds whose bits shall turn, as flat indices (n,), and the masks of these bits (n,)."""
    spec = module.spec
    picked = torch.rand(spec.blocks * spec.stages, generator=generator) < share
    chosen = picked.nonzero()[:, 0]
    masks = neighbours(spec, fields)
    if not len(chosen):
        return chosen, chosen
    scores = _scores(module, chosen, gradient, masks).double()
    if variety and spec.format == "packed128":
        code = module.read_code()
        mine = code.flatten()[chosen]
        table = _variety(code)
        quadrants = packed128.fields(mine[:, None] ^ masks)["quadrant"]
        scores = scores - variety * table[packed128.fields(mine)["quadrant"][:, None], quadrants]
    size = scores.square().mean().sqrt()
    if not torch.isfinite(size) or size == 0:
        return chosen[:0], chosen[:0]
    # Staying has the score 0; scores are measured in their own size, so that a temperature means the same everywhere.
    logits = torch.cat([torch.zeros(len(chosen), 1, dtype=torch.float64), -scores / (size * temperature)], 1)
    drawn = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    moves = drawn > 0
    return chosen[moves], masks[drawn[moves] - 1]


def flip(
    modules: Sequence[Seeded],
    closure: Callable[[], Tensor],
    *,
    share: float,
    temperature: float,
    fields: Sequence[str],
    tolerance: float,
    variety: float,
    generator: torch.Generator,
) -> tuple[Outcome, list[Tensor]]:
    """Propose turned bits in all modules together, and keep them where the loss of the same batch agrees.

    Returns:
        what happened, and per module a bool (blocks, stages) of the seeds that changed.
    """
    before, gradients = _gradients(modules, closure)
    moves = [
        _draw(m, g, fields, share, temperature, variety, generator) for m, g in zip(modules, gradients, strict=True)
    ]
    old = [m.read_code().clone() for m in modules]
    changed = [torch.zeros(m.spec.blocks, m.spec.stages, dtype=torch.bool) for m in modules]
    proposed = sum(len(seeds) for seeds, _ in moves)
    kept, best = 0, before

    def trial(lo: float, hi: float) -> list[tuple[Tensor, Tensor]]:
        return [tuple(part[int(lo * len(part)) : int(hi * len(part))] for part in move) for move in moves]  # type: ignore[misc]

    def attempt(lo: float, hi: float, depth: int) -> None:
        nonlocal kept, best
        some = trial(lo, hi)
        if not any(len(seeds) for seeds, _ in some):
            return
        start = [m.read_code().clone() for m in modules]
        for module, (seeds, masks) in zip(modules, some, strict=True):
            code = module.read_code().clone()
            flat = code.view(-1)
            flat[seeds] = flat[seeds] ^ masks
            module.write_code(code)
        with torch.no_grad():
            loss = _agreed(closure().detach())
        if math.isfinite(loss) and loss <= best + tolerance:
            best, kept = loss, kept + sum(len(seeds) for seeds, _ in some)
            return
        for module, code in zip(modules, start, strict=True):
            module.write_code(code)
        if depth < HALVINGS:
            attempt(lo, (lo + hi) / 2, depth + 1)
            attempt((lo + hi) / 2, hi, depth + 1)

    attempt(0.0, 1.0, 0)
    for module, code, mark in zip(modules, old, changed, strict=True):
        mark |= module.read_code() != code
    return Outcome(proposed, kept, before, best), changed
