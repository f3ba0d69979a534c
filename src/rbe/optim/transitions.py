"""Discrete bits by state transitions and by beam search: a forecast proposes, and the real loss decides.

Both look at the gradient by the dense weights, G, and at a curvature h: turning a block's weights from W to W' changes
the loss by about <G, W' - W> + h/2 |W' - W|^2. First order alone would always prefer the largest change.

Source: 003 sections 4.3.2 and 4.3.3, in the readings of docs/conformance.md.
"""

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
from rbe.optim.penalties import entropy_changes
from rbe.rotation import rotate
from rbe.search.beam import beam as search_beam
from rbe.search.blocks import Blocks, cut
from rbe.search.refine import Problem

FIELDS = ("quadrant", "hyp_freq", "geo_amp")
# Rejected proposals are tried again by halves, this often: one bad turn must not undo all good ones.
HALVINGS = 3
_CHUNK = 1 << 22
# Blocks of a beam search at a time: each has hundreds of states, each with a profile over the block's rings.
_BEAM_BLOCKS = 256

# Seeds whose bits shall turn, as flat indices (n,), and the masks of these bits (n,).
Moves = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one call of `flip` or `beam` did.

    Attributes:
        proposed, accepted: seeds changed in the trial, and kept; `flip` turns one bit of each.
        before, after: the loss of the batch, a reward taken off, without and with what was kept.
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


def check_options(what: str, share: float, tolerance: float) -> None:
    """Refuse what `flip` and `beam` have in common.

    Raises:
        RbeError: the share or the tolerance is out of range.
    """
    if not 0 < share <= 1:
        raise RbeError(f"{what}: share is {share}; give a number in (0, 1]")
    if not tolerance >= 0:
        raise RbeError(f"{what}: tolerance is {tolerance}; give 0 or more")


def _gradients(modules: Sequence[Seeded], closure: Callable[[], Tensor]) -> tuple[float, list[Blocks]]:
    """The loss, and its gradient by every module's blocks of unscaled weights; on the CPU, where bits are searched."""
    sums = [torch.zeros(m.spec.shape, device=m.scale.device) for m in modules]
    with ExitStack() as stack, torch.enable_grad():
        for module, total in zip(modules, sums, strict=True):
            stack.enter_context(module.listening(partial(_add, total)))
        loss = closure()
        if loss.ndim or not loss.requires_grad:
            raise RbeError("the closure must return the loss of the batch, one number with a gradient")
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
        blocks.append(cut(total.cpu(), spec))
    return _agreed(loss.detach()), blocks


def _repeatable(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure with the same random numbers at every call: dropout must not decide which bits are better."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(k) for k in devices]

    def again() -> Tensor:
        torch.set_rng_state(state)
        for k, one in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(one, k)
        return closure()

    return again


def _agreed(loss: Tensor) -> float:
    """The loss, the mean over all processes of a distributed run."""
    if distributed.is_available() and distributed.is_initialized():
        loss = loss.clone()
        distributed.all_reduce(loss)
        loss /= distributed.get_world_size()
    return float(loss)


def _seeds(module: Seeded) -> tuple[Tensor, Tensor, Tensor]:
    """Code, radius and angle of an open module, on the CPU."""
    return module.read_code().cpu(), module.radius.detach().cpu(), module.angle.detach().cpu()


def _weights(module: Seeded) -> Tensor:
    """Unscaled weights of an open module, (blocks, h, w)."""
    return formats.disk(module.spec.format).values(*_seeds(module), module.spec)


def curvature(module: Seeded, gradient: Blocks) -> float:
    """Of a loss for which a step of the size of the weights, against the gradient, is the best one."""
    size = (_weights(module).flatten(1) * gradient.exists).norm()
    return float(gradient.values.norm() / size) if size > 0 else 0.0


def _scores(module: Seeded, chosen: Tensor, gradient: Blocks, masks: Tensor) -> Tensor:
    """Forecast of the change of the loss by each neighbour of the chosen seeds: (chosen, neighbours)."""
    spec, disk = module.spec, formats.disk(module.spec.format)
    one = formats.make_spec(spec.format, spec.block_shape, block=spec.block, mode=spec.mode)
    block, stage = chosen // spec.stages, chosen % spec.stages
    code, radius, angle = (part[block, stage] for part in _seeds(module))
    now = disk.values(code[:, None], radius[:, None], angle[:, None], one)
    h = curvature(module, gradient)
    cells = spec.block_shape[0] * spec.block_shape[1]
    step = max(1, _CHUNK // (cells * len(masks)))
    found = []
    for k in range(0, len(chosen), step):
        part = slice(k, k + step)
        turned = (code[part, None] ^ masks).reshape(-1, 1)
        r, theta = (p[part, None].expand(-1, len(masks)).reshape(-1, 1) for p in (radius, angle))
        change = disk.values(turned, r, theta, one).reshape(-1, len(masks), cells) - now[part].reshape(-1, 1, cells)
        mine = gradient.part(block[part])
        change = change * mine.exists[:, None].to(change)  # padded cells make no difference
        found.append((change * mine.values[:, None]).sum(2) + h / 2 * change.square().sum(2))
    return torch.cat(found)


def _pick(module: Seeded, share: float, generator: torch.Generator) -> Tensor:
    """A share of the seeds of a module, as flat indices."""
    return (torch.rand(module.spec.blocks * module.spec.stages, generator=generator) < share).nonzero()[:, 0]


def draw(
    module: Seeded,
    gradient: Blocks,
    generator: torch.Generator,
    *,
    fields: Sequence[str],
    share: float,
    temperature: float,
    variety: float,
    free: Tensor | None,
) -> Moves:
    """A state transition for a share of the seeds: one bit, or none.

    Args:
        free: of formats with signs, (blocks, stages, 64), 0 where a sign is held.
    """
    spec = module.spec
    chosen, masks = _pick(module, share, generator), neighbours(spec, fields)
    if not len(chosen):
        return chosen, chosen
    scores = _scores(module, chosen, gradient, masks).double()
    if variety and spec.format == "packed128":
        code = module.read_code().cpu()
        mine = code.flatten()[chosen]
        table = entropy_changes(code)
        quadrants = packed128.fields(mine[:, None] ^ masks)["quadrant"]
        scores = scores - variety * table[packed128.fields(mine)["quadrant"][:, None], quadrants]
    size = scores.square().mean().sqrt()
    if not torch.isfinite(size) or size == 0:
        return chosen[:0], chosen[:0]
    # Staying has the score 0; scores are measured in their own size, so that a temperature means the same everywhere.
    logits = torch.cat([torch.zeros(len(chosen), 1, dtype=torch.float64), -scores / (size * temperature)], 1)
    if free is not None:
        held = outer128.code_of(torch.where(free.reshape(-1, 64).cpu()[chosen] == 0, 1.0, -1.0), spec)
        logits[:, 1:] = torch.where((held[:, None] & masks) != 0, -torch.inf, logits[:, 1:])
    drawn = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    moves = drawn > 0
    return chosen[moves], masks[drawn[moves] - 1]


def beam(
    module: Seeded,
    gradient: Blocks,
    generator: torch.Generator,
    *,
    fields: Sequence[str],
    share: float,
    width: int,
    rounds: int,
    h: float,
) -> Moves:
    """The best code that a beam search finds for a share of the seeds, the largest forecast gain first.

    The forecast is h/2 |W' - (W - G/h)|^2 and a constant: a search by `rbe.search.beam` for the block W - G/h.
    """
    spec = module.spec
    chosen = _pick(module, share, generator)
    if not len(chosen) or not 0 < h < math.inf:
        return chosen[:0], chosen[:0]
    one = formats.make_spec(spec.format, spec.shape, block=spec.block, mode=spec.mode)
    codes, radii, angles = (part.flatten() for part in _seeds(module))
    masks, gains = [], []
    for some in chosen.split(_BEAM_BLOCKS):  # type: ignore[no-untyped-call]
        block = some // spec.stages
        code = codes[some, None]
        radius, angle = (p[some, None].double() for p in (radii, angles))
        part = Blocks(one, gradient.values, gradient.kind, gradient.masks).part(block)
        now = packed128.values(code, radius, angle, one).flatten(1)
        wanted = (now - part.values.double() / h) * part.exists
        problem = Problem(part.with_values(wanted), code)
        found, loss = search_beam(problem, radius, angle, width, rounds, fields)
        masks.append((found ^ code)[:, 0])
        gains.append((problem.loss(radius, angle) - loss) * problem.energy())
    mask, order = torch.cat(masks), torch.cat(gains).argsort(descending=True, stable=True)
    order = order[mask[order] != 0]
    return chosen[order], mask[order]


def transit(
    modules: Sequence[Seeded],
    closure: Callable[[], Tensor],
    propose: Callable[[Seeded, Blocks], Moves],
    tolerance: float,
    tries: int = 1,
    humbler: Callable[[], object] = lambda: None,
    reward: Callable[[], float] = lambda: 0.0,
) -> tuple[Outcome, list[Tensor]]:
    """Change discrete bits in all modules together, and keep the changes where the loss of the same batch agrees.

    Args:
        propose: what to try in a module, from the gradient by its blocks.
        tries: proposals that may be refused; the last one is tried by halves too.
        humbler: called after a refusal, before `propose` is asked again.
        reward: what is taken off the loss of the seeds as they are.

    Returns:
        what happened, and per module a bool (blocks, stages) of the seeds that changed.
    """
    closure = _repeatable(closure)
    before, gradients = _gradients(modules, closure)
    before -= reward()
    old = [m.read_code().clone() for m in modules]
    proposed, kept, best = 0, 0, before

    def attempt(moves: list[Moves], lo: float, hi: float, halvings: int) -> None:
        nonlocal kept, best
        some = [tuple(part[int(lo * len(part)) : int(hi * len(part))] for part in move) for move in moves]
        if not any(len(seeds) for seeds, _ in some):
            return
        start = [m.read_code().clone() for m in modules]
        for module, code, (seeds, masks) in zip(modules, start, some, strict=True):
            turned = code.clone()
            flat = turned.view(-1)
            seeds, masks = seeds.to(flat.device), masks.to(flat.device)
            flat[seeds] = flat[seeds] ^ masks
            module.write_code(turned)
        try:
            with torch.no_grad():
                loss = _agreed(closure().detach()) - reward()
        except BaseException:  # an interrupt, too, leaves no bits behind that nobody judged
            for module, code in zip(modules, old, strict=True):
                module.write_code(code)
            raise
        # What one half of the changes may cost, the other half may not once more.
        if math.isfinite(loss) and loss <= min(best, before) + tolerance:
            best, kept = loss, kept + sum(len(seeds) for seeds, _ in some)
            return
        for module, code in zip(modules, start, strict=True):
            module.write_code(code)
        if halvings:
            attempt(moves, lo, (lo + hi) / 2, halvings - 1)
            attempt(moves, (lo + hi) / 2, hi, halvings - 1)

    for k in range(tries):
        moves = [propose(module, gradient) for module, gradient in zip(modules, gradients, strict=True)]
        proposed = sum(len(seeds) for seeds, _ in moves)
        attempt(moves, 0.0, 1.0, HALVINGS if k + 1 == tries else 0)
        if kept or not proposed:
            break
        humbler()
    changed = [module.read_code() != code for module, code in zip(modules, old, strict=True)]
    return Outcome(proposed, kept, before, best), changed
