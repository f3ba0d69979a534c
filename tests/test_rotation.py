"""Rotations: orthogonal, inverse to each other, the definition's own matrix, and the same in C++."""

import pytest
import torch

from rbe import _cpu
from rbe.kernels import cpu
from rbe.mixing import signs
from rbe.rotation import hadamard, rotate, rotate_back

SIZES = (1, 2, 3, 8, 15, 16, 17, 24, 100, 384, 1024, 1537)


def by_hand(n: int, seed: int) -> torch.Tensor:
    """R_n as a matrix in float64, from the words of the definition."""
    p = 1 << (n.bit_length() - 1)
    bits = torch.arange(p)
    parity = torch.tensor([[bin(a & b).count("1") % 2 for b in bits.tolist()] for a in bits.tolist()])
    h = (1 - 2 * parity).double() / p**0.5
    matrix = torch.diag(signs(n, seed).double())
    for start in (0,) if p == n else (0, n - p):
        step = torch.eye(n, dtype=torch.float64)
        step[start : start + p, start : start + p] = h
        matrix = step @ matrix
    return matrix


@pytest.mark.parametrize("n", [1, 2, 3, 8, 24, 100])
def test_rotation_is_the_matrix_of_the_definition(n: int) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    assert torch.allclose(rotate(eye, 7).T, by_hand(n, 7), atol=1e-12)
    assert torch.allclose(rotate_back(eye, 7).T, by_hand(n, 7).T, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_rotation_keeps_lengths_and_comes_back(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    turned = rotate(x, 11)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1))
    assert torch.allclose(rotate_back(turned, 11), x)
    assert torch.equal(rotate(x, 0), x)


def test_seeds_differ() -> None:
    x = torch.randn(64)
    assert not torch.allclose(rotate(x, 1), rotate(x, 2))


def test_one_spike_spreads_evenly() -> None:
    x = torch.zeros(256)
    x[5] = 16
    assert torch.allclose(rotate(x, 3).abs(), torch.ones(256))
    assert torch.allclose(hadamard(x).abs(), torch.ones(256))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "zen4"])
def test_cpp_rotates_as_the_definition(n: int, name: str) -> None:
    if not cpu.tier_available(name):
        pytest.skip(f"this processor has no {name}")
    cpu.set_tier(name)
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    for back, definition in ((False, rotate), (True, rotate_back)):
        y = x.clone()
        _cpu.rotate_rows(y.data_ptr(), 2, n, 0xDEADBEEF, back, 2)
        assert torch.allclose(y, definition(x, 0xDEADBEEF), atol=1e-5)
    cpu.set_tier("")
