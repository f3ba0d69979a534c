"""Networks for images, as torch has their layers."""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.train.config import Config


def mlp(config: Config) -> nn.Module:
    """Linear layers with ReLU between them."""
    widths = config.model.widths
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for k, (inputs, outputs) in enumerate(pairwise(widths), 1):
        layers[f"linear{k}"] = nn.Linear(inputs, outputs, bool(config.seeds.bias))
        if k < len(widths) - 1:
            if config.model.norm == "batch":
                layers[f"norm{k}"] = nn.BatchNorm1d(outputs)
            layers[f"relu{k}"] = nn.ReLU()
    return nn.Sequential(layers)


def lenet5(config: Config) -> nn.Module:
    """Two 5x5 convolutions, each halved, and two linear layers; images are 28x28."""
    first, second, units, classes = config.model.widths
    batch, bias = config.model.norm == "batch", bool(config.seeds.bias)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k, (inputs, outputs) in enumerate(((1, first), (first, second)), 1):
        layers[f"conv{k}"] = nn.Conv2d(inputs, outputs, 5, bias=bias)
        if batch:
            layers[f"norm{k}"] = nn.BatchNorm2d(outputs)
        # The other way round the same comes out, with four times the work.
        layers[f"pool{k}"], layers[f"relu{k}"] = nn.MaxPool2d(2), nn.ReLU()
    # 28x28 images: 5x5 without padding and halving, twice, leave 4x4.
    layers["flatten"], layers["linear1"] = nn.Flatten(), nn.Linear(16 * second, units, bias)
    if batch:
        layers["norm3"] = nn.BatchNorm1d(units)
    layers["relu3"], layers["linear2"] = nn.ReLU(), nn.Linear(units, classes, bias)
    return nn.Sequential(layers)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is halved and filled up with zeros where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """x (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """Three stages of three residual blocks for 32x32 images; published with 16 channels in the first stage.

    Source: K. He et al., arXiv 1512.03385, section 4.2, with shortcuts without weights.
    """

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        blocks = []
        first = channels
        for stage in range(3):
            outputs = first << stage
            for k in range(3):
                blocks.append(Residual(channels, outputs, 2 if stage and not k else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, classes)
        # Products of channels that lie side by side are a fifth faster.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) to (n, classes)."""
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.blocks(functional.relu(self.norm(self.conv(x))))
        out: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(y, 1), 1))
        return out
