"""Derivatives of the operations on packed matrices: autograd, torch.func, torch.compile."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from rbe import formats, kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec
from rbe.kernels import Tensors, ops
from rbe.nn import Linear

KINDS: tuple[dict[str, Any], ...] = (
    {"format": "packed64"},
    {"format": "packed128", "mode": "faithful"},
    {"format": "packed128", "mode": "radial"},
)
BLOCKS: tuple[dict[str, Any], ...] = ({"block": 16}, {"block": 5, "stages": 2}, {"block": None})
CASES = [{**kind, **block} for kind, block in itertools.product(KINDS, BLOCKS)]
NAMES = ["-".join(str(v) for v in case.values()) for case in CASES]
SHAPE = (20, 33)
ROW_SCALE = torch.linspace(0.5, 1.5, 20).half()


def spec_of(case: dict[str, Any], rotation: tuple[int, int] = (0, 0)) -> SeedSpec:
    return make_spec(shape=SHAPE, rotation=rotation, **case)


def point(spec: SeedSpec, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Code, radius and angle, away from the jumps of the faithful mode."""
    generator = torch.Generator().manual_seed(3)
    shape = (spec.blocks, spec.stages)
    stages = 0 if spec.format == "packed64" else spec.stages
    code = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, stages), generator=generator)
    # Low frequencies: steep profiles would turn rounding into large numbers.
    code = code & ~(((1 << 12) - 1) << 50) | (400 << 50)
    radius = 0.1 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    angle = 6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return code, radius.to(dtype), angle.to(dtype)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def calls(spec: SeedSpec, code: Tensor, row_scale: Tensor | None) -> dict[str, Callable[..., Tensor]]:
    """The three operations as functions of (x, scale, radius, angle)."""
    index = torch.tensor([[3, 19, 3]])
    made = {
        "matmul": lambda x, scale, r, a: kernels.seed_matmul(x, spec, code, scale, row_scale, radius=r, angle=a),
        "decode": lambda x, scale, r, a: kernels.decode(spec, code, scale, row_scale, r, a),
        "rows": lambda x, scale, r, a: kernels.rows(index, spec, code, scale, row_scale, r, a),
    }
    if spec.rotation[0]:
        del made["rows"]
    return made


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradcheck_in_float64(case: dict[str, Any]) -> None:
    for rotation, row_scale in (((0, 0), ROW_SCALE), ((3, 5), None)):
        spec = spec_of(case, rotation)
        code, radius, angle = point(spec, torch.float64)
        inputs = (random_x(2, 33, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), radius, angle)
        for call in calls(spec, code, row_scale).values():
            given = [t.clone().requires_grad_() for t in inputs]
            assert torch.autograd.gradcheck(call, given, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_float32_gradients_equal_the_definition(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.bands, "TILE", 33 * 8)  # several bands
    for rotation, row_scale in (((0, 0), ROW_SCALE), ((3, 5), None)):
        spec = spec_of(case, rotation)
        code, radius, angle = point(spec)
        inputs = (random_x(50, 33), torch.tensor(0.7), radius, angle)
        for name, call in calls(spec, code, row_scale).items():
            results = []
            for dtype in (torch.float32, torch.float64):
                given = [t.to(dtype).requires_grad_() for t in inputs]
                y = call(*given)
                weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
                grads = torch.autograd.grad((y.double() * weights).sum(), given, allow_unused=name != "matmul")
                results.append([y, *(g for g in grads if g is not None)])
            for single, double in zip(*results, strict=True):
                # One seed for everything: its sums cancel.
                bound = 2e-6 if case["block"] == 16 else 2e-5
                assert (single.double() - double).norm() <= bound * double.norm() + 1e-30, (name, rotation)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("case", [*CASES, {"format": "trellis", "bits": 2}], ids=[*NAMES, "trellis"])
def test_torch_func_agrees_with_autograd(case: dict[str, Any]) -> None:
    spec = spec_of(case)
    x, scale = random_x(4, 33), torch.tensor(0.7)
    if spec.format == "trellis":
        seeds = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, 8), generator=torch.Generator().manual_seed(0))
        parts: tuple[Tensor, ...] = (x, scale)

        def call(x: Tensor, scale: Tensor) -> Tensor:
            return kernels.seed_matmul(x, spec, seeds, scale, ROW_SCALE)
    else:
        code, radius, angle = point(spec)
        parts = (x, scale, radius, angle)
        call = calls(spec, code, ROW_SCALE)["matmul"]
    every = tuple(range(len(parts)))
    weights = random_x(4, 20)

    def loss(*parts: Tensor) -> Tensor:
        return (call(*parts) * weights).sum()

    given = [p.clone().requires_grad_() for p in parts]
    expected = torch.autograd.grad(loss(*given), given)
    for mine, other in zip(torch.func.grad(loss, every)(*parts), expected, strict=True):
        # The derivative by x alone and the one that comes with the seeds' add up in another order.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
    y, pull = torch.func.vjp(call, *parts)
    assert torch.equal(y, call(*parts))
    for mine, other in zip(pull(weights), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
    # Forward mode: along any direction, the derivative of the loss is the gradient times the direction.
    directions = tuple(random_x(*p.shape) for p in parts)
    slope = torch.func.jvp(loss, parts, directions)[1]
    sizes = [(d.double() * g.double()).sum() for d, g in zip(directions, expected, strict=True)]
    assert abs(float(slope) - float(sum(sizes))) <= 1e-4 * float(sum(abs(s) for s in sizes))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, d) for p, d in zip(parts, directions, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(loss(*duals)).tangent, slope)
    # One gradient a sample, and one a member of an ensemble.
    per_sample = torch.func.vmap(
        torch.func.grad(lambda s, r: (call(r, s) if len(parts) == 2 else call(r, s, *parts[2:])).sum()), (None, 0)
    )
    one = per_sample(scale, x)
    whole = torch.func.grad(lambda s: (call(x, s) if len(parts) == 2 else call(x, s, *parts[2:])).sum())(scale)
    assert torch.allclose(one.sum(), whole, rtol=1e-4)
    stacked = tuple(torch.stack([p, 0.5 * p]) for p in parts)
    both = torch.func.vmap(call)(*stacked)
    assert torch.equal(both[1], call(*(0.5 * p for p in parts)))
    jacobian = torch.func.jacrev(lambda x: call(x, *parts[1:]))(x[0])
    assert torch.allclose(jacobian, torch.func.jacfwd(lambda x: call(x, *parts[1:]))(x[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("kind", KINDS, ids=["packed64", "faithful", "radial"])
def test_jacobians_by_the_radius(kind: dict[str, Any]) -> None:
    spec = spec_of({**kind, "block": 16})
    code, radius, angle = point(spec)
    x, scale = random_x(2, 33), torch.tensor(0.7)

    def call(r: Tensor) -> Tensor:
        return kernels.seed_matmul(x, spec, code, scale, None, radius=r, angle=angle)

    backward, forward = torch.func.jacrev(call)(radius), torch.func.jacfwd(call)(radius)
    assert backward.shape == (2, 20, spec.blocks, 1)
    assert torch.allclose(backward, forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["packed64", "faithful", "radial"])
def test_opcheck_of_open_matrices(kind: dict[str, Any]) -> None:
    spec = spec_of({**kind, "block": 16})
    code, radius, angle = point(spec)
    scale, line = torch.tensor(0.7, requires_grad=True), ops.text(spec)
    tensors = (code, scale, ROW_SCALE, radius.requires_grad_(), angle.requires_grad_())
    fixed = tuple(t.detach() for t in tensors)
    x, y, index = random_x(2, 33).requires_grad_(), random_x(2, 20).requires_grad_(), torch.tensor([1, 19])
    torch.library.opcheck(ops.seed_matmul, (x, *tensors, None, None, line, "float32"))
    torch.library.opcheck(ops.seed_matmul_transposed, (y, *tensors, None, None, line))
    torch.library.opcheck(ops.decode, (*tensors, None, None, line))
    torch.library.opcheck(ops.rows, (index, *tensors, None, None, line))
    torch.library.opcheck(ops.seed_gradient, (x.detach(), y.detach(), *fixed, line))
    torch.library.opcheck(ops.seed_backward, (x.detach(), y.detach(), *fixed, line))
    torch.library.opcheck(ops.decode_gradient, (random_x(20, 33), *fixed, line))
    torch.library.opcheck(ops.rows_gradient, (index, random_x(2, 33), *fixed, line))


@pytest.fixture
def compiler() -> None:
    """Skips where torch.compile cannot run for want of a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as cause:
        pytest.skip(f"torch.compile has no C++ compiler here: {cause}")


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about itself
def test_compiled_training_step_equals_eager() -> None:
    spec = spec_of({"format": "packed128", "mode": "radial", "block": 16})
    code, radius, angle = point(spec)
    x = random_x(3, 33)

    def loss(radius: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
        return kernels.seed_matmul(x, spec, code, scale, None, radius=radius, angle=angle).square().sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        given = [t.clone().requires_grad_() for t in (radius, angle, torch.tensor(0.7))]
        run(*given).backward()
        grads.append([t.grad for t in given])
    for eager, compiled in zip(*grads, strict=True):
        assert eager is not None and compiled is not None and torch.equal(eager, compiled)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_no_rows_have_no_gradient(case: dict[str, Any]) -> None:
    spec = spec_of(case)
    code, radius, angle = point(spec)
    x, scale = random_x(0, 33).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    given = (x, scale, radius.requires_grad_(), angle.requires_grad_())
    calls(spec, code, None)["matmul"](*given).sum().backward()
    assert all(t.grad is not None and torch.equal(t.grad, torch.zeros_like(t)) for t in given)


def test_frozen_and_open_agree() -> None:
    for case in CASES:
        spec = spec_of(case)
        code, radius, angle = point(spec)
        seeds = formats.disk(spec.format).join(code, radius, angle, spec)
        x, scale = random_x(3, 33), torch.tensor(0.7)
        frozen = kernels.seed_matmul(x, spec, seeds, scale, None)
        assert torch.allclose(
            frozen, kernels.seed_matmul(x, spec, code, scale, None, radius=radius, angle=angle), atol=1e-5
        )
        by_scale = torch.func.grad(
            lambda s, s_spec=spec, s_seeds=seeds: kernels.decode(s_spec, s_seeds, s, None).sum()
        )(scale)
        assert torch.allclose(by_scale, kernels.decode(spec, seeds, torch.tensor(1.0), None).sum(), rtol=1e-4)


def test_prepared_follows_training() -> None:
    spec = spec_of(CASES[0])
    code, radius, angle = point(spec)
    scale, x = torch.tensor(0.7), random_x(2, 33)
    radius.requires_grad_()
    ready = kernels.prepare(spec, code, scale, None, radius, angle)
    assert ready.matmul(x).grad_fn is not None
    with torch.no_grad():
        before = ready.matmul(x)
        radius.mul_(0.5)
        assert not torch.equal(ready.matmul(x), before)
    assert ready.fits(code, scale, None, radius, angle)
    assert not ready.fits(code, scale, None, radius.clone(), angle)


def test_second_derivatives_by_seeds_are_refused() -> None:
    spec = spec_of(CASES[0])
    code, radius, angle = point(spec)

    def loss(r: Tensor) -> Tensor:
        return kernels.seed_matmul(random_x(2, 33), spec, code, torch.tensor(0.7), None, radius=r, angle=angle).sum()

    with pytest.raises(RbeError, match="second derivatives"):
        torch.func.grad(lambda r: torch.func.grad(loss)(r).sum())(radius)
    # Those by x alone are offered.
    x = random_x(2, 33, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: kernels.seed_matmul(x, spec, code, torch.tensor(0.7), None, radius=radius, angle=angle), (x,)
    )


def test_errors_of_open_matrices() -> None:
    spec = spec_of(CASES[0])
    code, radius, angle = point(spec)
    one = torch.tensor(1.0)
    with pytest.raises(RbeError, match=r"angle is absent; it must be float32 \(6, 1\)"):
        kernels.decode(spec, code, one, None, radius)
    with pytest.raises(RbeError, match=r"radius is torch\.float16"):
        kernels.decode(spec, code, one, None, radius.half(), angle)
    with pytest.raises(RbeError, match="the code words are"):
        kernels.decode(spec, code[:5], one, None, radius, angle)
    trellis = SeedSpec("trellis", SHAPE, bits=2)
    with pytest.raises(RbeError, match="no radius and angle"):
        kernels.decode(trellis, torch.zeros(6, 8, dtype=torch.int64), one, None, radius, angle)
    assert isinstance(kernels.prepare(spec, code, one, None, radius, angle).tensors, Tensors)


@pytest.mark.parametrize("format", formats.DISK_FORMATS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_in_a_sequential_is_exported(format: str, frozen: bool) -> None:
    layer = Linear(16, 16, format=format)
    model, x = torch.nn.Sequential(layer.freeze() if frozen else layer), torch.randn(3, 16)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), layer(x))
