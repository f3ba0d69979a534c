"""rbe: neural-network weights stored as seeds and generated inside the matrix product.

    m = rbe.encode(W, bits=2)
    rbe.compress_(model, bits=2)
    rbe.save(model, "out/"); model = rbe.load("out/")

Names are loaded when first used: `import rbe` alone imports nothing but this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rbe import disk, formats, kernels, metrics, nn, optim, train
    from rbe.allocate import Plan
    from rbe.compress import compress_, decompress_
    from rbe.errors import CorruptFile, RbeError
    from rbe.formats import SeedSpec
    from rbe.matrix import SeedMatrix
    from rbe.model import load, save
    from rbe.nn import set_activations
    from rbe.search import encode

__version__ = "0.1.0"

__all__ = [
    "CorruptFile",
    "Plan",
    "RbeError",
    "SeedMatrix",
    "SeedSpec",
    "compress_",
    "decompress_",
    "disk",
    "encode",
    "formats",
    "kernels",
    "load",
    "metrics",
    "nn",
    "optim",
    "save",
    "set_activations",
    "train",
]

_MODULES = ("disk", "formats", "hf", "kernels", "metrics", "nn", "optim", "train")
_HOMES = {"Plan": "allocate", "SeedMatrix": "matrix", "SeedSpec": "formats", "encode": "search"}
_HOMES |= {"CorruptFile": "errors", "RbeError": "errors", "decompress_": "compress", "set_activations": "nn"}
_HOMES |= {"compress_": "compress", "load": "model", "save": "model"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"rbe.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'rbe' has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(f"rbe.{_HOMES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "hf"})
