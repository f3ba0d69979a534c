"""Encode into `outer128` seeds: alternating fits of sign vectors, term after term, with all coefficients solved again.

For a residue R the best term a u v^T has a = u^T R v / cells, and for a fixed v the best u is sign(R v). Alternating
never lowers |u^T R v|; several starts find better ends. Terms are found greedily and then, each beside the others,
again.
"""

import torch
from torch import Tensor

from rbe.formats import SeedSpec, outer128
from rbe.mixing import signs
from rbe.search.blocks import Blocks

# effort -> (starting vectors a term, sweeps over the terms)
EFFORTS = {"fast": (4, 1), "balanced": (16, 3), "best": (64, 8)}
_ROUNDS = 12
# Length of the longest coefficient pair in tangent space: r = tanh(2) = 0.96, where float32 still has 22 bits of it.
_LONGEST = 4.0


def _folded(residue: Tensor, edge: int) -> Tensor:
    """In blocks of 64 a bit stands for two rows or columns: their sum, with the fixed signs (n, 32, 32)."""
    if edge <= 32:
        return residue
    fixed = signs(edge, 0).to(residue)
    return (residue * fixed[:, None] * fixed).reshape(-1, 2, 32, 2, 32).sum((1, 3))


def _term(residue: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The best pair of sign vectors (n, w) each, of residues (n, w, w), from starting vectors (starts, w)."""
    v = starts.T.expand(residue.shape[0], -1, -1)
    for _ in range(_ROUNDS):
        u = _sign(residue @ v)
        v = _sign(residue.mT @ u)
    gain = (u * (residue @ v)).sum(1)  # (n, starts); not negative, because v answers to u
    best = gain.argmax(1)[:, None, None].expand(-1, residue.shape[1], 1)
    return u.gather(2, best)[..., 0], v.gather(2, best)[..., 0]


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x)


def pursue(blocks: Blocks, effort: str) -> tuple[Tensor, Tensor]:
    """Signs (n, stages, 64) and coefficients (n, stages, terms), both float64.

    >>> from rbe.formats import make_spec
    >>> from rbe.search.blocks import cut
    >>> one = torch.outer(signs(16, 1), signs(16, 2))
    >>> found, coefficients = pursue(cut(0.5 * one, make_spec("outer128", (16, 16))), "fast")
    >>> coefficients.round(decimals=6).abs().tolist()
    [[[0.5, 0.0]]]
    """
    spec, (count, sweeps) = blocks.spec, EFFORTS[effort]
    edge, terms = spec.block_shape[0], outer128.terms(spec)
    width = min(edge, 32)
    exists = blocks.exists.reshape(-1, edge, edge)
    x = blocks.values.double().reshape(-1, edge, edge)
    starts = torch.stack([signs(width, k + 1) for k in range(count)]).double()
    total = spec.stages * terms
    u = x.new_ones(len(x), total, width)
    v = torch.ones_like(u)
    coefficients = x.new_zeros(len(x), total)

    def made(skip: int | None = None) -> Tensor:
        """The sum of the terms, but one."""
        kept = coefficients.clone()
        if skip is not None:
            kept[:, skip] = 0
        full = _unfolded(u, edge), _unfolded(v, edge)
        return torch.einsum("nt,nti,ntj->nij", kept, *full) * exists

    for sweep in range(1 + (sweeps if total > 1 else 0)):
        for k in range(total):
            rest = x - made(skip=k)
            before = (u.clone(), v.clone(), coefficients.clone())
            # Alternating from where the term stands keeps what is good; other starts may be better.
            new_u, new_v = _term(_folded(rest, edge), starts)
            u[:, k], v[:, k] = new_u, new_v
            coefficients = _solve(x, u, v, coefficients, exists, edge)
            if sweep:
                worse = (x - made()).square().sum((1, 2)) > _left(x, *before, exists, edge)
                for new, old in zip((u, v), before[:2], strict=True):
                    new[worse] = old[worse]
                coefficients[worse] = before[2][worse]
    return _as_signs(u, v, spec), coefficients.reshape(len(x), spec.stages, terms)


def _left(x: Tensor, u: Tensor, v: Tensor, coefficients: Tensor, exists: Tensor, edge: int) -> Tensor:
    made = torch.einsum("nt,nti,ntj->nij", coefficients, _unfolded(u, edge), _unfolded(v, edge)) * exists
    return (x - made).square().sum((1, 2))


def _unfolded(part: Tensor, edge: int) -> Tensor:
    """Vectors (..., width) as long as a side of the block."""
    if part.shape[-1] == edge:
        return part
    return torch.cat([part, part], -1) * signs(edge, 0).to(part)


def _solve(x: Tensor, u: Tensor, v: Tensor, coefficients: Tensor, exists: Tensor, edge: int) -> Tensor:
    """All coefficients of least squares; terms that were not found yet are all alike and get nothing."""
    table = torch.einsum("nti,ntj->ntij", _unfolded(u, edge), _unfolded(v, edge)) * exists[:, None]
    flat = table.flatten(2)
    system = flat @ flat.mT
    # Equal terms make the system singular; the pseudo-inverse shares between them.
    inverse = torch.linalg.pinv(system, hermitian=True, rtol=1e-10)
    solved: Tensor = (inverse @ (flat @ x.flatten(1)[..., None]))[..., 0]
    return solved


def _as_signs(u: Tensor, v: Tensor, spec: SeedSpec) -> Tensor:
    """The 64 signs of every stage, in the order of `outer128.sign_bits`."""
    terms = outer128.terms(spec)
    room = 32 // terms
    padded = [torch.nn.functional.pad(part, (0, room - part.shape[-1]), value=1.0) for part in (u, v)]
    both = torch.stack(padded, 2)  # (n, stages * terms, 2, room)
    return both.reshape(len(u), spec.stages, 64)


def needed_scale(coefficients: Tensor) -> float:
    """The tensor scale that brings every coefficient pair (..., terms) well inside the disk."""
    return float(coefficients.norm(dim=-1).max()) / _LONGEST if coefficients.numel() else 0.0


def seeds_of(found: Tensor, coefficients: Tensor, scale: float, spec: SeedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(code, radius, angle) of signs (n, stages, 64) and coefficients (n, stages, terms)."""
    pair = coefficients / scale if scale > 0 else torch.zeros_like(coefficients)
    radius = torch.tanh(pair.norm(dim=-1) / 2)
    second = pair[..., 1] if pair.shape[-1] == 2 else torch.zeros_like(pair[..., 0])
    return outer128.code_of(found, spec), radius, torch.atan2(second, pair[..., 0])
