"""The C++ kernels of the packed formats, tier by tier: as exact as float32 in any shape; and why they are fast."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rbe import formats, kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, packed64, packed128
from rbe.kernels import Tensors, bands, cpu, ops, packed
from rbe.kernels.reference import Definition
from rbe.mixing import fmix32

TIERS = ("portable", "avx2", "avx512")
KINDS: tuple[dict[str, Any], ...] = (
    {"format": "packed64"},
    {"format": "packed128", "mode": "faithful"},
    {"format": "packed128", "mode": "radial"},
)
KIND_NAMES = ["packed64", "faithful", "radial"]
# Shapes with whole, cut and single blocks; edges whose quarters fill, share and overflow a vector; several stages.
SHAPES = (
    {"shape": (48, 64)},
    {"shape": (50, 70), "stages": 2},
    {"shape": (7, 3), "block": 1},
    {"shape": (9, 7), "block": 2},
    {"shape": (13, 8), "block": 3},
    {"shape": (33, 20), "block": 8},
    {"shape": (50, 50), "block": 17, "stages": 2},
    {"shape": (70, 35), "block": 33},
    {"shape": (130, 100), "block": 64},
    {"shape": (140, 150), "block": 130},
    {"shape": (30, 40), "block": None, "stages": 2},
    {"shape": (1, 40), "block": None},
    {"shape": (40, 1), "block": None},
)
SHAPE_NAMES = [f"{'x'.join(map(str, s['shape']))}-{s.get('block', 16)}" for s in SHAPES]


def random_tensors(spec: SeedSpec, seed: int = 0) -> Tensors:
    """An open matrix with every kind of field, one radius 0, and a factor a row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.blocks, spec.stages)
    code = torch.randint(
        -(2**63), 2**63 - 1, (spec.blocks, 0 if spec.format == "packed64" else spec.stages), generator=generator
    )
    radius = 0.999 * torch.rand(shape, generator=generator)
    if spec.blocks > 2:
        radius[1] = 0
    angle = 20 * torch.rand(shape, generator=generator) - 10
    row_scale = (0.5 + torch.rand(spec.shape[0], generator=generator)).half()
    return Tensors(code, torch.tensor(0.3), row_scale, radius, angle)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def judges(spec: SeedSpec, tensors: Tensors) -> tuple[packed.Packed, Definition, Definition]:
    """The C++ kernel, the naive computation in the same precision, and the definition."""
    mine = ops.source(spec, tensors)
    assert isinstance(mine, packed.Packed)
    return mine, Definition(spec, tensors, torch.float32), Definition(spec, tensors, torch.float64)


def assert_close(mine: Tensor, naive: Tensor, exact: Tensor, about: object = "") -> None:
    """At most twice the naive error, or a few units in the last place where the naive sum is lucky."""
    allowed = 2 * (naive.double() - exact).norm() + 2e-6 * exact.norm()
    assert (mine.double() - exact).norm() <= allowed, about
    assert mine.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("case", SHAPES, ids=SHAPE_NAMES)
def test_everything_is_as_exact_as_float32(tier: str, kind: dict[str, Any], case: dict[str, Any]) -> None:
    spec = make_spec(**kind, **case)
    tensors = random_tensors(spec)
    mine, naive, exact = judges(spec, tensors)
    rows, columns = spec.shape
    assert_close(packed.decode(mine), *(bands.decode(s) for s in (naive, exact)))
    index = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert_close(mine.rows(index), naive.rows(index), exact.rows(index))
    # Rows one by one, a few together, and enough for the gradient by a block to be formed; once more than are taken at
    # once, by a row.
    for n in (1, 2, 3, 7, 35, *([129] if case is SHAPES[1] else [])):
        x, y = random(n, columns), random(n, rows)
        assert_close(packed.matmul(mine, x), bands.matmul(naive, x), bands.matmul(exact, x.double()), n)
        d_x, gradients = packed.backward(mine, x, y, True)
        alone, none = packed.backward(mine, None, y, True)
        nothing, again = packed.backward(mine, x, y, False)
        assert d_x is not None and gradients is not None and alone is not None and again is not None
        assert none is None and nothing is None
        transposed = bands.matmul_transposed(naive, y), bands.matmul_transposed(exact, y.double())
        assert_close(d_x, *transposed, n)
        assert_close(alone, *transposed, n)
        sums = bands.gradient(naive, x, y), bands.gradient(exact, x.double(), y.double())
        scaled = float(x.double().norm() * y.double().norm() * bands.decode(exact).norm())
        for one, other, plain, right in zip(gradients, again, *sums, strict=True):
            # Sums that cancel have the error of their parts.
            bound = 2 * (plain.double() - right).norm() + 5e-6 * max(float(right.norm()), 0.01 * scaled)
            assert (one.double() - right).norm() <= bound and (other.double() - right).norm() <= bound, n


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_directions_are_derivatives(tier: str, kind: dict[str, Any]) -> None:
    for case in SHAPES[:10:3]:
        spec = make_spec(**kind, **case)
        tensors = random_tensors(spec)
        along = tensors._replace(d_radius=random(spec.blocks, spec.stages), d_angle=random(spec.blocks, spec.stages))
        mine, naive, exact = judges(spec, along)
        assert_close(packed.decode(mine), bands.decode(naive), bands.decode(exact))
        x, y = random(3, spec.shape[1]), random(3, spec.shape[0])
        assert_close(packed.matmul(mine, x), bands.matmul(naive, x), bands.matmul(exact, x.double()))
        d_x = packed.backward(mine, None, y, True)[0]
        assert d_x is not None
        assert_close(d_x, bands.matmul_transposed(naive, y), bands.matmul_transposed(exact, y.double()))


@pytest.mark.parametrize("kind", [*KINDS, {"format": "packed64", "precision": 64}], ids=[*KIND_NAMES, "precision64"])
def test_frozen_seeds_are_read_right(tier: str, kind: dict[str, Any]) -> None:
    for case in SHAPES[:2]:
        spec = make_spec(**kind, **case)
        parts = random_tensors(spec)
        assert parts.radius is not None and parts.angle is not None
        seeds = formats.disk(spec.format).join(parts.seeds, parts.radius, parts.angle, spec)
        mine, naive, exact = judges(spec, Tensors(seeds, parts.scale, parts.row_scale))
        assert_close(packed.decode(mine), bands.decode(naive), bands.decode(exact))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_tiers_agree(kind: dict[str, Any]) -> None:
    spec = make_spec(shape=(50, 70), **kind)
    tensors = random_tensors(spec)
    _, naive, exact = judges(spec, tensors)
    x, y = random(5, 70), random(5, 50)
    products, gradients = [], []
    for name in filter(cpu.tier_available, TIERS):
        cpu.set_tier(name)
        mine = ops.source(spec, tensors)
        assert isinstance(mine, packed.Packed)
        products.append(packed.matmul(mine, x))
        gradients.append(packed.backward(mine, x, y, True)[0])
    cpu.set_tier("")
    slack = 4 * (bands.matmul(naive, x).double() - bands.matmul(exact, x.double())).norm() + 4e-6 * products[0].norm()
    assert all((other - products[0]).norm() <= slack for other in products[1:])
    assert gradients[0] is not None
    assert all(
        torch.allclose(gradients[0], other, rtol=1e-4, atol=1e-3) for other in gradients[1:] if other is not None
    )


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("case", [{"block": 16}, {"block": None}], ids=["16", "None"])
def test_the_number_of_threads_changes_nothing(kind: dict[str, Any], case: dict[str, Any]) -> None:
    spec = make_spec(shape=(500, 400), **kind, **case)
    source = ops.source(spec, random_tensors(spec))
    assert isinstance(source, packed.Packed)
    x, y = random(7, 400), random(7, 500)
    outputs = []
    for threads in (1, 2, 3):
        w, g = torch.empty(500, 400), random(500, 400)
        sums = torch.zeros(spec.blocks, spec.stages, 3, dtype=torch.float64)
        source.native.decode(0, 500, w.data_ptr(), threads)
        source.native.contract(0, 500, g.data_ptr(), sums.data_ptr(), threads)
        outputs.append([w, sums])
        if kind["format"] == "packed128" and case["block"]:
            d_y, d_x, by_seeds = torch.empty(7, 500), torch.empty(7, 400), torch.empty(3, spec.blocks, 1)
            source.native.matmul(x.data_ptr(), 7, d_y.data_ptr(), threads)
            addresses = d_x.data_ptr(), *(plane.data_ptr() for plane in by_seeds)
            source.native.backward(x.data_ptr(), y.data_ptr(), 7, *addresses, threads)
            outputs[-1] += [d_y, d_x, by_seeds]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_a_block_of_sixteen_has_22_radii() -> None:
    rho, _ = packed128.cells(16, 16)
    # The exact radii are square roots of sums of two odd squares, up to 0.99 of 15.
    odd = torch.arange(-15, 16, 2)
    squares = (odd[:, None] ** 2 + odd[None, :] ** 2).clamp_max(math.floor((0.99 * 15) ** 2) + 1)
    assert squares.unique().numel() == 22
    for square in squares.unique():
        mine = rho[squares == square]
        assert (mine.max() - mine.min()) < 1e-15


def test_cells_mirror_each_other() -> None:
    """What lets a quarter of the cosines and sines stand for a block."""
    for height, width in ((16, 16), (5, 8), (3, 7)):
        rho, a = packed128.cells(height, width)
        assert torch.allclose(rho, rho.flip(0)) and torch.allclose(rho, rho.flip(1))
        for q in range(64):
            cos, sin = torch.cos(q * a), torch.sin(q * a)
            sign = 1 - 2 * (q % 2)
            # The angle of the middle row's left half is pi on both sides of the cut.
            assert torch.allclose(cos, cos.flip(0)) and torch.allclose(sin, -sin.flip(0), atol=1e-12)
            assert torch.allclose(cos, sign * cos.flip(1), atol=1e-12) or width % 2
            left = slice(0, width // 2)
            assert torch.allclose(cos[:, left], sign * cos.flip(1)[:, left], atol=1e-12)
            assert torch.allclose(sin[:, left], -sign * sin.flip(1)[:, left], atol=1e-12)


def test_faithful_weights_are_two_products_from_tables() -> None:
    """20 CORDIC steps with their clamps are a fixed turn and one radius: equality with the steps one by one."""
    spec = make_spec("packed128", (64, 64), mode="faithful")
    code, _, _, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None
    radius, angle = radius.double(), angle.double()
    radius[1] = 0.3  # the origin has no angle
    exact = packed128.values(code, radius, angle, spec)
    field = packed128.fields(code)
    _, a = packed128.cells(16, 16)
    turn = angle + packed128.turn(field["cordic_seq"])
    alpha, amplitude = field["hyp_freq"].double() * (10 / 4095), 2 * field["geo_amp"].double() / 4095 - 1
    c = amplitude * packed128.basis(field["quadrant"], alpha * packed128.final_radius(radius)[0])[0]
    q = field["basis_sel"].double()
    odd = field["basis_sel"] >= 32
    u = c * torch.where(odd, torch.sin(q * turn), torch.cos(q * turn))
    v = c * torch.where(odd, torch.cos(q * turn), -torch.sin(q * turn))
    wave = q[..., None, None] * a
    tables = (u[..., None, None] * torch.cos(wave) + v[..., None, None] * torch.sin(wave)).sum(1)
    assert (tables - exact).abs().max() <= 1e-11 * exact.abs().max()


def test_packed64_is_a_kronecker_product() -> None:
    spec = make_spec("packed64", (32, 48))
    code, _, _, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None
    blocks = packed64.values(code, radius.double(), angle.double(), spec)
    whole = blocks.reshape(2, 3, 16, 16).transpose(1, 2).reshape(32, 48)
    amplitudes = packed64.coefficient(radius.double(), angle.double()).reshape(2, 3)
    assert torch.allclose(whole, torch.kron(amplitudes, packed64.modulation(16, 16, 0)))


def test_the_origin_of_the_faithful_mode_is_constant() -> None:
    spec = make_spec("packed128", (16, 32), mode="faithful")
    cosine, sine = (packed128.code_of(*(torch.tensor([[v]]) for v in (1, 400, 4095, q, 0b1011))) for q in (5, 40))
    code, zero = torch.cat([cosine, sine]), torch.zeros(2, 1)
    w = kernels.decode(spec, code, torch.tensor(1.0), None, zero, zero + 2)
    assert torch.equal(w[:, :16], torch.ones(16, 16)) and torch.equal(w[:, 16:], torch.zeros(16, 16))
    angle = (zero + 2).requires_grad_()
    kernels.decode(spec, code, torch.tensor(1.0), None, zero, angle).sum().backward()
    assert angle.grad is not None and torch.equal(angle.grad, zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_their_dtype(dtype: torch.dtype) -> None:
    spec = make_spec("packed128", (40, 50))
    tensors = random_tensors(spec)
    x = random(3, 50).to(dtype)
    parts = {"radius": tensors.radius, "angle": tensors.angle}
    y = kernels.seed_matmul(x, spec, *tensors[:3], **parts)
    assert y.dtype == dtype
    assert torch.equal(y, kernels.seed_matmul(x.float(), spec, *tensors[:3], **parts).to(dtype))
    for shape in ((50,), (2, 3, 50), (0, 50)):
        assert kernels.seed_matmul(random(*shape), spec, *tensors[:3], **parts).shape == (*shape[:-1], 40)


def test_one_seed_for_a_huge_matrix() -> None:
    index = torch.tensor([50256, 0, 31000])
    spec = make_spec("packed64", (50257, 768), block=None)
    code, scale, row_scale, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None and row_scale is not None
    h = fmix32(torch.arange(768) ^ fmix32(index[:, None] ^ 0x9E3779B9))
    phi = 1 + 0.1 * torch.sin(h.double() * (math.tau / 2**32))
    exact = 0.3 * packed64.coefficient(radius.double(), angle.double()) * phi * row_scale[index, None].double()
    rows = kernels.rows(index, spec, code, scale, row_scale, radius, angle)
    assert torch.allclose(rows.double(), exact, rtol=2e-6)

    spec = make_spec("packed128", (50257, 768), block=None)
    code, scale, _, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None
    rows = kernels.rows(index, spec, code, scale, None, radius, angle)
    y, x = 2 * index.double()[:, None] / 50256 - 1, 2 * torch.arange(768).double() / 767 - 1
    field = packed128.fields(code)
    alpha, q = field["hyp_freq"].double().clamp_min(1) * (10 / 4095), field["basis_sel"].double()
    at = torch.hypot(x, y).clamp_max(0.99) * radius.double() * alpha * packed128.GAIN
    f = packed128.basis(field["quadrant"], at)[0] / packed128.basis(field["quadrant"], alpha * packed128.GAIN)[0]
    phase = q * (torch.atan2(y, x) + angle.double() + packed128.turn(field["cordic_seq"]))
    wave = torch.sin(phase) if q >= 32 else torch.cos(phase)
    exact = 0.3 * (2 * field["geo_amp"].double() / 4095 - 1) * f * wave
    assert (rows.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("mode", ["packed64", "radial"])
def test_a_training_step_stores_no_matrix(mode: str) -> None:
    """Memory of a forward and backward pass over 256 MB of weights stays far below them."""
    program = f"""
import resource, torch
from rbe import kernels
from rbe.formats import make_spec
torch.set_num_threads(1)
spec = make_spec({"'packed64'" if mode == "packed64" else "'packed128'"}, (8192, 8192))
code = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, {0 if mode == "packed64" else 1}))
r, a = (torch.rand(spec.blocks, 1).requires_grad_() for _ in range(2))
x, scale = torch.randn(4, 8192).requires_grad_(), torch.tensor(0.1).requires_grad_()
small = make_spec(spec.format, (64, 64))
kernels.seed_matmul(x[:, :64], small, code[:16], scale, None, radius=r[:16], angle=a[:16]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernels.seed_matmul(x, spec, code, scale, None, radius=r, angle=a).sum().backward()
assert all(bool(t.grad.isfinite().all()) for t in (x, scale, r, a))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 48 << 10  # kilobytes


@pytest.mark.parametrize("mode", packed128.MODES)
def test_the_largest_angles_are_computed_and_larger_ones_refused(tier: str, mode: str) -> None:
    spec = make_spec("packed128", (40, 24), block=8, mode=mode)
    code, scale, _, radius, _, _, _ = random_tensors(spec)
    assert radius is not None
    # Beyond, weights would be noise, from 1e16 on of any size.
    for angle in (1e6, -(2.0**24 - 1)):
        seeds = packed128.join(code, radius, torch.full_like(radius, angle), spec)
        exact = kernels.decode(spec, seeds, scale.double(), None)
        assert (kernels.decode(spec, seeds, scale, None) - exact).abs().max() < 1e-5 * exact.abs().max()
    for angle in (2.0**24, -1e16, 3e38):
        with pytest.raises(RbeError, match=r"angle is .* within 2\^24"):
            packed128.join(code, radius, torch.full_like(radius, angle), spec)
