"""The C++ kernels of outer128, tier by tier: as exact as float32 in every block, and the operations of training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rbe import kernels
from rbe.formats import SeedSpec, make_spec, outer128
from rbe.kernels import Tensors, bands, latent, ops, outer, outer_cpu
from rbe.kernels.latent import signs_of
from rbe.kernels.reference import Definition
from rbe.nn import Linear

TIERS = ("portable", "avx2", "avx512")
# Whole, cut and single blocks of every edge, several stages, groups and runs that are not full.
CASES: tuple[dict[str, Any], ...] = (
    {"shape": (48, 64)},
    {"shape": (50, 570), "stages": 2},
    {"shape": (33, 20), "block": 8, "stages": 3},
    {"shape": (20, 700), "block": 8, "rotation": (3, 0)},
    {"shape": (70, 35), "block": 32, "rotation": (3, 5)},
    {"shape": (130, 100), "block": 64, "stages": 2},
    {"shape": (7, 90), "block": 64, "rotation": (0, 5)},
    {"shape": (1, 40)},
    {"shape": (40, 1), "block": 32},
)
NAMES = [f"{'x'.join(map(str, c['shape']))}-{c.get('block', 16)}" for c in CASES]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tensors(spec: SeedSpec) -> Tensors:
    """An open matrix with radii up to the rim, one of 0, small and large angles, and a factor a row."""
    g = torch.Generator().manual_seed(0)
    shape = (spec.blocks, spec.stages)
    code = torch.randint(-(2**63), 2**63 - 1, shape, generator=g)
    radius = torch.rand(shape, generator=g)
    angle = (torch.rand(shape, generator=g) - 0.5) * torch.tensor([4.0, 2000.0]).repeat(spec.stages)[: spec.stages]
    if spec.blocks > 3:
        radius[1], radius[2], radius[3] = 0.0, 1 - 2**-24, 1e-20
    row_scale = (0.5 + torch.rand(spec.shape[0], generator=g)).half()
    return Tensors(code, torch.tensor(0.3), row_scale, radius, angle)


def assert_close(mine: Tensor, naive: Tensor, exact: Tensor, about: object = "", floor: float = 2e-6) -> None:
    """At most twice the naive error, or a few units in the last place where the naive sum is lucky."""
    allowed = 2 * (naive.double() - exact).norm() + floor * exact.norm()
    assert (mine.double() - exact).norm() <= allowed, about
    assert mine.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_everything_is_as_exact_as_float32(tier: str, case: dict[str, Any]) -> None:
    spec = make_spec("outer128", **case)
    tensors, (rows, columns) = random_tensors(spec), spec.shape
    mine = ops.source(spec, tensors)
    assert isinstance(mine, outer_cpu.Outer)
    naive, exact = Definition(spec, tensors, torch.float32), Definition(spec, tensors, torch.float64)
    dense = bands.decode(exact)
    assert_close(outer_cpu.decode(mine), bands.decode(naive), dense)
    if not spec.rotation[0]:
        index = torch.tensor([rows - 1, 0, rows // 2, 0])
        assert_close(bands.rows(mine, index), bands.rows(naive, index), dense[index])
    for n in (1, 2, 3, 35):
        x, y = random(n, columns), random(n, rows)
        assert_close(outer_cpu.matmul(mine, x), bands.matmul(naive, x), bands.matmul(exact, x.double()), n)
        d_x, gradients, signs = outer_cpu.backward(mine, x, y, True, signs=True)
        assert d_x is not None and gradients is not None and signs is not None
        assert_close(d_x, bands.matmul_transposed(naive, y), bands.matmul_transposed(exact, y.double()), n)
        sums = bands.gradient(naive, x, y), bands.gradient(exact, x.double(), y.double())
        # Sums that cancel have the error of their parts.
        size = float(x.double().norm() * y.double().norm() * dense.norm())
        for one, plain, right in zip(gradients, *sums, strict=True):
            floor = 5e-6 * max(float(right.norm()), 0.01 * size)
            assert (one.double() - right).norm() <= 2 * (plain.double() - right).norm() + floor, n


@pytest.mark.parametrize("size", [1e-30, 1e-6, 0.3, 0.35, 1 - 2**-24])
def test_radii_of_every_size(tier: str, size: float) -> None:
    """Near the origin and near the rim, where differences cancel."""
    spec = make_spec("outer128", (32, 64))
    code, scale, _, radius, angle, _, _ = random_tensors(spec)
    tensors = Tensors(code, scale, None, torch.full_like(radius, size), angle)  # type: ignore[arg-type]
    exact = bands.decode(Definition(spec, tensors, torch.float64))
    mine = ops.source(spec, tensors)
    assert (outer_cpu.decode(mine).double() - exact).norm() <= 2e-7 * exact.norm()  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_frozen_seeds_and_small_bands(tier: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec("outer128", **case)
    code, scale, row_scale, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None
    seeds = outer128.join(code, radius, angle, spec)
    frozen, opened = ops.source(spec, Tensors(seeds, scale, row_scale)), ops.source(spec, random_tensors(spec))
    x, y = random(5, spec.shape[1]), random(5, spec.shape[0])
    for size in (bands.TILE, 1):
        monkeypatch.setattr(bands, "TILE", size)
        assert torch.equal(outer_cpu.matmul(frozen, x), outer_cpu.matmul(opened, x))
        assert torch.equal(outer_cpu.decode(frozen), outer_cpu.decode(opened))
        by_scale = [outer_cpu.backward(some, x, y, False)[1][2] for some in (frozen, opened)]  # type: ignore[index]
        assert torch.equal(*by_scale)
        parts = [bands.gradient(some, x, y) for some in (opened, Definition(spec, opened.tensors, torch.float32))]
        for mine, plain in zip(*parts, strict=True):
            assert torch.allclose(mine, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()) + 1e-4)


@pytest.mark.parametrize("block", outer128.BLOCKS)
def test_the_number_of_threads_changes_nothing(block: int) -> None:
    spec = make_spec("outer128", (600, 500), block=block)
    source = ops.source(spec, random_tensors(spec))
    x, y = random(7, 500), random(7, 600)
    outputs = []
    for threads in (1, 2, 3):
        out, d_x, w = torch.empty(7, 600), torch.empty(7, 500), torch.empty(600, 500)
        source.native.matmul(x.data_ptr(), 7, out.data_ptr(), threads)  # type: ignore[attr-defined]
        source.native.transposed(y.data_ptr(), 7, d_x.data_ptr(), threads)  # type: ignore[attr-defined]
        source.native.decode(0, 600, w.data_ptr(), threads)  # type: ignore[attr-defined]
        outputs.append((out, d_x, w))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("block", outer128.BLOCKS)
def test_codes_of_latents(tier: str, block: int) -> None:
    spec = make_spec("outer128", (70, 90), block=block, stages=2)
    numbers = random(spec.blocks, 2, 64)
    numbers[0, 0, :6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), -1e-40])
    assert torch.equal(outer_cpu.code_of(numbers, spec), outer128.code_of(numbers, spec))


def training_tensors(block: int, rotation: tuple[int, int] = (0, 0)) -> tuple[SeedSpec, list[Tensor]]:
    spec = make_spec("outer128", (50, 70), block=block, rotation=rotation, stages=2)
    _, scale, row_scale, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None and row_scale is not None
    parts = [random(7, 70), random(spec.blocks, 2, 64, seed=2), 0.9 * radius, angle, scale]
    return spec, [*(p.requires_grad_() for p in parts), row_scale]


@pytest.mark.parametrize("block", outer128.BLOCKS)
def test_training_equals_plain_torch(tier: str, block: int) -> None:
    for rotation in ((0, 0), (3, 5)):
        spec, parts = training_tensors(block, rotation)
        probe, dense_probe = random(7, 50, seed=3), random(50, 70, seed=4)
        x, numbers, *rest = parts
        pairs = (
            (latent.matmul(*parts, spec), outer.matmul(x, signs_of(numbers), *rest, spec), probe),
            (latent.decode(*parts[1:], spec), outer.decode(signs_of(numbers), *rest, spec), dense_probe),
        )
        for mine, plain, upstream in pairs:
            assert type(mine.grad_fn).__name__ in ("_MatmulBackward", "_DecodeBackward")  # not the slow path
            assert (mine - plain).norm() <= 1e-6 * plain.norm()
            wanted = parts[:5] if upstream is probe else parts[1:5]
            grads = [torch.autograd.grad((y * upstream).sum(), wanted) for y in (mine, plain)]
            for one, other in zip(*grads, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("block", outer128.BLOCKS)
@pytest.mark.parametrize("count", [40, 300])
def test_training_of_many_rows_is_as_exact_as_float32(tier: str, block: int, count: int) -> None:
    """Latents, radius, angle, scale and x, against plain torch in float64 and in float32."""
    spec, (_, *seeds) = training_tensors(block)
    x, probe = random(count, 70).requires_grad_(), random(count, 50, seed=3)

    def derivatives(product: Any, dtype: torch.dtype) -> list[Tensor]:
        parts = [x, *seeds[:4]]
        wide = [p.detach().to(dtype).requires_grad_() for p in parts]
        y = product(*wide, seeds[4])
        return [y, *torch.autograd.grad((y * probe.to(dtype)).sum(), wide)]

    def plain(x: Tensor, numbers: Tensor, *rest: Tensor) -> Tensor:
        return outer.matmul(x, signs_of(numbers), *rest, spec)

    mine = derivatives(lambda *parts: latent.matmul(*parts, spec), torch.float32)
    naive, exact = derivatives(plain, torch.float32), derivatives(plain, torch.float64)
    for k, (one, other, right) in enumerate(zip(mine, naive, exact, strict=True)):
        assert_close(one.detach(), other.detach(), right.detach(), k)


def test_derivatives_of_derivatives_are_those_of_plain_torch() -> None:
    spec, parts = training_tensors(16)
    x, numbers, *rest = parts

    def slope(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), [x, numbers], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), parts[:5]))

    grads = slope(latent.matmul(*parts, spec)), slope(outer.matmul(x, signs_of(numbers), *rest, spec))
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(*grads, strict=True))


def test_opcheck_of_training() -> None:
    spec, parts = training_tensors(16)
    line, fixed = ops.text(spec), [p.detach() for p in parts]
    torch.library.opcheck(latent.latent_matmul, (*parts, line))
    torch.library.opcheck(latent.latent_decode, (*parts[1:], line))
    for by_x in (True, False):
        torch.library.opcheck(latent.latent_backward, (fixed[0], random(7, 50), *fixed[1:], line, by_x))
    torch.library.opcheck(latent.latent_decode_gradient, (random(50, 70), *fixed[1:], line))


def test_opcheck_of_frozen_matrices() -> None:
    spec = make_spec("outer128", (20, 33))
    code, scale, row_scale, radius, angle, _, _ = random_tensors(spec)
    assert radius is not None and angle is not None
    tensors = (outer128.join(code, radius, angle, spec), scale.requires_grad_(), row_scale, None, None)
    line = ops.text(spec)
    torch.library.opcheck(ops.seed_matmul, (random(2, 33).requires_grad_(), *tensors, None, None, line, "float32"))
    torch.library.opcheck(ops.seed_matmul_transposed, (random(2, 20).requires_grad_(), *tensors, None, None, line))
    torch.library.opcheck(ops.decode, (*tensors, None, None, line))
    torch.library.opcheck(ops.rows, (torch.tensor([1, 19]), *tensors, None, None, line))


def test_compiled_layers_equal_eager_ones() -> None:
    torch.manual_seed(0)
    layer, x = Linear(40, 24, format="outer128"), random(3, 40)

    def gradients(run: Any) -> list[Tensor]:
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, other in zip(gradients(compiled), gradients(layer), strict=True):
        assert torch.equal(mine, other)
    layer.freeze()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_operations_are_counted_as_dense_ones() -> None:
    torch.manual_seed(0)
    x = random(3, 40)
    for frozen in (False, True):
        layer = Linear(40, 24, False, format="outer128")
        layer = layer.freeze() if frozen else layer
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        assert counter.get_total_flops() == 2 * 3 * 24 * 40
        if not frozen:
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            assert counter.get_total_flops() == 2 * 3 * 24 * 40  # x wants no gradient


def test_half_precision_and_no_rows() -> None:
    spec, parts = training_tensors(16)
    y = latent.matmul(parts[0].bfloat16(), *parts[1:], spec)
    assert y.dtype == torch.bfloat16
    exact = latent.matmul(*parts, spec)
    assert (y.float() - exact).norm() <= 0.02 * exact.norm()
    empty = torch.zeros(0, 70, requires_grad=True)
    latent.matmul(empty, *parts[1:], spec).sum().backward()
    assert empty.grad is not None and parts[1].grad is not None and not parts[1].grad.any()
    seeds = outer128.join(outer_cpu.code_of(parts[1].detach(), spec), parts[2], parts[3], spec)
    assert kernels.seed_matmul(torch.zeros(0, 70), spec, seeds, parts[4].detach(), None).shape == (0, 50)
