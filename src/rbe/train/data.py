"""Images with labels from an .npz file, normalised, and split into training, validation and test."""

import io
import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.train.config import Config
from rbe.train.reading import find
from rbe.train.task import checksum

KEYS = ("x_train", "y_train", "x_test", "y_test")
STREAMS = ("data", "offsets", "labels")
# Of a file of JPEG streams, which has no split of its own: as in CIFAR-10, 10,000 images of 60,000.
TEST_SHARE = 6


@dataclass(frozen=True)
class Images:
    """Images float32 (n, channels, h, w) and labels int64 (n,).

    Attributes:
        mean, deviation: what pixels in [0, 1] were normalised by.
        check: a checksum of the images and labels to train on, and of those held back, as they were read.
        black: what a black pixel is after normalising, for what is moved in from outside.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    black: float
    mean: float
    deviation: float
    check: int


def load(config: Config) -> Images:
    """Read and normalise; mean and deviation are those of the images that are trained on.

    Raises:
        RbeError: the file is damaged or holds something else, or too few images for the validation asked for.
    """
    path = find(config, config.data.path)
    try:
        # numpy does not close files that it cannot read.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if set(STREAMS) <= set(file):
                arrays: dict[str, Any] = _decode(path, *(file[key] for key in STREAMS))
            else:
                missing = [key for key in KEYS if key not in file]
                if missing:
                    raise RbeError(f"train: {path} has no {', '.join(missing)}; it must have {', '.join(KEYS)}")
                arrays = {key: file[key] for key in KEYS}
    except RbeError:
        raise
    except Exception as cause:  # zip, zlib, numpy and Pillow raise many kinds for a damaged file
        if not zipfile.is_zipfile(path):
            raise RbeError(
                f"train: {path} is no .npz, or half of one; fetch it again, or give a file that is"
            ) from cause
        raise RbeError(f"train: {path} cannot be read as .npz ({cause}); fetch it again") from cause
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (3, 4) or len(x) != y.size or x.dtype != np.uint8 or not len(x):
            raise RbeError(f"train: {path}: x_{part} is {x.dtype} {x.shape} with {y.size} labels; images must be uint8")
        if y.dtype.kind not in "iu" or y.size != len(x):
            raise RbeError(f"train: {path}: y_{part} is {y.dtype} {y.shape}; it must be a whole number for every image")
        images = torch.from_numpy(x).float() / 255
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        images = _shrunk(images, config.data.shrink, path)
        parts[part] = images, torch.from_numpy(y.astype(np.int64)).reshape(-1)
    held = config.data.validation
    x, y = parts["train"]
    if x.shape[1:] != parts["test"][0].shape[1:]:
        given = tuple(x.shape[1:]), tuple(parts["test"][0].shape[1:])
        raise RbeError(f"train: {path}: images to train on are {given[0]}, those to test on {given[1]}; give one shape")
    if not 0 < held < len(x) - 1:
        raise RbeError(f"train: [data] validation is {held}, but there are {len(x)} images; keep some of both")
    mean, deviation = x[:-held].mean(), x[:-held].std().clamp_min(1e-6)
    x, test = (x - mean) / deviation, (parts["test"][0] - mean) / deviation
    check = checksum(torch.from_numpy(np.ascontiguousarray(arrays["x_train"])), y)
    numbers = float(-mean / deviation), float(mean), float(deviation), check
    return Images((x[:-held], y[:-held]), (x[-held:], y[-held:]), (test, parts["test"][1]), *numbers)


def _shrunk(images: Tensor, edge: int, path: Path) -> Tensor:
    """Images whose pixels are the means of squares of `edge` pixels.

    Raises:
        RbeError: they cannot be cut into such squares.
    """
    if edge == 1:
        return images
    height, width = images.shape[-2:]
    if height % edge or width % edge:
        raise RbeError(
            f"train: [data] shrink is {edge}, but images of {path} have {height}x{width} pixels; give a divisor of both"
        )
    return torch.nn.functional.avg_pool2d(images, edge)


def _decode(path: Path, streams: Any, offsets: Any, labels: Any) -> dict[str, Any]:
    """Arrays of a file of JPEG streams; the training images are shuffled, because such files are sorted by class."""
    try:
        from PIL import Image
    except ImportError:
        raise RbeError("train: JPEG images need Pillow; install it with: pip install 'rbe[train]'") from None
    if len(offsets) != len(labels) + 1 or (np.diff(offsets) < 0).any() or offsets[-1] != streams.size:
        raise RbeError(f"train: {path}: offsets do not cut data into as many streams as there are labels")
    cuts = itertools.pairwise(offsets)
    x = np.stack([np.asarray(Image.open(io.BytesIO(streams[a:b].tobytes())).convert("RGB")) for a, b in cuts])
    first = len(x) - len(x) // TEST_SHARE
    order = np.random.default_rng(0).permutation(first)
    return {"x_train": x[order], "y_train": labels[order], "x_test": x[first:], "y_test": labels[first:]}


def shifted(x: Tensor, most: int, black: float, generator: torch.Generator) -> Tensor:
    """A batch (n, channels, h, w), every image moved by up to `most` pixels each way."""
    if not most:
        return x
    n, _, height, width = x.shape
    wide = torch.nn.functional.pad(x, (most,) * 4, value=black)
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    every = torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None]
    return wide[every[0], every[1], rows, columns]


def flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch (n, channels, h, w), half of its images mirrored."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
