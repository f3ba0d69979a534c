"""Sparse residuals: transforms against their textbook formulas, products without a dense matrix, honest bytes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import func

from rbe.errors import RbeError
from rbe.search import encode
from rbe.search.quadtree import QuadTree
from rbe.search.residual import Corrected, SparseResidual, _side, dct, dct_back

BASES = ["dct", "identity", "haar", "db4", "sym5"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_dct_is_the_sum_of_cosines(n: int) -> None:
    k, i = torch.arange(n).double()[:, None], torch.arange(n).double()[None, :]
    table = math.sqrt(2 / n) * torch.cos(math.pi * k * (2 * i + 1) / (2 * n))
    table[0] /= math.sqrt(2)
    x = gaussian(3, n).double()
    assert torch.allclose(dct(x), x @ table.T, atol=1e-12)
    assert torch.allclose(dct_back(x), x @ table, atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n", [1, 7, 40, 100])
def test_transforms_are_orthonormal(basis: str, n: int) -> None:
    side = _side(basis, n)
    table = side.forward(torch.eye(n, dtype=torch.float64))  # rows are T e_i: (n, padded)
    assert table.shape == (n, side.padded)
    assert torch.allclose(table @ table.T, torch.eye(n).double(), atol=1e-9)
    c = gaussian(2, side.padded).double()
    assert torch.allclose(side.back(c), c @ table.T, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_all_coefficients_give_the_matrix_back_and_products_agree(basis: str) -> None:
    W = gaussian(33, 50)
    whole = SparseResidual.fit(W, keep=10**6, basis=basis, dtype=torch.float32)
    assert torch.allclose(whole.decode(), W, atol=1e-5)
    some = SparseResidual.fit(W, keep=100, basis=basis)
    x = gaussian(2, 3, 50)
    assert torch.allclose(some.matmul(x), x @ some.decode().T, atol=1e-4)
    assert torch.allclose(some.matmul(x.double()), x.double() @ some.decode().double().T, atol=1e-4)
    assert some.matmul(x[0, 0].bfloat16()).dtype == torch.bfloat16 and some.matmul(x[0, 0]).shape == (33,)


@pytest.mark.parametrize("basis", ["dct", "identity"])
def test_the_largest_coefficients_are_kept(basis: str) -> None:
    W = gaussian(20, 30)
    side = [_side(basis, n) for n in W.shape]
    energy = side[0].forward(side[1].forward(W.double()).T.contiguous()).square().flatten().sort(descending=True).values
    kept = SparseResidual.fit(W, keep=50, basis=basis, dtype=torch.float32)
    assert (kept.decode() - W).square().sum().item() == pytest.approx(energy[50:].sum().item(), rel=1e-5)


def test_a_smooth_matrix_needs_few_coefficients() -> None:
    W = torch.outer(torch.linspace(0, 1, 64).exp(), torch.linspace(0, 2, 48).sin())
    for basis, keep in (("dct", 60), ("haar", 300)):
        r = SparseResidual.fit(W, keep, basis)
        assert r.nbytes == keep * 6
        assert (r.decode() - W).norm() < 0.05 * W.norm()


def test_seeds_and_residual_are_summed_and_survive_tensors() -> None:
    W = gaussian(40, 32)
    both = Corrected.fit(W, lambda rest: encode(rest, format="packed128", effort="fast"), keep=40, dtype=torch.float32)
    alone = both.matrix.decode()
    assert (both.decode() - W).norm() < (alone - W).norm()
    x = gaussian(5, 32)
    assert torch.allclose(both.matmul(x), x @ both.decode().T, atol=1e-4)
    assert both.nbytes == both.matrix.nbytes + 40 * 8 and both.bits_per_weight == 8 * both.nbytes / W.numel()
    again = SparseResidual.from_tensors(both.residual.to_tensors(), (40, 32), "dct")
    assert torch.equal(again.decode(), both.residual.decode())


def test_outliers_apart_do_not_decide_the_scale() -> None:
    W = gaussian(64, 64)
    W[3, 5], W[40, 41] = 300.0, -500.0

    def error(outliers: bool) -> float:
        fitted = Corrected.fit(
            W, lambda rest: encode(rest, format="packed128", effort="fast"), 2, "identity", outliers, torch.float32
        )
        return (fitted.decode() - W).square().sum().item()

    assert error(True) < 4096 and error(True) < 0.97 * error(False)


def test_bad_residuals_are_refused() -> None:
    W = gaussian(8, 8)
    for call, message in [
        (lambda: SparseResidual.fit(W, 4, "bior2.2"), "basis"),
        (lambda: SparseResidual.fit(W, 4, "cosine"), "basis"),
        (lambda: SparseResidual.fit(W, -1), "keep"),
        (lambda: SparseResidual.fit(W * math.nan, 4), "finite"),
        (lambda: SparseResidual.fit(W[0], 4), "2-D"),
        (lambda: SparseResidual.fit(W, 4).matmul(torch.ones(3, 7)), "x is"),
        (lambda: SparseResidual.from_tensors({"index": torch.zeros(1).int()}, (8, 8), "dct"), "missing"),
    ]:
        with pytest.raises(RbeError, match=message):
            call()
    good = SparseResidual.fit(W, 4)
    for damage in (
        {"index": good.index + 64},
        {"index": good.index.long()},
        {"values": good.values.double()},
        {"values": good.values * math.inf},
        {"values": good.values[:3]},
    ):
        with pytest.raises(RbeError, match="residual"):
            replace(good, **damage)
    assert SparseResidual.fit(W, 0).decode().abs().max() == 0
    assert SparseResidual.fit(1e9 * W, 4).values.dtype == torch.float32


def kinds() -> dict[str, tuple[Any, torch.Tensor]]:
    W = gaussian(40, 30)
    parts = {basis: SparseResidual.fit(W, 60, basis) for basis in BASES}
    parts["corrected"] = Corrected.fit(W, lambda rest: encode(rest, format="packed128", effort="fast"), keep=60)
    parts["tree"] = QuadTree.fit(W, 0.5, largest=16, smallest=4, effort="fast")
    return parts


# torch's own first use of forward derivatives warns about what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [*BASES, "corrected", "tree"])
def test_products_have_the_derivatives_of_the_dense_matrix(kind: str) -> None:
    part = kinds()[kind]
    W, x, g = part.decode(), gaussian(5, 30).requires_grad_(), gaussian(5, 40)
    (given,) = torch.autograd.grad((part.matmul(x) * g).sum(), x)
    assert torch.allclose(given, g @ W, atol=1e-4)
    (second,) = torch.autograd.grad(
        torch.autograd.grad(part.matmul(x).square().sum(), x, create_graph=True)[0].sum(), x
    )
    assert torch.allclose(second, (2 * torch.ones(5, 30) @ W.T) @ W, atol=1e-3)
    v = x.detach()
    assert torch.allclose(func.jacrev(part.matmul)(v[0]), W, atol=1e-5)
    assert torch.allclose(func.jvp(part.matmul, (v,), (v,))[1], v @ W.T, atol=1e-4)
    assert torch.allclose(func.vmap(part.matmul)(v), v @ W.T, atol=1e-4)


@pytest.mark.parametrize("keep", [1.5, "3", None, True])
def test_a_number_of_coefficients_is_whole(keep: Any) -> None:
    with pytest.raises(RbeError, match="keep is"):
        SparseResidual.fit(gaussian(8, 8), keep)
