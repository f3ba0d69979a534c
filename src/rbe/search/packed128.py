"""Encode into `packed128` seeds: proposal, pursuit over the stages, quantisation, refinement (docs/format.md)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbe.search.beam import beam
from rbe.search.blocks import Blocks
from rbe.search.proposal import FLAT, Atoms, Grid, propose, stack
from rbe.search.quantise import quantise
from rbe.search.refine import Fit, Problem, Stop, levenberg_marquardt


@dataclass(frozen=True)
class Effort:
    """How hard to search.

    Attributes:
        grid: of the profiles.
        sweeps: how often every stage is searched again beside the others.
        steps: of the refinement of the quantised seeds.
        beams: how often beam search and refinement follow each other.
    """

    grid: Grid
    sweeps: int
    steps: int
    beams: int


EFFORTS = {
    "fast": Effort(Grid(17, 4, 1), 0, 0, 0),
    "balanced": Effort(Grid(33, 8, 4), 1, 5, 0),
    "best": Effort(Grid(65, 12, 8), 3, 20, 1),
}


# Ridge of the joint fit, for every cell: two stages alike would cancel each other with amplitudes that decide the scale
# of the whole matrix. This bounds them to some times the block's size.
_RIDGE = 1e-4


def pursue(blocks: Blocks, effort: Effort) -> Atoms:
    """As many atoms a block as there are stages, one after the other, with all amplitudes and phases solved again.

    Source: matching pursuit with the refit of its orthogonal form (Pati, Rezaiifar, Krishnaprasad 1993).
    """
    grid = FLAT if blocks.spec.mode == "faithful" else effort.grid
    found = propose(blocks, grid)
    for _ in range(1, blocks.spec.stages):
        found = refit(blocks, stack([found, propose(_rest(blocks, found), grid)], 1))
    if blocks.spec.stages > 1:
        for _ in range(effort.sweeps):
            for s in range(blocks.spec.stages):
                others = [found.stage(k) for k in range(blocks.spec.stages) if k != s]
                again = propose(_rest(blocks, stack(others, 1)), grid)
                order = [*others[:s], again, *others[s:]]
                found = _better(blocks, found, refit(blocks, stack(order, 1)))
    return found


def finish(blocks: Blocks, atoms: Atoms, scale: float, effort: Effort) -> tuple[Tensor, Tensor, Tensor]:
    """(code, radius, angle) of atoms: quantised, then refined with the discrete bits that came out."""
    code, radius, angle = quantise(atoms, scale, blocks.spec)
    problem = Problem(blocks.with_values(blocks.values.double() / scale), code)
    fit = levenberg_marquardt(problem, radius, angle, Stop(steps=effort.steps))
    for _ in range(effort.beams):
        problem, fit = _flip(problem, fit, effort)
    return problem.code, fit.radius, fit.angle


def _flip(problem: Problem, fit: Fit, effort: Effort) -> tuple[Problem, Fit]:
    """One round of beam search over every stage, and a refinement."""
    blocks, code = problem.blocks, problem.code.clone()
    alone = replace(blocks.spec, stages=1, bits=blocks.spec.bits / blocks.spec.stages)
    for s in range(code.shape[1]):
        single = Problem(replace(blocks, spec=alone), code[:, s : s + 1])
        radius, angle = fit.radius[:, s : s + 1], fit.angle[:, s : s + 1]
        own = blocks.values - single.errors(radius, angle)
        rest = Problem(blocks, code).errors(fit.radius, fit.angle) + own * blocks.exists
        code[:, s] = beam(Problem(replace(blocks, spec=alone, values=rest), code[:, s : s + 1]), radius, angle)[0][:, 0]
    other = Problem(blocks, code)
    again = levenberg_marquardt(other, fit.radius, fit.angle, Stop(steps=effort.steps))
    # Large blocks are searched on rings of a finite width: what counts is the true loss.
    better = again.loss < fit.loss
    chosen = Problem(blocks, torch.where(better[:, None], code, problem.code))
    pairs = ((again.radius, fit.radius), (again.angle, fit.angle))
    radius, angle = (torch.where(better[:, None], new, old) for new, old in pairs)
    return chosen, Fit(radius, angle, torch.minimum(again.loss, fit.loss), fit.converged | again.converged)


def _rest(blocks: Blocks, atoms: Atoms) -> Blocks:
    """What the atoms leave of the blocks."""
    made = (atoms.coefficients[:, None] @ atoms.basis(blocks.spec.block_shape))[:, 0]
    return blocks.with_values(blocks.values.double() - made * blocks.exists)


def refit(blocks: Blocks, atoms: Atoms) -> Atoms:
    """All amplitudes and phases of a block solved together."""
    table = atoms.basis(blocks.spec.block_shape) * blocks.exists[:, None]
    system = table @ table.mT
    ridge = _RIDGE * table.shape[2] * atoms.peaks().square()
    system = system + torch.diag_embed(ridge)
    solved: Tensor = torch.linalg.solve(system, table @ blocks.values.double()[..., None])
    return atoms.with_coefficients(solved[..., 0])


def _better(blocks: Blocks, one: Atoms, other: Atoms) -> Atoms:
    """The atoms that leave less, block by block."""
    left = [_rest(blocks, atoms).values.square().sum(1, keepdim=True) for atoms in (one, other)]
    pairs = zip(one.tables, other.tables, strict=True)
    return Atoms(*(torch.where(left[1] < left[0], b, a) for a, b in pairs))
