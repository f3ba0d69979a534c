"""The operations as torch sees them, and the errors of the functions around them."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rbe import kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.kernels import cpu, ops, reference

SPEC = SeedSpec("trellis", (20, 33), bits=2, rotation=(3, 5))
EMBEDDING = SeedSpec("trellis", (20, 33), bits=2, rotation=(0, 5))
SEEDS = torch.randint(-(2**63), 2**63 - 1, (6, 8), generator=torch.Generator().manual_seed(0))
SCALE = torch.tensor(0.01)
ROW_SCALE = torch.linspace(0.5, 1.5, 20).half()


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear(x: Tensor, activations: str = "float32") -> Tensor:
    return kernels.seed_matmul(x, SPEC, SEEDS, SCALE, None, activations)


def dense(dtype: torch.dtype = torch.float64) -> Tensor:
    return reference.decode(SPEC, SEEDS, SCALE, None, dtype)


def test_opcheck() -> None:
    tensors = (SEEDS, SCALE, None, None, None, None, None)
    spec, embedding = ops.text(SPEC), ops.text(EMBEDDING)
    x, y = random_x(2, 3, 33).requires_grad_(), random_x(2, 20).requires_grad_()
    torch.library.opcheck(ops.seed_matmul, (x, *tensors, spec, "float32"))
    torch.library.opcheck(ops.seed_matmul, (random_x(33), *tensors, spec, "int8"))
    torch.library.opcheck(ops.seed_matmul_transposed, (y, *tensors, spec))
    torch.library.opcheck(ops.decode, (*tensors, spec))
    torch.library.opcheck(ops.rows, (torch.tensor([[1, 19]]), SEEDS, SCALE, ROW_SCALE, *tensors[3:], embedding))


def test_gradients_are_those_of_the_dense_product() -> None:
    x = random_x(4, 33, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear, (x,), nondet_tol=0)
    assert torch.autograd.gradgradcheck(linear, (x,))
    single = random_x(4, 33).requires_grad_()
    weights = random_x(4, 20)
    (linear(single) * weights).sum().backward()
    assert single.grad is not None
    assert torch.allclose(single.grad.double(), weights.double() @ dense(), rtol=1e-5, atol=1e-5)


def test_eager_and_operation_agree_bit_for_bit() -> None:
    x = random_x(3, 33)
    for activations in kernels.ACTIVATIONS:
        recorded = linear(x.clone().requires_grad_(), activations)
        assert recorded.grad_fn is not None
        assert torch.equal(linear(x, activations), recorded)


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
def test_compiled_equals_eager_bit_for_bit() -> None:
    index = torch.tensor([3, 0, 19])

    def model(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix = kernels.decode(SPEC, SEEDS, SCALE, None)
        return linear(x), matrix, kernels.rows(index, EMBEDDING, SEEDS, SCALE, ROW_SCALE)

    with torch.no_grad():
        for eager, compiled in zip(
            model(random_x(2, 33), index), torch.compile(model, fullgraph=True)(random_x(2, 33), index), strict=True
        ):
            assert torch.equal(eager, compiled)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_equals_eager_bit_for_bit() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x, "int8")

    x = random_x(2, 33)
    exported = torch.export.export(Model(), (x,))
    assert any("rbe.seed_matmul" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), linear(x, "int8"))


def test_flops_are_those_of_the_dense_product() -> None:
    with FlopCounterMode(display=False) as counter:
        linear(random_x(2, 5, 33))
    assert counter.get_total_flops() == 2 * 10 * 20 * 33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype: torch.dtype) -> None:
    x = random_x(3, 33, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), x.double() @ dense().T, rtol=0, atol=30 * max(torch.finfo(dtype).eps, 2**-23))


def test_shapes_that_are_odd() -> None:
    x = random_x(4, 3, 33)
    assert torch.equal(linear(x).reshape(12, 20), linear(x.reshape(12, 33)))
    strided = random_x(33, 4).T
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    assert linear(random_x(0, 33)).shape == (0, 20)


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where the product is fused; where many rows go to the platform's GEMM, to float32 rounding."""
    x = random_x(12, 33)
    exact = x.double() @ dense().T
    naive = (reference.seed_matmul(x, SPEC, SEEDS, SCALE, None) - exact).abs().max()
    monkeypatch.setitem(cpu.FUSED_ROWS, cpu.tier(), 12)
    alone = {activations: torch.stack([linear(row, activations) for row in x]) for activations in kernels.ACTIVATIONS}
    for activations in kernels.ACTIVATIONS:
        assert torch.equal(linear(x, activations), alone[activations])
        assert torch.equal(linear(x[:7], activations), alone[activations][:7])
    monkeypatch.setitem(cpu.FUSED_ROWS, cpu.tier(), 11)
    assert torch.equal(linear(x[:11]), alone["float32"][:11])
    assert torch.equal(linear(x, "int8"), alone["int8"])
    assert (linear(x) - alone["float32"]).abs().max() <= 2 * naive
    # A weight that is off by one step of the code would show.
    assert 2 * naive < 1e-2 * SCALE * x.abs().amax(1).min()


def test_meta_tensors_have_shapes() -> None:
    seeds, scale = SEEDS.to("meta"), SCALE.to("meta")
    assert kernels.seed_matmul(random_x(2, 33).to("meta"), SPEC, seeds, scale, None).shape == (2, 20)
    assert kernels.decode(SPEC, seeds, scale, None).shape == (20, 33)


def test_prepared_sees_changes_in_place_and_knows_replaced_tensors() -> None:
    seeds, scale, x = SEEDS.clone(), SCALE.clone(), random_x(33)
    ready = kernels.prepare(SPEC, seeds, scale, None)
    before = ready.matmul(x)
    scale.mul_(2)
    assert torch.equal(ready.matmul(x), 2 * before)
    seeds.zero_()
    assert torch.equal(ready.matmul(x), kernels.seed_matmul(x, SPEC, torch.zeros_like(SEEDS), scale, None))
    assert ready.fits(seeds, scale, None)
    assert not ready.fits(seeds.clone(), scale, None)
    seeds.set_(SEEDS.clone())
    assert not ready.fits(seeds, scale, None)


def test_seeds_that_are_not_contiguous_are_read_right() -> None:
    strided = SEEDS.T.contiguous().T
    assert torch.equal(kernels.seed_matmul(random_x(33), SPEC, strided, SCALE, None), linear(random_x(33)))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(RbeError, match=r"x is \(2, 32\), but the matrix is \(20, 33\)"):
        linear(random_x(2, 32))
    with pytest.raises(RbeError, match=r"x is torch\.int64; convert it"):
        linear(torch.ones(2, 33, dtype=torch.int64))
    with pytest.raises(RbeError, match="activations 'int4' are not offered"):
        linear(random_x(33), "int4")
    with pytest.raises(RbeError, match=r"rows 0 to 19"):
        kernels.rows(torch.tensor([20]), EMBEDDING, SEEDS, SCALE, None)
    with pytest.raises(RbeError, match="from -1 to 0"):
        kernels.rows(torch.tensor([-1, 0]), EMBEDDING, SEEDS, SCALE, None)
    with pytest.raises(RbeError, match=r"index is torch\.float32"):
        kernels.rows(torch.tensor([1.0]), EMBEDDING, SEEDS, SCALE, None)
    with pytest.raises(RbeError, match="no row stands alone"):
        kernels.rows(torch.tensor([1]), SPEC, SEEDS, SCALE, None)
    with pytest.raises(RbeError, match="seeds are"):
        kernels.decode(SPEC, SEEDS[:5], SCALE, None)
    with pytest.raises(RbeError, match="scale is"):
        kernels.decode(SPEC, SEEDS, SCALE.half(), None)
    with pytest.raises(RbeError, match="row_scale is"):
        kernels.decode(EMBEDDING, SEEDS, SCALE, ROW_SCALE[:3])


def test_every_rate_has_words() -> None:
    for w in range(1, 9):
        spec = SeedSpec("trellis", (20, 33), bits=w / 2)
        seeds = torch.zeros(6, trellis.words(spec), dtype=torch.int64)
        assert kernels.decode(spec, seeds, SCALE, None).unique().numel() == 1
