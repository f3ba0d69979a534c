"""Encoding into outer128: planted seeds are found, nothing is ever worse than zero, any thread count gives the same."""

import pytest
import torch

from rbe import encode
from rbe.formats import make_spec, outer128
from rbe.matrix import SeedMatrix
from rbe.metrics import relative_squared_error
from rbe.search import disk
from rbe.search.blocks import cut
from rbe.search.outer128 import pursue

BLOCKS = [8, 16, 32, 64]


def captured(W: torch.Tensor, m: SeedMatrix) -> float:
    return 1 - relative_squared_error(m.decode(), W)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_matrix_made_of_seeds_is_found_again(block: int) -> None:
    spec = make_spec("outer128", (2 * block, 3 * block), block=block)
    g = torch.Generator().manual_seed(block)
    code = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, 1), generator=g)
    # One term much stronger than the other: then the greedy start is right, whatever the signs.
    radius, angle = torch.rand((spec.blocks, 1), generator=g) * 0.5 + 0.4, torch.full((spec.blocks, 1), 0.2)
    planted = SeedMatrix.from_seeds(outer128.join(code, radius, angle, spec), spec.shape, "outer128", block, scale=0.3)
    W = planted.decode()
    assert captured(W, encode(W, format="outer128", block=block, effort="best")) > 0.98


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 3), (1, 130)])
def test_never_worse_than_zero_whatever_the_shape(block: int, shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    m = encode(W, format="outer128", block=block, effort="fast")
    assert torch.isfinite(m.decode()).all()
    assert captured(W, m) > 0


@pytest.mark.parametrize(("block", "least"), [(8, 0.36), (16, 0.21), (32, 0.055), (64, 0.014)])
def test_energy_captured_of_gaussian_blocks(block: int, least: float) -> None:
    """The shares that alternating sign fits are known to reach; below the rate-distortion ceiling 1 - 2^(-2R)."""
    W = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    m = encode(W, format="outer128", block=block)
    assert least < captured(W, m) < 1 - 2 ** (-2 * m.spec.bits)


def test_more_stages_and_more_effort_capture_more() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    shares = [captured(W, encode(W, format="outer128", stages=n, effort="fast")) for n in (1, 2, 3)]
    assert shares == sorted(shares)
    assert captured(W, encode(W, format="outer128", effort="best")) > shares[0]


def test_sweeps_never_lose() -> None:
    W = torch.randn(48, 48, generator=torch.Generator().manual_seed(4))
    blocks = cut(W, make_spec("outer128", (48, 48), stages=2))
    left = []
    for effort in ("fast", "balanced"):
        found, factors = pursue(blocks, effort)
        u, v = outer128.vectors(found, blocks.spec)
        made = torch.einsum("nst,nsti,nstj->nij", factors, u, v).flatten(1)
        left.append((blocks.values.double() - made).square().sum().item())
    assert left[1] <= left[0] * (1 + 1e-12)


def test_the_same_seeds_for_any_number_of_threads() -> None:
    W = torch.randn(100, 60, generator=torch.Generator().manual_seed(5))
    one, two = (encode(W, format="outer128", effort="fast", threads=n) for n in (1, 2))
    assert torch.equal(one.seeds, two.seeds)
    assert one.scale == two.scale


def test_constant_and_zero_matrices() -> None:
    assert encode(torch.zeros(20, 20), format="outer128").decode().abs().max() == 0
    assert (encode(torch.full((20, 20), -3.0), format="outer128").decode() + 3).abs().max() < 1e-5


def test_the_error_that_is_told_is_the_error() -> None:
    W = torch.randn(40, 40, generator=torch.Generator().manual_seed(6))
    found = disk.encode_disk(W, "outer128", effort="fast")
    assert found.error == pytest.approx(relative_squared_error(found.matrix.decode(), W), rel=1e-4)
