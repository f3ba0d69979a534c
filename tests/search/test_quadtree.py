"""The quad-tree splits where the threshold asks for it, and nowhere else."""

import math
from dataclasses import replace

import pytest
import torch

from rbe.errors import RbeError
from rbe.search.quadtree import QuadTree


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(tree: QuadTree) -> list[int]:
    return [len(level.seeds) for level in tree.levels]


def rough(*shape: int) -> torch.Tensor:
    """Constant, but for one noisy corner."""
    W = torch.full(shape, 0.5)
    W[:9, :9] += gaussian(*W[:9, :9].shape)
    return W


@pytest.mark.parametrize("format", ["packed128", "packed64"])
@pytest.mark.parametrize("shape", [(64, 64), (70, 50), (1, 5), (33, 130)])
def test_products_bytes_and_tensors(shape: tuple[int, int], format: str) -> None:
    W = rough(*shape)
    tree = QuadTree.fit(W, epsilon=0.06, largest=32, format=format, effort="fast")
    made = tree.decode()
    assert made.shape == W.shape and bool(made.isfinite().all())
    x = gaussian(2, 3, shape[1])
    assert torch.allclose(tree.matmul(x), x @ made.T, atol=1e-4)
    flags = sum(level.split.numel() for level in tree.levels)
    words = 16 if format == "packed128" else 8
    assert tree.nbytes == words * sum(leaves(tree)) + -(-flags // 8) + 4 * len(tree.levels)
    again = QuadTree.from_tensors(tree.to_tensors(), tree.spec)
    assert torch.equal(again.decode(), made) and again.nbytes == tree.nbytes


def test_only_the_rough_corner_is_split() -> None:
    tree = QuadTree.fit(rough(128, 128), epsilon=0.1, largest=64, smallest=8, effort="fast")
    assert leaves(tree) == [3, 3, 3, 4]


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_blocks_that_stay_whole_are_within_their_threshold(alpha: float) -> None:
    W = gaussian(64, 64).cumsum(0).cumsum(1) / 30
    tree = QuadTree.fit(W, epsilon=0.3, alpha=alpha, largest=32, smallest=4, effort="fast")
    limit = 0.3 * (1 + alpha * W.abs() / W.abs().max())
    wrong = (tree.decode() - W).abs() > limit * (1 + 1e-5)
    small = torch.zeros(64, 64, dtype=torch.bool)
    for spec, place, level in tree._leaves():
        if level.edge == 4:
            for p in place.tolist():
                i, j = 4 * (p // spec.grid[1]), 4 * (p % spec.grid[1])
                small[i : i + 4, j : j + 4] = True
    assert not (wrong & ~small).any() and 0 < small.sum() < 64 * 64


@pytest.mark.parametrize("format", ["packed128", "packed64"])
def test_it_says_which_smallest_blocks_stay_over_their_threshold(format: str) -> None:
    W = rough(70, 50)
    tree = QuadTree.fit(W, epsilon=0.1, alpha=0.5, largest=32, smallest=4, format=format, effort="fast")
    limit = 0.1 * (1 + 0.5 * W.abs() / W.abs().max())
    wrong = torch.nn.functional.pad((tree.decode() - W).abs() > limit, (0, 2, 0, 2))
    wanted = 4 * wrong.reshape(18, 4, 13, 4).permute(0, 2, 1, 3).flatten(2).any(2).nonzero()
    assert len(wanted) and torch.equal(tree.over(W, epsilon=0.1, alpha=0.5), wanted)
    again = QuadTree.from_tensors(tree.to_tensors(), tree.spec)
    assert torch.equal(again.over(W, epsilon=0.1, alpha=0.5), wanted)
    assert tree.over(W, epsilon=10.0).shape == (0, 2)
    with pytest.raises(RbeError, match="epsilon"):
        tree.over(W, epsilon=math.nan)
    with pytest.raises(RbeError, match=r"\(70, 50\)"):
        tree.over(W[:69], epsilon=0.1)


def test_larger_thresholds_split_less() -> None:
    W = gaussian(64, 64).cumsum(1)
    sizes = [QuadTree.fit(W, epsilon=e, effort="fast").nbytes for e in (0.0, 8.0, 1e9)]
    assert sizes[0] > sizes[1] > sizes[2]
    generous = QuadTree.fit(W, epsilon=8.0, alpha=1.0, effort="fast").nbytes
    assert generous < QuadTree.fit(W, epsilon=8.0, effort="fast").nbytes


def test_a_zero_matrix_is_one_seed_a_block() -> None:
    tree = QuadTree.fit(torch.zeros(70, 20), epsilon=0.0)
    assert leaves(tree) == [2, 0, 0, 0, 0] and not tree.decode().any()


def test_bad_trees_are_refused() -> None:
    W = gaussian(16, 16)
    for options, message in [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": 1.0, "largest": 24, "smallest": 4}, "halve"),
        ({"epsilon": 1.0, "largest": 4, "smallest": 8}, "halve"),
        ({"epsilon": 1.0, "effort": "none"}, "effort"),
        ({"epsilon": 1.0, "format": "trellis"}, "trellis|block"),
    ]:
        with pytest.raises(RbeError, match=message):
            QuadTree.fit(W, **options)
    with pytest.raises(RbeError, match="entry"):
        QuadTree.fit(W * math.inf, epsilon=1.0)
    tree = QuadTree.fit(rough(40, 40), epsilon=0.1, effort="fast")
    with pytest.raises(RbeError, match="x is"):
        tree.matmul(torch.ones(2, 39))
    tensors = tree.to_tensors()
    for damage in (
        {"seeds": tensors["seeds"][1:]},
        {"seeds": torch.cat([tensors["seeds"], tensors["seeds"][:1]])},
        {"split": tensors["split"][:0]},
        {"scales": tensors["scales"] * math.nan},
    ):
        with pytest.raises(RbeError, match="quad-tree"):
            QuadTree.from_tensors({**tensors, **damage}, tree.spec)
    with pytest.raises(RbeError, match="missing"):
        QuadTree.from_tensors({"seeds": tensors["seeds"]}, tree.spec)
    with pytest.raises(RbeError, match="quad-tree"):
        replace(tree, levels=tree.levels[1:])


def test_cells_beyond_the_matrix_do_not_split_a_block() -> None:
    assert leaves(QuadTree.fit(torch.full((40, 50), 0.5), epsilon=0.01, largest=32, effort="fast")) == [4, 0, 0, 0]
