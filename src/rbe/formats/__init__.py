"""Seed formats: one file a format, each the definition of what its seeds mean."""

from types import ModuleType

from rbe.errors import RbeError
from rbe.formats import trellis
from rbe.formats.spec import SeedSpec

FORMATS: dict[str, ModuleType] = {"trellis": trellis}

__all__ = ["FORMATS", "SeedSpec", "get"]


def get(name: str) -> ModuleType:
    """The module that defines a format: `check`, `words`, `generate`, `pack`, `unpack`, `VERSION`.

    >>> get("trellis").WINDOWS
    (12, 14, 16)

    Raises:
        RbeError: there is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise RbeError(f"format {name!r} is not known; this version has {', '.join(sorted(FORMATS))}") from None
