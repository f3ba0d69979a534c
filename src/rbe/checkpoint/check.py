"""What a compressed folder holds, and whether it is as it was written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rbe import shards
from rbe.allocate import floor, label
from rbe.checkpoint import streams
from rbe.checkpoint.folder import (
    CONFIG,
    Folder,
    as_matrix,
    check_files,
    expected,
    intact,
    open_tensors,
    specs,
    weight_name,
    weight_sides,
)
from rbe.errors import CorruptFile
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.source import open_source


@dataclass(frozen=True)
class Row:
    """One stored matrix or tensor, as `inspect` shows it.

    Attributes:
        name: of the module, or of the tensor where it was kept.
        kind: what the layer is, or "keep".
        shape: (rows, columns) of a matrix as torch has it, whatever the source's layout.
        format: "trellis 2 bit", or the dtype.
        bits: nominal rate of the seeds; None for a kept tensor, and for a stream, which has none.
        nbytes: stored bytes, scales counted, file headers not.
        error: squared error relative to the source; 0 for a kept tensor, None where it is not known.
        spec: of the seeds; None for a kept tensor and for a stream.
        biases: weights that are in the same seeds beside the matrix.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    bits: float | None
    nbytes: int
    error: float | None
    spec: SeedSpec | None = None
    biases: int = 0

    @property
    def captured(self) -> float | None:
        """Share of the source's energy (sum of squares) that the seeds hold, 1 - error; None where it is not known."""
        return None if self.error is None else 1.0 - self.error

    @property
    def weights(self) -> int:
        """Number of elements, biases counted."""
        return math.prod(self.shape) + self.biases

    @property
    def rate(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    @property
    def floor(self) -> float | None:
        """Shannon floor of the error at the nominal rate; None where there is none."""
        return None if self.spec is None else floor(self.spec)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        problems: sentences; empty where the folder is sound.
        tensors, nbytes: how much was checked.
        compared: how many tensors were compared with the source.
    """

    problems: tuple[str, ...]
    tensors: int = 0
    nbytes: int = 0
    compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def inspect(dst: Path) -> list[Row]:
    """What a compressed folder holds, matrices and kept tensors, from index and headers.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: index, configuration and shards do not agree.
    """
    folder = open_tensors(dst)
    rows = []
    seen: set[str] = set()
    for module, (spec, entry) in specs(folder.config).items():
        names = expected(module, spec, entry["row_scale"], entry.get("outliers", 0))
        seen.update(names)
        nbytes = sum(folder.tensors[name].nbytes for name in names)
        error = folder.about["errors"].get(module)
        form = label(spec, entry.get("outliers", 0) / math.prod(spec.shape))
        rows.append(Row(module, entry["kind"], spec.shape, form, spec.bits, nbytes, error, spec))
    for module, stream in streams.forms(folder.config).items():
        seen.update(streams.names(module))
        nbytes = sum(folder.tensors[name].nbytes for name in streams.names(module))
        biases = stream.shape[0] if stream.bias else 0
        rows.append(Row(module, stream.kind, stream.shape, "stream", None, nbytes, None, None, biases))
    for name, tensor in folder.tensors.items():
        if name not in seen:
            rows.append(Row(name, "keep", tensor.shape, tensor.dtype, None, tensor.nbytes, 0.0))
    return rows


def verify(
    dst: Path, src: Path | None = None, answers: Callable[[Path, dict[str, Any]], str | None] | None = None
) -> Verification:
    """Look for anything that is not as it was written.

    Args:
        dst: a compressed folder.
        src: the dense model it was made from: kept tensors must be equal, seeds as near as the index says.
        answers: runs the model and compares with the stored fingerprint, returning what is wrong or None;
            `rbe.hf.check_fingerprint` is one.

    Raises:
        RbeError: the folder is not a compressed one, of another version, or the source cannot be read.
    """
    try:
        folder = check_files(dst)
    except CorruptFile as wrong:
        return Verification((str(wrong),))
    problems = [f"{dst / t.file.name}: {t.name} was changed" for t in folder.tensors.values() if not intact(folder, t)]
    if shards.file_digest(dst / CONFIG) != folder.about["config"]:
        problems.append(f"{dst / CONFIG} was changed after it was written")
    for name, digest in folder.about["copied"].items():
        if not (dst / name).is_file():
            problems.append(f"{dst / name} is missing")
        elif shards.file_digest(dst / name) != digest:
            problems.append(f"{dst / name} was changed after it was written")
    compared = 0
    if src is not None:
        found, compared = _against(folder, src)
        problems += found
    stored = folder.about["fingerprint"]
    if answers is not None and stored is not None and not problems:
        wrong_answer = answers(dst, stored)
        problems += [wrong_answer] if wrong_answer else []
    return Verification(tuple(problems), len(folder.tensors), sum(t.nbytes for t in folder.tensors.values()), compared)


def _against(folder: Folder, src: Path) -> tuple[list[str], int]:
    """(problems, tensors compared)."""
    dense = open_source(src).tensors
    problems = []
    modules = specs(folder.config)
    taken: set[str] = set()
    for module, (spec, entry) in modules.items():
        taken.update(expected(module, spec, entry["row_scale"], entry.get("outliers", 0)))
        stored, shape = dense.get(weight_name(module, entry)), weight_sides(spec, entry)
        if stored is None or stored.shape != shape:
            problems.append(f"{module}: {src} has no {'x'.join(map(str, shape))} weight of that name")
            continue
        weight = as_matrix(stored.read(copy=False), spec, entry["transposed"])
        error = measured_error(folder.matrix(module), weight)
        known = folder.about["errors"].get(module)
        if known is not None and not math.isclose(error, known, rel_tol=1e-3, abs_tol=1e-9):
            problems.append(f"{module}: squared error against {src} is {error:.6g}, it was {known:.6g} when written")
    for module in streams.forms(folder.config):
        taken.update(streams.names(module))  # trained, they are near no other weights
    for name, tensor in folder.tensors.items():
        if name in taken:
            continue
        other = dense.get(name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            problems.append(f"{name}: {src} has no such tensor")
        elif any(a != b for a, b in zip(tensor.chunks(), other.chunks(), strict=True)):
            problems.append(f"{name} differs from {src}")
    return problems, len(modules) + len(folder.tensors) - len(taken)


def measured_error(matrix: SeedMatrix, weight: Tensor) -> float:
    """Squared error of a seed matrix relative to the dense (rows, columns) weight it stands for.

    Sums in float64 over bands of rows, so that beside the decoded matrix no copy of the whole ever exists.
    """
    decoded = replace(matrix, outliers=None).decode()
    if matrix.outliers is not None:
        matrix.outliers.add_to_(decoded)
    band = max(1, (1 << 20) // max(1, weight.shape[1]))
    difference = power = 0.0
    for start in range(0, weight.shape[0], band):
        exact = weight[start : start + band].double()
        difference += float((decoded[start : start + band].double() - exact).square().sum())
        power += float(exact.square().sum())
    if power == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / power
