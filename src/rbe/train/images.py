"""Images into classes: accuracy."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rbe.train import data
from rbe.train.config import Config
from rbe.train.task import Batch, Split, Task


class Pictures(Task):
    """Images of an .npz file, moved and mirrored as the configuration says."""

    metric, rises = "accuracy", True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.images = data.load(config)

    @property
    def examples(self) -> int:
        """Images to train on."""
        return len(self.images.train[0])

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Images in a random order, every one anew moved and mirrored."""
        settings = self.config.data
        x, y = self.images.train
        for chosen in torch.split(torch.randperm(len(x), generator=generator), self.config.train.batch):
            batch = data.shifted(x[chosen], settings.shift, self.images.black, generator)
            if settings.flip:
                batch = data.flipped(batch, generator)
            yield Batch((batch,), y[chosen])

    def measure(self, model: nn.Module, split: Split) -> float:
        """Accuracy."""
        return accuracy(model, *(self.images.validation if split == "validation" else self.images.test))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of images whose largest output is their label."""
    training = model.training
    model.eval()
    parts = zip(torch.split(x, batch), torch.split(y, batch), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    model.train(training)
    return right / len(x)
