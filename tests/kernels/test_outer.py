"""Products of outer128 with its signs as numbers equal the definition, in both of their ways, and so do gradients."""

import pytest
import torch
from torch import Tensor

from rbe.formats import SeedSpec, make_spec, outer128
from rbe.kernels import outer, reference

CASES = [((40, 33), 16, (0, 0), 1), ((40, 33), 8, (7, 9), 2), ((70, 90), 32, (0, 5), 1), ((70, 130), 64, (3, 0), 2)]


def parts(shape: tuple[int, int], block: int, rotation: tuple[int, int], stages: int) -> tuple[SeedSpec, list[Tensor]]:
    spec = make_spec("outer128", shape, block=block, rotation=rotation, stages=stages)
    g = torch.Generator().manual_seed(block)
    size = (spec.blocks, spec.stages)
    code = torch.randint(-(2**63), 2**63 - 1, size, generator=g)
    radius, angle = (torch.rand(size, generator=g, dtype=torch.float64) * top for top in (0.9, 6.0))
    signs = outer128.sign_bits(code, spec).double()
    return spec, [signs, radius, angle, torch.tensor(0.7, dtype=torch.float64)]


def dense(spec: SeedSpec, signs: Tensor, radius: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """The matrix by way of its stored seeds."""
    seeds = outer128.join(outer128.code_of(signs, spec), radius, angle, spec)
    return reference.decode(spec, seeds, scale, None, torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 700])
def test_products_equal_the_definition(case: tuple, count: int) -> None:
    spec, given = parts(*case)
    x = torch.randn(count, spec.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = outer.matmul(x, *given, None, spec)
    assert (y - x @ dense(spec, *given).T).abs().max() < 1e-5 * y.abs().max()  # radius and angle are stored as float32
    assert torch.allclose(outer.decode(*given, None, spec), dense(spec, *given), atol=1e-5)


def test_rows_and_row_scales() -> None:
    spec, given = parts((40, 33), 16, (0, 5), 2)
    row_scale = (torch.rand(40, generator=torch.Generator().manual_seed(2)) + 0.5).half()
    whole = outer.decode(*given, row_scale, spec)
    index = torch.tensor([[3, 39], [0, 3]])
    assert torch.allclose(outer.rows(index, *given, row_scale, spec), whole[index])
    x = torch.randn(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for x_many in (x, x.repeat(200, 1)):
        assert torch.allclose(outer.matmul(x_many, *given, row_scale, spec), x_many @ whole.T)


@pytest.mark.parametrize("count", [1, 300])
def test_gradients_equal_finite_differences(count: int) -> None:
    spec, given = parts((20, 17), 8, (3, 4), 1)
    x = torch.randn(count, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    probe = torch.randn(count, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(*some: Tensor) -> Tensor:
        return (outer.matmul(x, *some, None, spec) * probe).sum()

    leaves = [part.clone().requires_grad_() for part in given]
    assert torch.autograd.gradcheck(loss, leaves)
