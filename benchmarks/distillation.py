"""distillation: the loss of a taught network, and its derivative, in pieces and all at once.

    python -m benchmarks.distillation

Scores are those of a step of `examples/gpt-200-stream.toml`. Checks against float64 first; the sides take turns within
one run, medians of several, one thread.
"""

import torch
from torch import Tensor

from benchmarks.kernels import medians, table_head, table_row
from rbe.train import distillation
from rbe.train.config import Recipe

SHAPE = 16 * 255, 8192
RECIPES = {
    "softness 1": Recipe(softness=1.0, weight=0.7),
    "softness 4": Recipe(softness=4.0, weight=0.9),
    "softness 1, smoothing": Recipe(softness=1.0, weight=0.7, smoothing=0.1),
}
# From how many scores on there are pieces: always, never.
SIDES = {"pieces": 1, "whole": 1 << 60}


def slope(side: str, scores: Tensor, targets: Tensor, hints: Tensor, recipe: Recipe) -> Tensor:
    distillation.MANY = SIDES[side]
    return torch.autograd.grad(distillation.loss_of(scores, targets, hints, recipe), scores)[0]


def check(recipe: Recipe) -> None:
    """Pieces have at most twice the error of the whole, in float32."""
    scores, hints = torch.randn(300, 8192, requires_grad=True), torch.randn(300, 8192)
    targets = torch.randint(8192, (300,))
    soft, t = recipe.softness, recipe.weight
    p, p_soft, wanted = (torch.softmax(x.detach().double(), 1) for x in (scores, scores / soft, hints / soft))
    right = torch.nn.functional.one_hot(targets, 8192) * (1 - recipe.smoothing) + recipe.smoothing / 8192
    exact = ((1 - t) * (p - right) + t * soft * (p_soft - wanted)) / 300
    ours, whole = ((slope(side, scores, targets, hints, recipe) - exact).norm() for side in SIDES)
    assert ours <= 2 * whole + 1e-7 * exact.norm(), (ours, whole)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for recipe in RECIPES.values():
        check(recipe)
    print(f"Checked against float64. {SHAPE[0]} rows of {SHAPE[1]} classes in bfloat16, one thread.")
    block = torch.ones(256 << 20 >> 2)
    rate = block.numel() * 4 / medians({"sum": lambda _: block.sum()}, 6)["sum"]
    scores, hints = (torch.randn(SHAPE).mul_(3).bfloat16() for _ in range(2))
    scores.requires_grad_()
    targets = torch.randint(SHAPE[1], SHAPE[:1])
    # Scores and hints are read, the derivative written, and once more with the factor of what is above.
    least = 5 * 2 * scores.numel() / rate
    table_head("loss and derivative", "whole, ms", "in pieces, ms", "times faster", "share of the memory's limit, %")
    for name, recipe in RECIPES.items():
        sides = {side: lambda _, s=side, r=recipe: slope(s, scores, targets, hints, r) for side in SIDES}
        times = medians(sides, 6)
        whole, ours = times["whole"], times["pieces"]
        cells = f"{1e3 * whole:.0f}", f"{1e3 * ours:.0f}", f"{whole / ours:.1f}", f"{100 * least / ours:.0f}"
        table_row(name, *cells)


if __name__ == "__main__":
    main()
