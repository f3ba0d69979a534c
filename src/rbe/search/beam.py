"""Beam search over the discrete bits of `packed128`, the point (r, theta) held: one bit is flipped at a time.

A state's loss needs the sums over the rings of the block only (`rbe.search.rings`), so 416 neighbours of 16 states a
block are weighed at once for all blocks.

Source: 003 section 4.3.2.3; reading 14 of the sources (the fields searched, 26 bits).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.search.refine import Problem
from rbe.search.rings import gram, rings, sums

WIDTH = 16
FIELDS = ("quadrant", "hyp_freq", "geo_amp")


def _flips(fields: Sequence[str]) -> Tensor:
    """One word for every bit of the fields that means anything, with this bit alone set."""
    out, high = [], 64
    table = packed128.LAYOUT.words[0]
    unknown = set(fields) - {f.name for f in table}
    if unknown or not fields:
        raise RbeError(f"beam: fields {tuple(fields)} are not among {', '.join(f.name for f in table)}; choose some")
    for field in table:
        high -= field.width
        if field.name in fields:
            width = packed128.STEPS if field.name == "cordic_seq" else field.width
            out += [high + bit for bit in range(width)]
    return torch.tensor([(1 << bit) if bit < 63 else -(1 << 63) for bit in out])


class _Waves:
    """Inner products of the waves of codes (blocks, states) at amplitude 1: with the block, and with themselves."""

    def __init__(self, problem: Problem, radius: Tensor, angle: Tensor) -> None:
        blocks = problem.blocks
        self.faithful, self.kind = blocks.spec.mode == "faithful", blocks.kind
        self.rho = rings(*blocks.spec.block_shape).radius
        self.inner, self.norms = sums(blocks).transpose(1, 2), gram(blocks).transpose(1, 2)
        self.radius, self.angle = radius, angle
        if self.faithful:
            self.radius, self.rho = packed128.final_radius(radius)[0], torch.ones_like(self.rho)

    def __call__(self, code: Tensor) -> tuple[Tensor, Tensor]:
        part = packed128.fields(code)
        q, quadrant = part["basis_sel"], part["quadrant"]
        frequency = part["hyp_freq"] if self.faithful else part["hyp_freq"].clamp_min(1)
        alpha = frequency.double() * (packed128.LARGEST_FREQUENCY / 4095.0)
        unit = torch.ones_like(alpha)
        if not self.faithful:
            alpha = alpha * packed128.GAIN
            unit = 1.0 / torch.where(quadrant == 3, 1.0, packed128.basis(quadrant, alpha)[0])
        profile = _function(quadrant[..., None], (alpha * self.radius[:, None])[..., None] * self.rho)
        phase = q * (self.angle[:, None] + packed128.turn(part["cordic_seq"]))
        cos, sin = torch.cos(phase), torch.sin(phase)
        odd = q >= 32
        first, second = torch.where(odd, sin, cos), torch.where(odd, cos, -sin)  # of cos(q a) and sin(q a)
        # Where all states of a block have one wave, its sums are read once.
        same = bool((q == q[:, :1]).all())
        rows, which = torch.arange(len(q))[:, None], (q[:, :1] if same else q)
        inner, norms = self.inner[rows, which], self.norms[self.kind[:, None], which]
        c, s = ((inner[:, :, k] * profile).sum(-1) for k in range(2))
        profile.square_()
        cc, cs, ss = ((norms[:, :, k] * profile).sum(-1) for k in range(3))
        known = unit * (first * c + second * s)
        return known, unit.square() * (first.square() * cc + 2.0 * first * second * cs + second.square() * ss)


def _function(quadrant: Tensor, x: Tensor) -> Tensor:
    """The basis functions from one exponential; a search needs no more than twelve digits."""
    up = torch.exp(x)
    down = 1.0 / up
    sinh, cosh = 0.5 * (up - down), 0.5 * (up + down)
    # sinh, cosh, tanh = sinh / cosh, sech^2 = 1 / cosh^2.
    top = torch.where(quadrant == 1, cosh, torch.where(quadrant == 3, 1.0 / cosh, sinh))
    return torch.where(quadrant < 2, top, top / cosh)


def _amplitude(code: Tensor) -> Tensor:
    return 2.0 * packed128.fields(code)["geo_amp"].double() / 4095.0 - 1.0


def beam(
    problem: Problem,
    radius: Tensor,
    angle: Tensor,
    width: int = WIDTH,
    rounds: int = 8,
    fields: Sequence[str] = FIELDS,
) -> tuple[Tensor, Tensor]:
    """Better discrete bits for one stage: code int64 (blocks, 1) and its loss (blocks,), never above the first one's.

    >>> from rbe import formats
    >>> from rbe.search.blocks import cut
    >>> spec = formats.make_spec("packed128", (16, 16))
    >>> table = torch.tensor([[1, 700, 900, 3, 0], [1, 701, 908, 3, 0]])
    >>> first, wanted = packed128.code_of(*table.T).reshape(2, 1, 1)
    >>> point = torch.tensor([[0.5]]).double(), torch.tensor([[1.0]]).double()
    >>> W = packed128.values(wanted, *point, spec)[0]
    >>> code, loss = beam(Problem(cut(W, spec), first), *point)
    >>> loss.item() < 1e-9
    True

    Args:
        problem: blocks and the code to start from, one stage.
        radius, angle: float64 (blocks, 1).
        width: states kept a block (K).
        rounds: the most rounds; it ends where no block finds anything better.
        fields: the fields whose bits are flipped: any of those of the code.

    Raises:
        RbeError: there are several stages, or a field is unknown.
    """
    if problem.code.shape[1] != 1:
        raise RbeError(f"beam: {problem.code.shape[1]} stages; search one stage at a time, on what the others leave")
    amplitude_flips = _flips(["geo_amp"]) if "geo_amp" in fields else torch.empty(0, dtype=torch.int64)
    others = [f for f in fields if f != "geo_amp"]
    wave_flips = _flips(others) if others or not fields else torch.empty(0, dtype=torch.int64)
    waves, energy = _Waves(problem, radius[:, 0], angle[:, 0]), problem.energy()[:, None]

    def loss(code: Tensor, known: Tensor, size: Tensor) -> Tensor:
        a = _amplitude(code)
        return 1.0 + (a * a * size - 2.0 * a * known) / energy

    states = problem.code
    known, size = waves(states)
    value = loss(states, known, size)
    for _ in range(rounds):
        turned = (states[:, :, None] ^ wave_flips).flatten(1)
        louder = (states[:, :, None] ^ amplitude_flips).flatten(1)
        # A flip of the amplitude leaves the wave as it is.
        as_before = [table.repeat_interleave(len(amplitude_flips), 1) for table in (known, size)]
        tables = [torch.cat(t, 1) for t in zip((known, size), waves(turned), as_before, strict=True)]
        # A state that is reached twice counts once.
        every, order = torch.cat([states, turned, louder], 1).sort(1)
        tables = [table.gather(1, order) for table in tables]
        found = loss(every, *tables)
        again = torch.zeros_like(found, dtype=torch.bool)
        again[:, 1:] = every[:, 1:] == every[:, :-1]
        best, where = torch.where(again, torch.inf, found).topk(min(width, found.shape[1]), dim=1, largest=False)
        improved = bool((best[:, 0] < value[:, 0]).any())
        states, value = every.gather(1, where), best
        known, size = (table.gather(1, where) for table in tables)
        if not improved:
            break
    return states[:, :1], value[:, 0]
