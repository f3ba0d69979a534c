"""What the tests of training runs share: their type of writer, and configurations that train in a second."""

from collections.abc import Callable
from pathlib import Path

Write = Callable[..., Path]

QUICK = "[train]\nepochs = 4\nbatch = 50\nlr = 0.02\nflip_every = 4\n"
STREAM = "[model]\nwidths = [64, 32, 4]\nnorm = 'none'\n[seeds]\nformat = 'stream'\nbytes = 90\n"
STREAM += "[train]\nepochs = 8\nbatch = 50\nlr = 0.05\n"


class Stopped(Exception):
    """What a test interrupts a run with."""
