"""The next character of a text: bits per character."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.train.config import Config
from rbe.train.reading import find
from rbe.train.task import Batch, Split, Task, check_symbols, checksum, device_of

# Train, validation and test, by position in the text.
SHARES = (0.90, 0.95)
# Text that is measured runs in so many streams side by side.
STREAMS = 16


class Characters(Task):
    """Windows of a text file, at offsets that change from epoch to epoch."""

    metric, rises = "bits_per_character", False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = find(config, config.data.path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise RbeError(f"train: {path} cannot be read as text ({cause})") from cause
        symbols = sorted(set(text))
        check_symbols(config, len(symbols))
        place = {symbol: k for k, symbol in enumerate(symbols)}
        codes = torch.tensor([place[c] for c in text])
        self.symbols = "".join(symbols)
        first, second = (int(share * len(codes)) for share in SHARES)
        self.train, self.held, self.test = codes[:first], codes[first:second], codes[second:]
        if min(len(self.held), len(self.test)) < 2 * STREAMS or self.examples < 1:
            raise RbeError(f"train: {path} has only {len(text)} characters; give more, or a shorter [data] length")

    @property
    def examples(self) -> int:
        """Windows to train on."""
        return (len(self.train) - 1) // self.config.data.length - 1

    @property
    def check(self) -> int:
        """Of the text."""
        return checksum(self.train)

    @property
    def inputs(self) -> dict[str, Any]:
        """The network takes places of characters among the symbols."""
        return {"symbols": self.symbols}

    @property
    def alphabet(self) -> str:
        """The same."""
        return self.symbols

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Windows in a random order; their first characters have no state to go on from."""
        length = self.config.data.length
        start = int(torch.randint(0, length, (), generator=generator))
        windows = start + length * torch.arange(self.examples)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(windows[order], self.config.train.batch):
            cells = chosen[:, None] + torch.arange(length)
            yield Batch((self.train[cells],), self.train[cells + 1])

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split) -> float:
        """Mean bits of a character, read in several streams that keep their state."""
        text = self.held if split == "validation" else self.test
        training = model.training
        model.eval()
        count = (len(text) - 1) // STREAMS
        text = text.to(device_of(model))
        x, y = (part[: count * STREAMS].view(STREAMS, count) for part in (text[:-1], text[1:]))
        state: tuple[Tensor, Tensor] | None = None
        total = 0.0
        for inputs, targets in zip(torch.split(x, 256, 1), torch.split(y, 256, 1), strict=True):
            out, state = model.read(inputs, state)  # type: ignore[operator]
            total += float(functional.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="sum"))
        model.train(training)
        return total / x.numel() / math.log(2)
