"""Fits of (r, theta), beam search over the bits, and the sums over rings they rest on."""

import math

import pytest
import torch

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.search.beam import _Waves, beam
from rbe.search.blocks import cut, in_chunks, join
from rbe.search.proposal import Grid, propose
from rbe.search.reference import multi_start
from rbe.search.refine import Problem, Stop, condition, levenberg_marquardt, riemannian_adam
from rbe.search.rings import gram, rings, sums


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem_of(
    mode: str = "radial", shape: tuple[int, int] = (20, 40), seed: int = 0
) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """Blocks that random seeds made, and those seeds a little beside."""
    generator = torch.Generator().manual_seed(seed)
    spec = formats.make_spec("packed128", shape, mode=mode)
    draw = [
        torch.randint(a, b, (spec.blocks, 1), generator=generator)
        for a, b in ((0, 4), (300, 900), (3000, 4096), (1, 8))
    ]
    code = packed128.code_of(*draw, torch.zeros_like(draw[0]))
    radius, angle = (
        torch.rand(spec.blocks, 1, generator=generator).double() * w + b for w, b in ((0.2, 0.3), (6.0, 0.0))
    )
    W = join(packed128.values(code, radius, angle, spec).flatten(1), spec)
    return Problem(cut(W, spec), code), radius + 0.02, angle + 0.05


@pytest.mark.parametrize("mode", ["radial", "faithful"])
@pytest.mark.parametrize("method", [levenberg_marquardt, riemannian_adam])
def test_fits_find_the_points_again(mode: str, method) -> None:  # type: ignore[no-untyped-def]
    problem, radius, angle = problem_of(mode)
    before = problem.loss(radius, angle)
    fit = method(problem, radius, angle, Stop(steps=40) if method is levenberg_marquardt else Stop(steps=400))
    assert bool((fit.loss <= before).all()) and bool((fit.loss < 1e-5).all())
    assert torch.allclose(fit.loss, problem.loss(fit.radius, fit.angle), atol=1e-12)


def test_gradient_is_that_of_the_loss() -> None:
    problem, radius, angle = problem_of()
    at = radius.clone().requires_grad_(), angle.clone().requires_grad_()
    expected = torch.autograd.grad(problem.loss(*at).sum(), at)
    for found, wanted in zip(problem.gradient(radius, angle), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_no_steps_leave_the_points() -> None:
    problem, radius, angle = problem_of()
    fit = levenberg_marquardt(problem, radius, angle, Stop(steps=0))
    assert torch.equal(fit.radius, radius) and torch.equal(fit.angle, angle) and not fit.converged.any()


def test_condition_is_one_but_for_the_clamp() -> None:
    faithful, radial = (formats.make_spec("packed128", (16, 16), mode=mode) for mode in ("faithful", "radial"))
    r = torch.linspace(0.0, 0.99, 50, dtype=torch.float64)
    assert torch.equal(condition(r, radial), torch.ones_like(r))
    c = condition(r, faithful)
    assert torch.allclose(c[r < 0.6], torch.ones(()).double()) and bool((c[r > 0.62] > 1.5).all()) and c.max() < 1000
    problem, radius, angle = problem_of("faithful")
    held = levenberg_marquardt(problem, radius, angle, Stop(condition=1.0))
    assert bool((condition(held.radius, faithful) <= 1.0 + 1e-12).all() or (held.radius == radius).any())


def test_several_starts_report_their_success() -> None:
    problem, _, _ = problem_of(shape=(16, 64))
    assert bool((multi_start(problem, starts=4).fit.loss < 1e-9).all())
    starts = multi_start(problem, starts=12, stop=Stop(steps=5))  # too few for all of them
    p = starts.success
    assert bool((p > 0).all()) and p.min() < 1
    assert torch.equal(starts.probability(1), p)
    assert torch.allclose(starts.probability(3), 1 - (1 - p) ** 3)


@pytest.mark.parametrize("shape", [(16, 16), (5, 9), (1, 7), (21, 16)])
def test_sums_over_rings_are_inner_products(shape: tuple[int, int]) -> None:
    spec = formats.make_spec("packed128", shape, block=None if shape[0] < 10 else 16)
    blocks = cut(gaussian(*shape), spec)
    rho, angle = (t.flatten() for t in packed128.cells(*spec.block_shape))
    found, norms, ring = sums(blocks), gram(blocks), rings(*spec.block_shape)
    for q in (0, 1, 7, 40, 63):
        p = torch.cosh(3 * rho)
        on_ring = torch.cosh(3 * ring.radius)
        cos, sin = torch.cos(q * angle), torch.sin(q * angle)
        for k, wave in enumerate((cos, sin)):
            assert torch.allclose(found[:, k, q] @ on_ring, blocks.values @ (p * wave), atol=1e-6)
        for k, product in enumerate((cos * cos, cos * sin, sin * sin)):
            wanted = blocks.exists @ (p.square() * product)
            assert torch.allclose((norms[:, k, q] @ on_ring.square())[blocks.kind], wanted, rtol=1e-6, atol=1e-6)


def test_a_16x16_block_has_22_rings() -> None:
    assert rings(16, 16).radius.numel() == 22


@pytest.mark.parametrize("mode", ["radial", "faithful"])
def test_beam_weighs_states_as_the_definition_does(mode: str) -> None:
    problem, radius, angle = problem_of(mode)
    other = Problem(
        problem.blocks.with_values(gaussian(*problem.blocks.values.shape) * problem.blocks.exists), problem.code
    )
    code = problem.code ^ (torch.arange(len(radius)) % 2 << 37)[:, None]  # cosines and sines
    other = Problem(other.blocks, code)
    known, size = _Waves(other, radius[:, 0], angle[:, 0])(code)
    amplitude = 2.0 * packed128.fields(code)["geo_amp"].double() / 4095 - 1
    loss = 1 + (amplitude**2 * size - 2 * amplitude * known)[:, 0] / other.energy()
    assert torch.allclose(loss, other.loss(radius, angle), rtol=1e-9)


@pytest.mark.parametrize("fields", [("quadrant", "hyp_freq", "geo_amp"), ("basis_sel",), ("geo_amp",), ("cordic_seq",)])
def test_beam_search_never_loses_and_finds_flipped_bits(fields: tuple[str, ...]) -> None:
    problem, radius, angle = problem_of()
    radius, angle = radius - 0.02, angle - 0.05  # the true points
    flipped = {"basis_sel": 1 << 33, "geo_amp": 1 << 45, "cordic_seq": 1 << 2}.get(fields[0], (1 << 62) | (1 << 56))
    moved = Problem(problem.blocks, problem.code ^ flipped)
    before = moved.loss(radius, angle)
    code, loss = beam(moved, radius, angle, fields=fields)
    assert bool((loss < before).all()) and bool((loss < 1e-9).all())
    assert torch.allclose(Problem(problem.blocks, code).loss(radius, angle), loss, atol=1e-9)


def test_beam_refuses_what_it_cannot_search() -> None:
    problem, radius, angle = problem_of()
    with pytest.raises(RbeError, match="fields"):
        beam(problem, radius, angle, fields=("colour",))
    with pytest.raises(RbeError, match="stage"):
        beam(Problem(problem.blocks, problem.code.repeat(1, 2)), radius, angle)


def test_finer_grids_are_better() -> None:
    blocks = cut(gaussian(32, 32), formats.make_spec("packed128", (32, 32)))

    def left(grid: Grid) -> float:
        atoms = propose(blocks, grid)
        made = (atoms.coefficients[:, None] @ atoms.basis((16, 16)))[:, 0]
        return (blocks.values - made).square().sum().item()

    coarse, halved, fine = left(Grid(9, 0, 1)), left(Grid(9, 6, 4)), left(Grid(129, 6, 16))
    assert coarse > halved >= fine * 0.9999
    assert left(Grid(3, 8, 1)) > left(Grid(3, 8, 64))  # the best frequency may show on the finer levels only


@pytest.mark.parametrize(("shape", "block"), [((5, 7), 4), ((8, 8), 4), ((3, 9), None), ((1, 1), 16)])
def test_blocks_join_again(shape: tuple[int, int], block: int | None) -> None:
    x = gaussian(*shape)
    spec = formats.make_spec("packed64", shape, block=block)
    blocks = cut(x, spec)
    assert torch.equal(join(blocks.values, spec), x)
    assert blocks.exists.sum().item() == x.numel() and len(blocks) == spec.blocks
    assert torch.equal(join(blocks.exists, spec), torch.ones_like(x))


def test_chunks_have_one_thread_each_and_leave_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert in_chunks(4, 2, lambda part: torch.get_num_threads(), threads=2) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_chunk_is_raised() -> None:
    def work(part: slice) -> None:
        if part.start == 4:
            raise ValueError("of this chunk")

    with pytest.raises(ValueError, match="of this chunk"):
        in_chunks(9, 2, work, threads=2)


@pytest.mark.parametrize("name", ["gradient", "change", "rim", "condition"])
def test_a_fit_does_not_end_by_nan_or_negative_numbers(name: str) -> None:
    for value in (math.nan, -1.0):
        with pytest.raises(RbeError, match=name):
            Stop(**{name: value})
