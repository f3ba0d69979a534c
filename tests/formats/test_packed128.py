"""The packed128 format against the printed formulas evaluated with numpy, and its laws."""

import math
import struct

import numpy as np
import pytest
import torch

from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, packed128

MODES = ["faithful", "radial"]
SHAPES = [((32, 48), 16), ((5, 7), 16), ((9, 9), 3), ((40, 33), None), ((7, 1), None), ((1, 1), 8)]


def random_point(spec: SeedSpec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.blocks, spec.stages)
    code = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    radius = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.97 + 0.01
    angle = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 20 * math.pi
    return code, radius, angle


F = [np.sinh, np.cosh, np.tanh, lambda v: 1 / np.cosh(v) ** 2]


def printed(hi: int, lo: int, i: int, j: int, m: int, n: int, mode: str) -> float:
    """One weight from the words of a seed, step by step as 003 section 4.5.1 and its chapter 3 print it."""
    quadrant, hyp_freq, geo_amp = (hi >> 62) & 0x3, (hi >> 50) & 0xFFF, (hi >> 38) & 0xFFF
    q, sequence = (hi >> 32) & 0x3F, hi & 0xFFFFFFFF
    r, theta = (struct.unpack("<f", struct.pack("<I", part))[0] for part in (lo >> 32, lo & 0xFFFFFFFF))
    x = 0.0 if n == 1 else 2 * j / (n - 1) - 1
    y = 0.0 if m == 1 else 2 * i / (m - 1) - 1
    a, rho = math.atan2(y, x), min(math.hypot(x, y), 0.99)
    start = r * (rho if mode == "radial" else 1.0)
    px, py = start * math.cos(a + theta), start * math.sin(a + theta)
    for k in range(20):
        d = 1 if sequence >> k & 1 else -1
        px, py = px - d * 2.0**-k * py, py + d * 2.0**-k * px
        size = math.hypot(px, py)
        if mode == "faithful" and k % 4 == 3 and size >= 1:
            px, py = px * math.tanh(size) / size, py * math.tanh(size) / size
    alpha = 10 * (max(hyp_freq, 1) if mode == "radial" else hyp_freq) / 4095
    value = F[quadrant](alpha * math.hypot(px, py))
    if mode == "radial":
        gain = math.prod(math.sqrt(1 + 4.0**-k) for k in range(20))
        value /= np.max(np.abs(F[quadrant](np.linspace(0, alpha * gain, 2001))))
    angle = math.atan2(py, px) if (px, py) != (0, 0) else 0.0
    wave = 1.0 if q == 0 else math.cos(q * angle) if q < 32 else math.sin(q * angle)
    return float((2 * geo_amp / 4095 - 1) * value * wave)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_generate_equals_the_printed_formula(shape: tuple[int, int], block: int | None, mode: str) -> None:
    spec = make_spec("packed128", shape, block=block, mode=mode)
    seeds = packed128.join(*random_point(spec), spec)
    w = packed128.generate(seeds, spec)
    height, width = spec.block_shape
    assert w.shape == (spec.blocks, height, width)
    for b in range(min(spec.blocks, 6)):
        hi, lo = (word % 2**64 for word in seeds[b].tolist())
        for i, j in {(0, 0), (height - 1, width - 1), (height // 2, width // 3), (height // 2, width // 2)}:
            expected = printed(hi, lo, i, j, height, width, mode)
            # In the centre of an odd block the steps of the printed form lose the angle of the zero vector.
            if mode == "radial" and math.hypot(2 * i - height + 1, 2 * j - width + 1) == 0:
                continue
            assert w[b, i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_the_steps_turn_and_stretch_whatever_their_signs() -> None:
    """Circular steps: the radius gains 1.646760 whatever the bits, so faithful weights see their place by M alone."""
    generator = torch.Generator().manual_seed(3)
    sequence = torch.randint(0, 1 << 32, (50,), generator=generator)
    x, y = torch.full((50,), 0.1, dtype=torch.float64), torch.full((50,), 0.2, dtype=torch.float64)
    gains = torch.hypot(*packed128.cordic(sequence, x, y)) / math.hypot(0.1, 0.2)
    assert (gains - packed128.GAIN).abs().max() < 1e-14
    assert pytest.approx(1.646760, abs=5e-7) == packed128.GAIN
    turned = torch.atan2(*reversed(packed128.cordic(sequence, x, y))) - math.atan2(0.2, 0.1)
    apart = (turned - packed128.turn(sequence)) / math.tau
    assert (apart - apart.round()).abs().max() < 1e-14


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6, 0.62, 0.8, 0.9, 0.9999])
def test_the_final_radius_is_a_recursion_on_r_alone(radius: float) -> None:
    generator = torch.Generator().manual_seed(4)
    sequence = torch.randint(0, 1 << 32, (20,), generator=generator)
    where = torch.rand(20, generator=generator, dtype=torch.float64) * math.tau
    x, y = packed128.cordic(sequence, radius * torch.cos(where), radius * torch.sin(where))
    expected, _ = packed128.final_radius(torch.tensor(radius, dtype=torch.float64))
    assert torch.allclose(torch.hypot(x, y), expected.expand(20), atol=1e-14)


def test_a_block_of_16_has_22_radii() -> None:
    rho, _ = packed128.cells(16, 16)
    assert len(set((rho * 1e12).round().flatten().tolist())) == 22
    assert rho.max().item() == 0.99


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_equal_central_differences(mode: str) -> None:
    spec = make_spec("packed128", (32, 30), block=5, mode=mode, stages=2)
    code, radius, angle = random_point(spec, seed=5)
    # The clamp jumps where a radius crosses 1: seeds that a step of the difference could carry across stay out.
    h = 1e-6
    if mode == "faithful":
        near = [packed128.final_radius(radius + t)[1] for t in (-2 * h, 0.0, 2 * h)]
        smooth = (near[0] - near[2]).abs() < 1e-3
        radius = torch.where(smooth, radius, 0.25)
    d_radius, d_angle = packed128.derivatives(code, radius, angle, spec)
    size = packed128.values(code, radius, angle, spec).abs().amax((1, 2), keepdim=True) + 1
    for stage in range(2):
        step = torch.zeros_like(radius)
        step[:, stage] = h
        for d, up, down in (
            (d_radius, (radius + step, angle), (radius - step, angle)),
            (d_angle, (radius, angle + step), (radius, angle - step)),
        ):
            numeric = (packed128.values(code, *up, spec) - packed128.values(code, *down, spec)) / (2 * h)
            slope = d[:, stage].abs().amax((1, 2), keepdim=True)
            assert ((d[:, stage] - numeric).abs() <= 1e-6 * (size + slope)).all()


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_equal_those_of_torch_through_every_step(mode: str) -> None:
    spec = make_spec("packed128", (12, 10), block=4, mode=mode)
    code, radius, angle = random_point(spec, seed=6)
    radius.requires_grad_()
    angle.requires_grad_()
    upstream = torch.randn((spec.blocks, 4, 4), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad((packed128.values(code, radius, angle, spec) * upstream).sum(), (radius, angle))
    for d, g in zip(packed128.derivatives(code, radius.detach(), angle.detach(), spec), grads, strict=True):
        assert torch.allclose((d * upstream[:, None]).sum((2, 3)), g, rtol=1e-9, atol=1e-12)


def test_first_and_second_derivatives_of_the_basis() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    h = 1e-5
    for quadrant in range(4):
        at = torch.full_like(x, quadrant, dtype=torch.int64)
        f, first, second = packed128.basis(at, x)
        assert torch.allclose(f, torch.from_numpy(F[quadrant](x.numpy())))
        up, down = packed128.basis(at, x + h), packed128.basis(at, x - h)
        assert torch.allclose(first, (up[0] - down[0]) / (2 * h), atol=1e-8)
        assert torch.allclose(second, (up[1] - down[1]) / (2 * h), atol=1e-8)


def test_pack_and_unpack_are_inverse() -> None:
    spec = make_spec("packed128", (64, 64), stages=2)
    code, radius, angle = random_point(spec)
    seeds = packed128.join(code, radius, angle, spec)
    again = packed128.split(seeds, spec)
    assert torch.equal(again[0], code)
    assert torch.equal(again[1], radius.float())
    assert torch.equal(again[2], angle.float())
    assert torch.equal(packed128.join(*again, spec), seeds)
    assert torch.equal(packed128.code_of(**packed128.fields(code)), code)


def test_the_fields_lie_where_the_paper_puts_them() -> None:
    hi = (0b10 << 62) | (0xABC << 50) | (0x123 << 38) | (0x2A << 32) | 0xDEADBEEF
    code = torch.tensor([[hi - (1 << 64)]])
    assert {name: value.item() for name, value in packed128.fields(code).items()} == {
        "quadrant": 0b10,
        "hyp_freq": 0xABC,
        "geo_amp": 0x123,
        "basis_sel": 0x2A,
        "cordic_seq": 0xDEADBEEF,
    }


@pytest.mark.parametrize("mode", MODES)
def test_no_seed_of_the_disk_gives_anything_but_finite_weights(mode: str) -> None:
    spec = make_spec("packed128", (8, 8 * 64), block=8, mode=mode)
    code, radius, angle = random_point(spec, seed=8)
    code[:4, 0] = torch.tensor([0, -1, -(2**63), 2**62])  # hyp_freq 0 in every quadrant
    radius[:6, 0] = torch.tensor([0.0, 1 - 2.0**-24, 1e-38, 1e-45, 0.0, 0.0], dtype=torch.float64)
    for part in (packed128.values(code, radius, angle, spec), *packed128.derivatives(code, radius, angle, spec)):
        assert torch.isfinite(part).all()


def test_radial_weights_are_at_most_the_amplitude() -> None:
    spec = make_spec("packed128", (128, 128), mode="radial")
    code, radius, angle = random_point(spec, seed=9)
    amplitude = 2 * packed128.fields(code)["geo_amp"].double() / 4095 - 1
    w = packed128.values(code, radius, angle, spec)
    assert (w.abs().amax((1, 2)) <= amplitude.abs()[:, 0] * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("radius", "angle", "complaint"),
    [(1.0, 0.0, "radius is 1 "), (-1e-3, 0.0, "radius is -0.001"), (math.nan, 0.0, "radius is nan"),
     (0.5, math.inf, "angle is inf"), (0.5, math.nan, "angle is nan")],
)  # fmt: skip
def test_a_point_outside_the_disk_is_refused_in_seeds_and_in_packing(
    radius: float, angle: float, complaint: str
) -> None:
    spec = make_spec("packed128", (16, 32))
    low = int.from_bytes(struct.pack("<ff", angle, radius), "little", signed=True)
    with pytest.raises(RbeError, match=complaint):
        packed128.generate(torch.tensor([[0, 0], [0, low]]), spec)
    with pytest.raises(RbeError, match=complaint):
        packed128.join(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[radius]]), torch.tensor([[angle]]), spec)


@pytest.mark.parametrize("change", [{"mode": "spiral"}, {"precision": 64}, {"bits": 2.0}, {"stages": -1}])
def test_what_is_not_offered_is_refused(change: dict) -> None:
    with pytest.raises(RbeError):
        make_spec("packed128", (16, 16), **change)


def test_seeds_of_another_size_are_refused() -> None:
    with pytest.raises(RbeError, match="packed128: seeds"):
        packed128.generate(torch.zeros((1, 1), dtype=torch.int64), make_spec("packed128", (16, 16)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("q", [0, 1, 31, 32, 63])
def test_every_kind_of_wave(q: int, mode: str) -> None:
    """Also at r = 0, where faithful mode must not read the signs of zeros as an angle."""
    spec = make_spec("packed128", (6, 12), block=6, mode=mode)
    one = torch.ones((2, 1), dtype=torch.int64)
    code = packed128.code_of(one, one * 300, one * 4000, one * q, one * 0xF0F0F)
    seeds = packed128.join(code, torch.tensor([[0.0], [0.4]]), torch.tensor([[2.0], [-2.0]]), spec)
    w = packed128.generate(seeds, spec)
    for b in range(2):
        hi, lo = (word % 2**64 for word in seeds[b].tolist())
        for i, j in [(0, 0), (5, 1), (2, 4)]:
            if mode == "radial" and b == 0:
                continue  # a zero vector keeps its angle in radial mode, which the printed steps cannot show
            assert w[b, i, j].item() == pytest.approx(printed(hi, lo, i, j, 6, 6, mode), rel=1e-9)
