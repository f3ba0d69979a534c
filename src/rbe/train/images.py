"""Images into classes: accuracy."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.train import data
from rbe.train.config import Config
from rbe.train.task import Batch, Split, Task, device_of


class Pictures(Task):
    """Images of an .npz file, moved and mirrored as the configuration says."""

    metric, rises = "accuracy", True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.images = data.load(config)
        _check(config, self.images)

    @property
    def examples(self) -> int:
        """Images to train on."""
        return len(self.images.train[0])

    @property
    def check(self) -> int:
        """Of images and labels."""
        return self.images.check

    @property
    def inputs(self) -> dict[str, Any]:
        """The network takes (pixels / 255 - mean) / deviation."""
        return {"mean": self.images.mean, "deviation": self.images.deviation}

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Images in a random order, every one anew moved and mirrored."""
        settings = self.config.data
        x, y = self.images.train
        for chosen in torch.split(torch.randperm(len(x), generator=generator), self.config.train.batch):
            if len(chosen) < min(2, self.config.train.batch):
                continue  # one that is left over alone has no deviation for a batch norm
            batch = data.shifted(x[chosen], settings.shift, self.images.black, generator)
            if settings.flip:
                batch = data.flipped(batch, generator)
            yield Batch((batch,), y[chosen])

    def measure(self, model: nn.Module, split: Split) -> float:
        """Accuracy."""
        return accuracy(model, *(self.images.validation if split == "validation" else self.images.test))


def _check(config: Config, images: data.Images) -> None:
    """Refuse images that are not those of the network.

    Raises:
        RbeError: they have other sides or more classes.
    """
    model, sides = config.model, tuple(images.train[0].shape[1:])
    fits = {
        "mlp": (math.prod(sides) == model.widths[0], f"{model.widths[0]} pixels, the first of [model] widths"),
        "lenet5": (sides == (1, 28, 28), "28x28 pixels of one channel"),
        "resnet20": (sides[0] == 3, "three channels"),
    }
    right, wanted = fits[model.kind]
    if not right:
        raise RbeError(f"train: {config.data.path}: images are {sides}, but {model.kind} takes {wanted}")
    classes = 10 if model.kind == "resnet20" else model.widths[-1]
    labels = torch.cat([part[1] for part in (images.train, images.validation, images.test)])
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise RbeError(
            f"train: {config.data.path}: labels go from {least} to {most}, but the network has {classes} classes, 0 to "
            f"{classes - 1}"
        )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of images whose largest output is their label."""
    training, device = model.training, device_of(model)
    model.eval()
    parts = zip(torch.split(x, batch), torch.split(y, batch), strict=True)
    right = sum(int((model(images.to(device)).argmax(1).cpu() == labels).sum()) for images, labels in parts)
    model.train(training)
    return right / len(x)
