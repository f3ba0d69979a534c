"""What `bits` and `rounds` share: a run of MNIST at 64:1 around an optimizer and a schedule of their own."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from rbe.optim import HybridAdam
from rbe.train import Config
from rbe.train.data import Images
from rbe.train.run import accuracy

CONFIG = Path(__file__).parent.parent / "examples" / "mnist-64.toml"
Loss = Callable[[], Tensor]


def fit(
    config: Config,
    images: Images,
    model: nn.Module,
    optimizer: HybridAdam,
    scheduler: LRScheduler,
    before: Callable[[int], object] = lambda step: None,
    after: Callable[[int, int, Loss], object] = lambda epoch, step, loss: None,
) -> tuple[float, float]:
    """Train, and leave the model as it was best on validation.

    Args:
        before: called with the number of every step; after: with epoch, number and the loss of its batch.

    Returns:
        validation accuracy, seconds.
    """
    recipe, (x, y) = config.train, images.train
    steps, generator = len(x) // recipe.batch, torch.Generator().manual_seed(recipe.seed)
    best, kept, began = -1.0, {}, time.monotonic()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(x), generator=generator)
        model.train()
        for k in range(steps):
            before(epoch * steps + k)
            chosen = order[k * recipe.batch : (k + 1) * recipe.batch]

            def loss(chosen: Tensor = chosen) -> Tensor:
                return functional.cross_entropy(model(x[chosen]), y[chosen])

            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            scheduler.step()
            after(epoch, epoch * steps + k, loss)
        found = accuracy(model, *images.validation)
        if found > best:
            best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    seconds = time.monotonic() - began
    model.load_state_dict(kept)
    return best, seconds
