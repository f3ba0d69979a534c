"""Encode into `packed128` seeds: proposal, pursuit over the stages, quantisation, refinement (design 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rbe.search.blocks import Blocks
from rbe.search.proposal import FLAT, Atoms, Grid, propose, stack


@dataclass(frozen=True)
class Effort:
    """How hard to search.

    Attributes:
        grid: of the profiles.
        sweeps: how often every stage is searched again beside the others.
    """

    grid: Grid
    sweeps: int


EFFORTS = {
    "fast": Effort(Grid(17, 4, 1), 0),
    "balanced": Effort(Grid(33, 8, 4), 1),
    "best": Effort(Grid(65, 12, 8), 3),
}


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


def _rest(blocks: Blocks, atoms: Atoms) -> Blocks:
    """What the atoms leave of the blocks."""
    made = (atoms.coefficients[:, None] @ atoms.basis(blocks.spec.block_shape))[:, 0]
    return blocks.with_values(blocks.values.double() - made * blocks.exists)


def refit(blocks: Blocks, atoms: Atoms) -> Atoms:
    """All amplitudes and phases of a block solved together."""
    table = atoms.basis(blocks.spec.block_shape) * blocks.exists[:, None]
    system = table @ table.mT
    trace = system.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny)
    system = system + torch.diag_embed(1e-9 * trace + 1e-14 * trace.amax(1, keepdim=True))
    solved: Tensor = torch.linalg.solve(system, table @ blocks.values.double()[..., None])
    return atoms.with_coefficients(solved[..., 0])


def _better(blocks: Blocks, one: Atoms, other: Atoms) -> Atoms:
    """The atoms that leave less, block by block."""
    left = [_rest(blocks, atoms).values.square().sum(1, keepdim=True) for atoms in (one, other)]
    pairs = zip(one.tables, other.tables, strict=True)
    return Atoms(*(torch.where(left[1] < left[0], b, a) for a, b in pairs))
