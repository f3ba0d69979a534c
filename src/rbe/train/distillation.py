"""The loss of a network that has a teacher, beside that of the targets."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rbe.train.config import Recipe
from rbe.train.task import NOTHING

# From so many scores on a CPU makes the loss in pieces, each of so many: they stay in a cache of a core, where a dozen
# passes over all scores would each fetch them from memory.
MANY, PIECE = 1 << 22, 1 << 17


def loss_of(scores: Tensor, targets: Tensor, hints: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross entropy with the targets, and with the softened classes of a teacher if there are hints.

    >>> recipe = Recipe(softness=1.0, weight=0.5)
    >>> scores = torch.zeros(2, 4)
    >>> loss_of(scores, torch.tensor([0, 3]), torch.randn(2, 4), recipe)
    tensor(1.3863)

    Args:
        scores: (n, classes), of whatever dtype; the loss is float32.
        targets: (n,) int64; rows with `NOTHING` take no part.
        hints: the teacher's scores, (n, classes); they get no derivative.
        recipe: softness, weight, smoothing.

    Source: G. Hinton et al., arXiv 1503.02531, section 2.
    """
    if hints is not None and scores.device.type == "cpu" and scores.numel() >= MANY:
        loss: Tensor = _InPieces.apply(scores, targets, hints, recipe)  # type: ignore[no-untyped-call]
        return loss
    scores = scores.float()
    loss = functional.cross_entropy(scores, targets, ignore_index=NOTHING, label_smoothing=recipe.smoothing)
    if hints is None:
        return loss
    classes = functional.softmax(hints.float() / recipe.softness, 1)
    there = targets != NOTHING
    if not bool(there.all()):
        scores, classes = scores[there], classes[there]
    soft = functional.cross_entropy(scores / recipe.softness, classes) * recipe.softness**2
    return (1 - recipe.weight) * loss + recipe.weight * soft


class _InPieces(torch.autograd.Function):
    """The same, a few rows at a time, the derivative with it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, hints: Tensor, recipe: Recipe) -> Tensor:
        classes, heat, smoothing = scores.shape[1], recipe.softness, recipe.smoothing
        hard, soft = 1 - recipe.weight, recipe.weight
        rows = max(1, PIECE // classes)
        there = targets != NOTHING
        share, whole = there.float() / there.sum(), bool(there.all())
        targets = targets.masked_fill(~there, 0)
        slope = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        total = scores.new_zeros((), dtype=torch.float64)
        for at in range(0, len(scores), rows):
            piece = slice(at, at + rows)
            given, target = scores[piece].float(), targets[piece, None]
            wanted = functional.softmax(hints[piece].float() / heat, 1)
            logs = functional.log_softmax(given, 1)
            warm = logs if heat == 1 else functional.log_softmax(given / heat, 1)
            right = logs.gather(1, target)[:, 0]
            if smoothing:
                right = (1 - smoothing) * right + smoothing * logs.mean(1)
            losses = hard * right + soft * heat**2 * (wanted * warm).sum(1)
            # A row that takes no part may hold anything.
            total -= torch.where(there[piece], losses, 0.0).sum(dtype=torch.float64)
            if slope is None:
                continue
            part = logs.exp_()
            if heat != 1:
                part.mul_(hard).add_(warm.exp_(), alpha=soft * heat)
            part.sub_(wanted, alpha=soft * heat)
            if smoothing:
                part.sub_(hard * smoothing / classes)
            part.scatter_add_(1, target, part.new_full(target.shape, -hard * (1 - smoothing)))
            part.mul_(share[piece, None])
            if not whole:
                part[~there[piece]] = 0.0
            slope[piece] = part
        if slope is not None:
            ctx.save_for_backward(slope)
        return (total / there.sum()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * above, None, None, None
