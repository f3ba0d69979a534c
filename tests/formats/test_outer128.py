"""The outer128 format against its printed definition evaluated with numpy, and its laws."""

import math
import struct

import numpy as np
import pytest
import torch

from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, outer128

BLOCKS = [8, 16, 32, 64]


def random_point(spec: SeedSpec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.blocks, spec.stages)
    code = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    radius = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.98
    angle = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 4 * math.pi
    return code, radius, angle


def mix(x: int) -> int:
    """MurmurHash3's 32-bit finaliser in Python integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def printed(hi: int, lo: int, i: int, j: int, block: int) -> float:
    """One weight from the words of a seed, from the sentences of the design."""
    r, theta = (float(struct.unpack("<f", struct.pack("<I", part))[0]) for part in (lo >> 32, lo & 0xFFFFFFFF))
    a, b = (2 * math.atanh(r) * f(theta) for f in (math.cos, math.sin))

    def sign(field: int, bit: int) -> int:
        return 1 if field >> bit & 1 else -1

    if block <= 16:
        u1, v1, u2, v2 = (hi >> low & 0xFFFF for low in (48, 32, 16, 0))
        return a * sign(u1, i) * sign(v1, j) + b * sign(u2, i) * sign(v2, j)
    u, v = hi >> 32, hi & 0xFFFFFFFF
    extra = 1 if block == 32 else (-1) ** ((mix(i) & 1) + (mix(j) & 1))
    return a * sign(u, i % 32) * sign(v, j % 32) * extra


@pytest.mark.parametrize("block", BLOCKS)
def test_generate_equals_the_printed_definition(block: int) -> None:
    spec = make_spec("outer128", (100, 70), block=block)
    seeds = outer128.join(*random_point(spec), spec)
    w = outer128.generate(seeds, spec)
    assert w.shape == (spec.blocks, block, block)
    rng = np.random.default_rng(block)
    for b in range(min(4, spec.blocks)):
        hi, lo = (word % 2**64 for word in seeds[b].tolist())
        for i, j in [(0, 0), (block - 1, 0), (0, block - 1), *rng.integers(0, block, (20, 2)).tolist()]:
            assert w[b, i, j].item() == pytest.approx(printed(hi, lo, i, j, block), rel=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_pack_and_unpack_are_inverse(block: int) -> None:
    spec = make_spec("outer128", (128, 128), block=block, stages=2)
    code, radius, angle = random_point(spec)
    seeds = outer128.join(code, radius, angle, spec)
    again = outer128.split(seeds, spec)
    assert torch.equal(again[0], code)
    assert torch.equal(again[1], radius.float())
    assert torch.equal(again[2], angle.float())
    assert torch.equal(outer128.code_of(outer128.sign_bits(code, spec), spec), code)


def test_rates() -> None:
    assert [make_spec("outer128", (64, 64), block=b).bits for b in BLOCKS] == [2.0, 0.5, 0.125, 0.03125]


@pytest.mark.parametrize("block", BLOCKS)
def test_derivatives_equal_central_differences(block: int) -> None:
    spec = make_spec("outer128", (64, 64), block=block, stages=2)
    code, radius, angle = random_point(spec, seed=5)
    d_radius, d_angle = outer128.derivatives(code, radius, angle, spec)
    h = 1e-6
    for stage in range(2):
        step = torch.zeros_like(radius)
        step[:, stage] = h
        for d, up, down in (
            (d_radius, (radius + step, angle), (radius - step, angle)),
            (d_angle, (radius, angle + step), (radius, angle - step)),
        ):
            numeric = (outer128.values(code, *up, spec) - outer128.values(code, *down, spec)) / (2 * h)
            assert torch.allclose(d[:, stage], numeric, rtol=1e-6, atol=1e-7)


def test_stages_add_up() -> None:
    two = make_spec("outer128", (32, 32), stages=2)
    code, radius, angle = random_point(two, seed=6)
    one = make_spec("outer128", (32, 32))
    parts = [outer128.values(code[:, k : k + 1], radius[:, k : k + 1], angle[:, k : k + 1], one) for k in (0, 1)]
    assert torch.allclose(outer128.values(code, radius, angle, two), parts[0] + parts[1])


def test_a_radius_of_zero_is_a_zero_block() -> None:
    spec = make_spec("outer128", (16, 16))
    code, _, angle = random_point(spec)
    assert outer128.values(code, torch.zeros_like(angle), angle, spec).abs().max() == 0


def test_the_largest_radius_is_finite() -> None:
    spec = make_spec("outer128", (16, 16))
    code, radius, angle = random_point(spec)
    seeds = outer128.join(code, torch.full_like(radius, 1 - 2.0**-24), angle, spec)
    assert torch.isfinite(outer128.generate(seeds, spec)).all()


@pytest.mark.parametrize(
    ("radius", "angle"), [(1.0, 0.0), (-1e-3, 0.0), (math.nan, 0.0), (0.5, math.inf), (0.5, math.nan)]
)
def test_a_point_outside_the_disk_is_refused(radius: float, angle: float) -> None:
    spec = make_spec("outer128", (16, 16))
    low = int.from_bytes(struct.pack("<ff", angle, radius), "little", signed=True)
    with pytest.raises(RbeError, match=r"outer128: (radius|angle) is"):
        outer128.generate(torch.tensor([[0, low]]), spec)
    with pytest.raises(RbeError, match=r"outer128: (radius|angle) is"):
        outer128.join(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[radius]]), torch.tensor([[angle]]), spec)


@pytest.mark.parametrize("change", [{"block": None}, {"block": 24}, {"mode": "radial"}, {"precision": 64}, {"bits": 2}])
def test_what_is_not_offered_is_refused(change: dict) -> None:
    with pytest.raises(RbeError):
        make_spec("outer128", (16, 16), **change)


def test_seeds_of_another_size_are_refused() -> None:
    with pytest.raises(RbeError, match="outer128: seeds"):
        outer128.generate(torch.zeros((1, 1), dtype=torch.int64), make_spec("outer128", (16, 16)))
