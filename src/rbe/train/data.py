"""Images with labels from an .npz file, normalised, and split into training, validation and test."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.train.config import Config

KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Images:
    """Images float32 (n, channels, h, w) and labels int64 (n,).

    Attributes:
        black: what a black pixel is after normalising, for what is moved in from outside.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    black: float


def find(config: Config) -> Path:
    """The data file: as given, below the configuration's folder, or below RBE_DATA.

    Raises:
        RbeError: it is in none of these places.
    """
    name = Path(config.data.path)
    places = [config.folder / name]
    if "RBE_DATA" in os.environ:
        places.append(Path(os.environ["RBE_DATA"]) / name)
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(map(str, places))
    raise RbeError(
        f"train: there is no data file {name} (tried {tried}); put it there, give a full path, or set RBE_DATA to the "
        "folder that holds it"
    )


def load(config: Config) -> Images:
    """Read and normalise; mean and deviation are those of the images that are trained on.

    Raises:
        RbeError: the file is damaged or holds something else, or too few images for the validation asked for.
    """
    path = find(config)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise RbeError(f"train: {path} has no {', '.join(missing)}; it must have {', '.join(KEYS)}")
            arrays = {key: file[key] for key in KEYS}
    except (OSError, ValueError) as cause:
        raise RbeError(f"train: {path} cannot be read as .npz ({cause})") from cause
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (3, 4) or len(x) != len(y) or x.dtype != np.uint8 or not len(x):
            raise RbeError(f"train: {path}: x_{part} is {x.dtype} {x.shape} with {len(y)} labels; images must be uint8")
        images = torch.from_numpy(x).float() / 255
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts[part] = images, torch.from_numpy(y.astype(np.int64)).reshape(-1)
    held = config.data.validation
    x, y = parts["train"]
    if not 0 < held < len(x):
        raise RbeError(f"train: [data] validation is {held}, but there are {len(x)} images; keep some of both")
    mean, deviation = x[:-held].mean(), x[:-held].std().clamp_min(1e-6)
    x, test = (x - mean) / deviation, (parts["test"][0] - mean) / deviation
    return Images((x[:-held], y[:-held]), (x[-held:], y[-held:]), (test, parts["test"][1]), float(-mean / deviation))


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
