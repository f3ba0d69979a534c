"""`encode` to packed64: the closed form is the optimum, and every search of the papers arrives at it."""

import itertools
import math

import pytest
import torch

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import packed64
from rbe.search import encode
from rbe.search.blocks import cut
from rbe.search.disk import encode_disk
from rbe.search.packed64 import best_coefficients
from rbe.search.reference import gradient_descent, grid, multi_start, uniform
from rbe.search.refine import Problem, Stop, levenberg_marquardt, riemannian_adam


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_block_problem(c: float, noise: float = 0.0, blocks: int = 6) -> Problem:
    """Blocks around c phi, whose best coefficients are near c."""
    spec = formats.make_spec("packed64", (8, 8 * blocks), block=8)
    W = c * packed64.modulation(8, 8, 0).repeat(1, blocks) + noise * gaussian(8, 8 * blocks)
    return Problem(cut(W, spec), torch.empty(blocks, 0, dtype=torch.int64))


def least_loss(problem: Problem) -> torch.Tensor:
    """The loss at c*."""
    c = best_coefficients(problem.blocks)
    phi = packed64.modulation(8, 8, 0).flatten()
    return (problem.blocks.values - c * phi).square().sum(1) / problem.energy()


@pytest.mark.parametrize("precision", [32, 64])
@pytest.mark.parametrize("shape", [(16, 16), (35, 50), (1, 40), (5, 1)])
def test_the_closed_form_is_reached(shape: tuple[int, int], precision: int) -> None:
    W = gaussian(*shape).double() + 0.3
    matrix = encode(W, format="packed64", precision=precision)
    blocks = cut(W, matrix.spec)
    phi = packed64.modulation(16, 16, 0).flatten() * blocks.exists  # (blocks, cells)
    best = (blocks.values * phi).sum(1) / phi.square().sum(1)
    stored = packed64.split(matrix.seeds, matrix.spec)
    found = matrix.scale.double() * packed64.coefficient(stored[1], stored[2])[:, 0]
    assert torch.allclose(found, best, rtol=1e-6, atol=2e-7 * W.abs().max().item())


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_solve_one_linear_system(stages: int) -> None:
    W = gaussian(20, 24).double()
    result = encode_disk(W, "packed64", block=8, stages=stages)
    error = 0.0
    tables = torch.stack([packed64.modulation(8, 8, s) for s in range(stages)])
    for i in range(0, 20, 8):
        for j in range(0, 24, 8):
            part = W[i : i + 8, j : j + 8]
            A = tables[:, : part.shape[0], : part.shape[1]].flatten(1).T
            error += (part.flatten() - A @ torch.linalg.lstsq(A, part.flatten()[:, None]).solution[:, 0]).square().sum()
    assert result.error == pytest.approx((error / W.square().sum()).item(), rel=1e-6)


def test_more_stages_are_better() -> None:
    W = gaussian(32, 32)
    errors = [encode_disk(W, "packed64", block=8, stages=s).error for s in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("c", [0.0, 0.35, -0.8, 1e-4])
def test_every_search_of_the_papers_reaches_the_closed_form(c: float) -> None:
    problem = one_block_problem(c, noise=0.1)
    least = least_loss(problem)
    radius, angle = uniform(len(problem.blocks), 1, seed=3)
    found = {
        "grid": grid(problem),
        "starts": multi_start(problem, starts=4).fit,
        "descent": gradient_descent(problem, radius, angle),
        "marquardt": levenberg_marquardt(problem, radius, angle, Stop(steps=60)),
        # Along the rim the way round is long: it starts further in.
        "adam": riemannian_adam(problem, *uniform(len(problem.blocks), 1, seed=3, hyperbolic=1.0), Stop(steps=500)),
    }
    for name, fit in found.items():
        assert bool((fit.loss >= least - 1e-12).all()), f"{name} is better than the optimum"
        assert bool((fit.loss <= least + 1e-6).all()), f"{name}: {fit.loss - least}"
        assert bool(fit.converged.all()), name


def test_a_coefficient_beyond_the_disk_is_clipped_by_every_search() -> None:
    problem = one_block_problem(1.7)
    radius, angle = uniform(len(problem.blocks), 1, seed=3)
    edge = problem.loss(torch.full((6, 1), problem.most).double(), torch.full((6, 1), math.pi / 2).double())
    for fit in (grid(problem), levenberg_marquardt(problem, radius, angle, Stop(steps=60))):
        assert torch.allclose(fit.loss, edge, atol=1e-6)


def test_the_grid_has_the_printed_levels() -> None:
    seen: list[tuple[float, float]] = []

    class Spy(Problem):
        def loss(self, radius: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
            seen.append((radius.item(), angle.item()))
            return super().loss(radius, angle)

    made = one_block_problem(0.15, blocks=1)
    grid(Spy(made.blocks, made.code), levels=2)
    coarse, levels = seen[:20], (seen[20:45], seen[45:70])
    assert sorted({r for r, _ in coarse}) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert sorted({a for _, a in coarse}) == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    for k, points in enumerate(levels, 1):
        radii, angles = (sorted({round(v, 9) for v in side}) for side in zip(*points, strict=True))
        steps = [round(b - a, 6) for a, b in itertools.pairwise(radii)]
        assert round(0.999 / 2**k, 6) in steps  # those at 0 and at the rim are shortened
        assert angles[1] - angles[0] == pytest.approx(2 * math.pi / (4 * 2**k)) and len(angles) == 5


def test_every_start_succeeds_on_one_degree_of_freedom() -> None:
    starts = multi_start(one_block_problem(0.5, noise=0.1), starts=8, seed=1)
    assert bool((starts.success > 0.9).all())


def test_starts_are_uniform_in_the_disk() -> None:
    radius, angle = uniform(1, 20_000, seed=0)
    assert torch.histc(radius.square(), 4, 0, 1).tolist() == pytest.approx([5000] * 4, rel=0.05)
    assert torch.histc(angle, 4, 0, math.tau).tolist() == pytest.approx([5000] * 4, rel=0.05)
    far, _ = uniform(1, 1000, seed=0, hyperbolic=4.0)
    assert bool((far < math.tanh(2.0)).all()) and far.median() > 0.8


def test_the_rim_map_keeps_the_radius_below_its_limit() -> None:
    problem = one_block_problem(0.97)
    radius, angle = torch.full((6, 1), 0.2).double(), torch.full((6, 1), 1.0).double()
    free = levenberg_marquardt(problem, radius, angle, Stop(steps=60))
    mapped = levenberg_marquardt(problem, radius, angle, Stop(steps=60, rim=0.5))
    assert bool((free.radius > 0.7).all()) and bool((mapped.radius < 1 / 1.5).all())
    gentle = levenberg_marquardt(problem, radius, angle, Stop(steps=60, rim=0.01))
    assert torch.allclose(gentle.loss, free.loss, atol=1e-8)


def test_wrong_options_are_refused() -> None:
    W = gaussian(16, 16)
    for options, message in [
        ({"bits": 2.0}, "do not fit"),
        ({"precision": 16}, "precision"),
        ({"mode": "radial"}, "mode"),
        ({"stages": 0}, "stages"),
        ({"block": 0}, "block"),
        ({"block": "abc"}, "block 'abc' is not an int"),
        ({"block": 10**6}, r"pad the matrix \(16, 16\) to \(1000000, 1000000\)"),
        ({"block": 4096}, r"pad the matrix \(16, 16\) to \(4096, 4096\)"),
        ({"window": 12}, "window"),
        ({"effort": "extreme"}, "effort"),
        ({"threads": 0}, "threads"),
        ({"rotate": "out"}, "rotate"),
        ({"rotate": True, "row_scale": True}, "row_scale"),
    ]:
        with pytest.raises(RbeError, match=message):
            encode(W, format="packed64", **options)
    with pytest.raises(RbeError, match="trellis"):
        encode(W, stages=2)
    with pytest.raises(RbeError, match="must not be negative"):
        Stop(steps=-1)
    two = Problem(cut(W, formats.make_spec("packed64", (16, 16), stages=2)), torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(RbeError, match="stages"):
        grid(two)
