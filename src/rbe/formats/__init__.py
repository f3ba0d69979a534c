"""Seed formats: one module a format, each the definition of what its seeds mean."""

from typing import Protocol

from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import trellis
from rbe.formats.spec import SeedSpec

__all__ = ["FORMATS", "SeedFormat", "SeedSpec", "get"]


class SeedFormat(Protocol):
    """What a format's module offers."""

    VERSION: int

    def check(self, spec: SeedSpec, /) -> None:
        """Refuse a specification that the format cannot generate."""

    def words(self, spec: SeedSpec, /) -> int:
        """64-bit words a block."""

    def generate(self, seeds: Tensor, spec: SeedSpec, /) -> Tensor:
        """Unscaled weights (blocks, block, block) of seeds int64 (blocks, words)."""


FORMATS: dict[str, SeedFormat] = {"trellis": trellis}


def get(name: str) -> SeedFormat:
    """The definition of a format.

    >>> get("trellis").words(SeedSpec("trellis", (16, 16), bits=2.0))
    8

    Raises:
        RbeError: there is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise RbeError(f"format {name!r} is not known; this version has {', '.join(sorted(FORMATS))}") from None
