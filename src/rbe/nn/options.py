"""How a layer's matrices are held: one bundle of keywords that every layer takes and hands on."""

from typing import Any, TypedDict

import torch

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.nn.seeded import SeededVector


class Options(TypedDict, total=False):
    """Keywords of every seed layer; `Linear` says what each means, and has their defaults.

    A layer of several matrices uses the same options for each. `mode="faithful"` asks for everything as the papers
    print it: packed128's generator, and the norms; the one generator of packed64 is as printed anyway.
    """

    format: str
    bits: float | None
    block: int | None
    window: int
    rotation: tuple[int, int]
    mode: str | None
    precision: int
    stages: int
    device: torch.device | str | None
    dtype: torch.dtype | None


def for_matrices(options: Options) -> Options:
    """The options as `Linear` takes them.

    Raises:
        RbeError: a keyword is not known.
    """
    check_names("seed layers", options)
    if options.get("format") == "packed64" and options.get("mode") == "faithful":
        return {**options, "mode": None}
    return options


def seeded_vector(n: int, options: Options, rms: float) -> SeededVector:
    """A vector of n entries from one seed, in the format of the layer's matrices; packed64 where none is named.

    Raises:
        RbeError: the format has no such vectors.
    """
    options = for_matrices({**options, "format": options.get("format", "packed64")})
    return SeededVector(
        n,
        format=options["format"],
        mode=options.get("mode"),
        precision=options.get("precision", 32),
        stages=options.get("stages", 1),
        rms=rms,
        device=options.get("device"),
        dtype=options.get("dtype"),
    )


def check_names(layer: str, options: Options) -> None:
    """Refuse keywords that no seed layer knows, for layers that would otherwise not look at them.

    Raises:
        RbeError: a keyword is not known.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise RbeError(f"{layer}: {', '.join(unknown)} is no option; choose from {', '.join(Options.__annotations__)}")


def check_unused(layer: str, options: Options) -> None:
    """Refuse options that no matrix could have, for layers without one.

    A block of layers hands the options of its matrices to its norms too, so what fits a matrix is let through.

    Raises:
        RbeError: a keyword is not known, or a value is not offered.
    """
    check_names(layer, options)
    known = {name: value for name, value in for_matrices(options).items() if name not in ("device", "dtype")}
    if isinstance(known.get("bits"), tuple):  # ends of grades are rows of a matrix, of which there is none here
        del known["bits"]
    if "format" in known:
        formats.make_spec(shape=(16, 16), **known)  # type: ignore[arg-type]
    else:
        bits = known.pop("bits", None)
        SeedSpec("packed64", (16, 16), **{"bits": 1.0 if bits is None else bits, **known})  # type: ignore[arg-type]


def factory(options: Options) -> dict[str, Any]:
    """Where dense tensors of a layer live."""
    return {"device": options.get("device"), "dtype": options.get("dtype")}
