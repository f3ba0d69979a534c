"""The loss of a network with a teacher: what is made in pieces is what the definition says."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rbe.train import distillation
from rbe.train.config import Recipe
from rbe.train.distillation import loss_of
from rbe.train.task import NOTHING

ROWS, CLASSES = 70, 300
RECIPES = [
    Recipe(softness=softness, weight=weight, smoothing=smoothing)
    for softness, weight, smoothing in (
        (1.0, 0.7, 0.0),
        (1.0, 0.5, 0.2),
        (4.0, 0.9, 0.0),
        (2.5, 0.3, 0.1),
        (1.0, 1.0, 0.0),
    )
]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows a piece, and a last one of fewer."""
    monkeypatch.setattr(distillation, "MANY", 1)
    monkeypatch.setattr(distillation, "PIECE", 9 * CLASSES + 1)


def example(missing: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores, hints = (4 * torch.randn(ROWS, CLASSES, generator=generator) for _ in range(2))
    targets = torch.randint(CLASSES, (ROWS,), generator=generator)
    if missing:
        targets[5:60:3] = NOTHING
        targets[63:] = NOTHING  # all of a piece
    return scores, targets, hints


def printed(scores: Tensor, targets: Tensor, hints: Tensor, recipe: Recipe) -> Tensor:
    """As the paper has it."""
    there = targets != NOTHING
    scores, targets, hints = scores[there], targets[there], hints[there]
    wanted = (1 - recipe.smoothing) * functional.one_hot(targets, CLASSES) + recipe.smoothing / CLASSES
    hard = -(wanted * scores.log_softmax(1)).sum(1).mean()
    soft = -((hints / recipe.softness).softmax(1) * (scores / recipe.softness).log_softmax(1)).sum(1).mean()
    return (1 - recipe.weight) * hard + recipe.weight * recipe.softness**2 * soft


def with_slope(scores: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss / 3, scores)[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("many", [1, 1 << 60])
def test_loss_and_derivative_are_the_printed_ones(
    recipe: Recipe, missing: bool, many: int, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "MANY", many)
    scores, targets, hints = example(missing)
    exact = scores.double().requires_grad_()
    wanted, steep = with_slope(exact, printed(exact, targets, hints.double(), recipe))
    scores.requires_grad_()
    loss, slope = with_slope(scores, loss_of(scores, targets, hints, recipe))
    assert loss.dtype == slope.dtype == torch.float32
    torch.testing.assert_close(loss, wanted.float())
    torch.testing.assert_close(slope, steep.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_pieces_of_bfloat16_are_rounded_twice(recipe: Recipe, pieces: None) -> None:
    scores, targets, hints = (t.bfloat16() if t.is_floating_point() else t for t in example(True))
    exact = scores.double().requires_grad_()
    wanted, steep = with_slope(exact, printed(exact, targets, hints.double(), recipe))
    scores.requires_grad_()
    loss, slope = with_slope(scores, loss_of(scores, targets, hints, recipe))
    torch.testing.assert_close(loss, wanted.float())
    # By the pieces, and by the factor of what is above.
    torch.testing.assert_close(slope.double(), steep, rtol=2**-7, atol=1e-7)


def test_a_row_without_target_may_hold_anything(pieces: None) -> None:
    scores, targets, hints = example(True)
    recipe = RECIPES[0]
    clean = scores.clone().requires_grad_()
    wanted = with_slope(clean, loss_of(clean, targets, hints, recipe))
    scores[targets == NOTHING], hints[targets == NOTHING] = torch.nan, torch.inf
    scores.requires_grad_()
    found = with_slope(scores, loss_of(scores, targets, hints, recipe))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert not found[1][targets == NOTHING].any()


def test_what_is_wrong_is_as_wrong_in_pieces(pieces: None) -> None:
    scores, targets, hints = example(False)
    assert loss_of(scores, torch.full_like(targets, NOTHING), hints, RECIPES[0]).isnan()
    targets[2] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        loss_of(scores, targets, hints, RECIPES[0])


def test_factors_of_any_size_reach_small_dtypes(pieces: None) -> None:
    scores, targets, hints = example(False)
    scores = scores.half().requires_grad_()
    (65536 * loss_of(scores, targets, hints, RECIPES[2])).backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


def test_without_a_derivative_the_loss_is_the_same(pieces: None) -> None:
    scores, targets, hints = example(False)
    loss = loss_of(scores, targets, hints, RECIPES[0])
    assert not loss.requires_grad
    assert torch.equal(loss_of(scores.clone().requires_grad_(), targets, hints, RECIPES[0]).detach(), loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(scores, targets, hints, RECIPES[0]), loss)
