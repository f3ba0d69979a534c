"""`Task`: what a network learns from, and the number that says how well it does."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.train.config import Config

Split = Literal["validation", "test"]
# A target that takes part in no loss.
NOTHING = -100
# Of the tokenizer, in its folder and beside a trained network.
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Batch:
    """One step's worth.

    Attributes:
        inputs: what the network is called with.
        targets: class of every output, int64, `NOTHING` where there is none; outputs have a last side of classes more.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(tuple(x.to(device) for x in self.inputs), self.targets.to(device))


class Task(ABC):
    """Data of a configuration, cut into batches, with a metric on splits that are never trained on.

    Attributes:
        metric: its name; rises: whether more is better.
    """

    metric: ClassVar[str]
    rises: ClassVar[bool]

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    @abstractmethod
    def examples(self) -> int:
        """What there is to train on: images, windows or sentences."""

    @abstractmethod
    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over the training examples in a random order; may end with a batch that is not full."""

    @abstractmethod
    def measure(self, model: nn.Module, split: Split) -> float:
        """The metric of a model in evaluation mode."""

    @property
    @abstractmethod
    def check(self) -> int:
        """A checksum of what is trained on, as it was read: arithmetic may depend on the number of threads."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What somebody must know who gives the trained network inputs of their own; JSON-ready."""
        return {}

    @property
    def alphabet(self) -> str | None:
        """What the numbers that a network takes stand for: characters in order, or the text of a tokenizer.json."""
        return None

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        recipe = self.config.train
        whole = self.examples // recipe.batch
        return max(1, min(whole, recipe.steps) if recipe.steps else whole)


class Subwords(Task):
    """A task whose texts a tokenizer cuts.

    Attributes:
        tokenizer: of the package `tokenizers`.
    """

    tokenizer: Any

    @property
    def inputs(self) -> dict[str, Any]:
        """The network takes what the tokenizer beside it returns."""
        return {"tokenizer": TOKENIZER}

    @property
    def alphabet(self) -> str:
        """Of the tokenizer."""
        text: str = self.tokenizer.to_str()
        return text


def device_of(model: nn.Module) -> torch.device:
    """The device that a network is on.

    >>> device_of(nn.Linear(2, 3)).type
    'cpu'
    """
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def checksum(*tensors: Tensor, start: int = 0) -> int:
    """CRC-32 of the bytes of tensors.

    >>> checksum(torch.tensor([1, 2])) == checksum(torch.tensor([1]), torch.tensor([2]))
    True
    """
    for t in tensors:
        flat: Any = t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        start = zlib.crc32(flat, start)
    return start


def check_symbols(config: Config, found: int) -> None:
    """Refuse a vocabulary of another size than the data's.

    Raises:
        RbeError: it is another.
    """
    if config.model.vocabulary != found:
        given = config.model.vocabulary
        raise RbeError(f"train: [model] vocabulary is {given}, but the data has {found} symbols; set it to {found}")
