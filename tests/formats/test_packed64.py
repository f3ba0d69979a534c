"""The packed64 format against the printed formula evaluated with numpy, and its laws."""

import math

import numpy as np
import pytest
import torch

from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, packed64
from rbe.mixing import fmix32

SHAPES = [((32, 48), 16), ((5, 7), 16), ((9, 9), 3), ((40, 33), None), ((7, 1), None), ((1, 1), 8)]


def random_seeds(spec: SeedSpec, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.blocks, packed64.words(spec))
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


def mix(x: int) -> int:
    """MurmurHash3's 32-bit finaliser in Python integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def printed(r: float, theta: float, i: int, j: int, stage: int = 0) -> float:
    """g(r) sin(theta) phi(i, j), as the papers print it, with the hash of the design."""
    g = np.tanh(2 * np.arctanh(r))
    h = mix(j ^ mix(i ^ 0x9E3779B9 ^ mix(stage)))
    return float(g * np.sin(theta) * (1 + 0.1 * np.sin(2 * np.pi * h / 2**32)))


@pytest.mark.parametrize("precision", [32, 64])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_generate_equals_the_printed_formula(shape: tuple[int, int], block: int | None, precision: int) -> None:
    spec = make_spec("packed64", shape, block=block, precision=precision)
    seeds = random_seeds(spec)
    w = packed64.generate(seeds, spec)
    height, width = spec.block_shape
    assert w.shape == (spec.blocks, height, width)
    per_field = 2**precision
    for b in {0, spec.blocks - 1}:
        bits = [word % 2**64 for word in seeds[b].tolist()]
        r, turn = (bits[0] >> 32, bits[0] % 2**32) if precision == 32 else bits
        for i, j in {(0, 0), (height - 1, width - 1), (height // 2, width // 3)}:
            expected = printed(r / per_field, 2 * math.pi * turn / per_field, i, j)
            assert w[b, i, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_later_stages_have_a_modulation_of_their_own() -> None:
    spec = make_spec("packed64", (8, 8), block=8, stages=2)
    only_second = torch.tensor([[0, (1 << 62) + (1 << 30)]])  # the first seed has radius 0
    w = packed64.generate(only_second, spec)[0]
    assert w[3, 5].item() == pytest.approx(printed(0.25, math.pi / 2, 3, 5, stage=1), rel=1e-12)
    assert abs(w[3, 5].item() - printed(0.25, math.pi / 2, 3, 5, stage=0)) > 1e-3


def test_the_first_stage_is_not_keyed() -> None:
    assert fmix32(torch.tensor(0)).item() == 0


@pytest.mark.parametrize("precision", [32, 64])
def test_pack_and_unpack_are_inverse(precision: int) -> None:
    spec = make_spec("packed64", (64, 64), precision=precision, stages=2)
    seeds = random_seeds(spec)
    again = packed64.join(*packed64.split(seeds, spec), spec)
    if precision == 32:
        assert torch.equal(again, seeds)
    else:  # float64 between the two keeps 53 bits of each word
        assert torch.equal(packed64.join(*packed64.split(again, spec), spec), again)
        one, two = (packed64.generate(s, spec) for s in (seeds, again))
        assert (one - two).abs().max().item() < 2**-50


@pytest.mark.parametrize(("precision", "bound"), [(32, 2.0**-32), (64, 2.0**-52)])
def test_the_stored_error_is_below_a_step(precision: int, bound: float) -> None:
    spec = make_spec("packed64", (256, 256), precision=precision)
    generator = torch.Generator().manual_seed(1)
    radius = torch.rand((spec.blocks, 1), generator=generator, dtype=torch.float64)
    radius[:4, 0] = torch.tensor([0.0, 1e-12, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    angle = torch.rand((spec.blocks, 1), generator=generator, dtype=torch.float64) * math.tau
    _, r, theta = packed64.split(packed64.join(radius.new_empty(0), radius, angle, spec), spec)
    assert ((radius - r) >= -(2.0**-53)).all(), "floor never rounds up"
    assert (radius - r).abs().max() <= bound
    assert (angle - theta).abs().max() <= math.tau * bound


def test_angles_count_modulo_a_turn() -> None:
    spec = make_spec("packed64", (2, 8), block=2)
    angle = torch.tensor([[0.25 - 4.0], [0.25], [0.25 + 17.0], [-1e-30]], dtype=torch.float64) * math.tau
    _, _, back = packed64.split(packed64.join(angle.new_empty(0), torch.full_like(angle, 0.5), angle, spec), spec)
    assert back[:3].flatten().tolist() == pytest.approx([math.pi / 2] * 3)
    assert back[3].item() == 0.0  # a hair below a whole turn is none


def test_derivatives_equal_central_differences() -> None:
    spec = make_spec("packed64", (10, 9), block=5, stages=2)
    generator = torch.Generator().manual_seed(2)
    radius = torch.rand((spec.blocks, 2), generator=generator, dtype=torch.float64) * 0.98 + 0.01
    angle = torch.rand((spec.blocks, 2), generator=generator, dtype=torch.float64) * 20 - 10
    code = torch.empty((spec.blocks, 0), dtype=torch.int64)
    d_radius, d_angle = packed64.derivatives(code, radius, angle, spec)
    h = 1e-6
    for stage in range(2):
        step = torch.zeros_like(radius)
        step[:, stage] = h
        for d, up, down in (
            (d_radius, (radius + step, angle), (radius - step, angle)),
            (d_angle, (radius, angle + step), (radius, angle - step)),
        ):
            numeric = (packed64.values(code, *up, spec) - packed64.values(code, *down, spec)) / (2 * h)
            assert torch.allclose(d[:, stage], numeric, atol=1e-8)


def test_no_seed_gives_anything_but_finite_weights() -> None:
    spec = make_spec("packed64", (4, 4), block=2)
    extremes = torch.tensor([[0], [-1], [1 << 63 - 1], [-(2**63)]])
    assert torch.isfinite(packed64.generate(extremes, spec)).all()
    spec = make_spec("packed64", (4, 4), block=2, precision=64)
    assert torch.isfinite(packed64.generate(extremes.repeat(1, 2), spec)).all()
    assert (packed64.split(extremes.repeat(1, 2), spec)[1] < 1).all()


@pytest.mark.parametrize("bad", [1.0, -0.1, math.nan, math.inf])
def test_a_radius_outside_the_disk_is_refused(bad: float) -> None:
    spec = make_spec("packed64", (2, 2), block=2)
    with pytest.raises(RbeError, match=r"radius is .*0 <= r < 1"):
        packed64.join(torch.empty(1, 0), torch.tensor([[bad]]), torch.tensor([[0.0]]), spec)


def test_an_angle_that_is_no_number_is_refused() -> None:
    spec = make_spec("packed64", (2, 2), block=2)
    with pytest.raises(RbeError, match="angle is inf"):
        packed64.join(torch.empty(1, 0), torch.tensor([[0.5]]), torch.tensor([[math.inf]]), spec)


@pytest.mark.parametrize("change", [{"precision": 16}, {"mode": "radial"}, {"bits": 2.0}, {"stages": 0}, {"block": 0}])
def test_what_is_not_offered_is_refused(change: dict) -> None:
    with pytest.raises(RbeError):
        make_spec("packed64", (16, 16), **change)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1,)])
def test_seeds_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    spec = make_spec("packed64", (16, 16))
    if shape == (2, 1):
        spec = make_spec("packed64", (16, 16), stages=2)
    with pytest.raises(RbeError, match="packed64: seeds"):
        packed64.generate(torch.zeros(shape, dtype=torch.int64), spec)
