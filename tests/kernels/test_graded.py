"""Graded matrices: what all operations answer is what the grades, each a matrix of its own, answer."""

import pickle

import pytest
import torch
from torch import Tensor

from rbe import kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, seeds_shape, trellis
from rbe.kernels import reference

GRADES = ((32, 3.0), (64, 0.5), (75, 1.5))
SPEC = make_spec("trellis", (75, 50), bits=GRADES, rotation=(0, 7))
SCALE = torch.tensor(0.01)


def _tensors(spec: SeedSpec = SPEC) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**63), 2**63 - 1, seeds_shape(spec), generator=g)
    return seeds, SCALE, (torch.rand(spec.shape[0], generator=g) + 0.5).half()


def _dense(spec: SeedSpec = SPEC) -> Tensor:
    """Every grade decoded as a matrix of its own."""
    seeds, scale, factors = _tensors(spec)
    parts = []
    for rows, some, part in trellis.grades(seeds, spec):
        parts.append(reference.decode(part, some.clone(), scale, factors[rows]))
    return torch.cat(parts)


def test_decode_is_the_definition() -> None:
    assert torch.equal(reference.decode(SPEC, *_tensors()), _dense())
    assert torch.allclose(kernels.decode(SPEC, *_tensors()), _dense(), atol=1e-5)
    seeds = _tensors()[0]
    blocks = trellis.generate(seeds, SPEC)
    assert blocks.shape == (SPEC.blocks, 16, 16)
    first = trellis.generate(seeds[: 2 * 4 * 6].reshape(8, 12), make_spec("trellis", (32, 50), bits=3))
    assert torch.equal(blocks[:8], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 40])
def test_products_and_their_gradients(dtype: torch.dtype, batch: int) -> None:
    x = torch.randn(batch, 50, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = kernels.seed_matmul(x, SPEC, *_tensors())
    expected = x.detach().double() @ _dense().double().T
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < (0.2 if dtype == torch.bfloat16 else 1e-4)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert (x.grad.double() - _dense().double().sum(0)).abs().max() < (0.3 if dtype == torch.bfloat16 else 1e-3)


def test_int8_rounds_the_activations_once() -> None:
    x = torch.randn(3, 50)
    y = kernels.seed_matmul(x, SPEC, *_tensors(), "int8")
    exact = x @ _dense().T
    assert 0 < (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("index", [[[0, 74, 33], [63, 64, 31]], [70, 71], [], [5], [31, 32]])
def test_rows(index: list) -> None:
    index = torch.tensor(index, dtype=torch.int64)
    expected = _dense()[index]
    for given in (index, index.int()):
        found = kernels.rows(given, SPEC, *_tensors())
        assert found.shape == (*index.shape, 50) and torch.allclose(found, expected, atol=1e-5)


def test_compiled() -> None:
    x, index = torch.randn(2, 50), torch.tensor([[74, 0], [40, 63]])
    tensors = _tensors()
    rows = torch.compile(lambda i: kernels.rows(i, SPEC, *tensors), fullgraph=True, backend="aot_eager")
    product = torch.compile(lambda v: kernels.seed_matmul(v, SPEC, *tensors), fullgraph=True, backend="aot_eager")
    assert torch.allclose(rows(index), _dense()[index], atol=1e-5)
    assert torch.allclose(product(x), x @ _dense().T, atol=1e-4)
    for wrong in (75, -1):
        with pytest.raises(Exception, match="indices run"):
            rows(torch.tensor([[wrong, 0], [0, 0]]))


def test_wrong_indices_and_seeds_are_refused() -> None:
    for wrong in ([75], [-1], [0, 99]):
        with pytest.raises(RbeError, match="rows 0 to 74"):
            kernels.rows(torch.tensor(wrong), SPEC, *_tensors())
    with pytest.raises(RbeError, match="convert it"):
        kernels.rows(torch.tensor([1.0]), SPEC, *_tensors())
    seeds, scale, factors = _tensors()
    with pytest.raises(RbeError, match="seeds are"):
        kernels.decode(SPEC, seeds[:-1], scale, factors)
    with pytest.raises(RbeError, match="seeds are"):
        trellis.generate(seeds.reshape(-1, 4), SPEC)


def test_prepared_once() -> None:
    tensors = _tensors()
    ready = kernels.prepare(SPEC, *tensors)
    assert ready.fits(*tensors) and not ready.fits(tensors[0].clone(), *tensors[1:])
    assert torch.equal(pickle.loads(pickle.dumps(ready)).decode(), ready.decode())
    tensors[0].zero_()  # changes in place are seen
    assert torch.equal(ready.decode(), kernels.decode(SPEC, *tensors))
