"""A compressed folder on disk: shards, index with checksums, configuration; written as a stream and read lazily.

    config.json                         quantization_config says how the seeds of every module are to be read
    model-00001-of-0000N.safetensors    <module>.seeds, .scale, .row_scale, and the tensors that were kept
    model.safetensors.index.json        which tensor is where; under metadata.rbe every checksum

The index has a checksum of itself, of every shard as a whole, of every tensor (name, dtype, shape, bytes), of every
copied file and of the configuration.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rbe import formats, metrics, shards
from rbe.errors import CorruptFile, RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.shards import Outgoing, Stored
from rbe.source import INDEX, open_source

METHOD = "rbe"
CONFIG = "config.json"
CARD = "README.md"
FORMAT_VERSION = formats.get("trellis").VERSION
# What our own commands may leave in a compressed folder later.
_LATER = ("report.html", "report.json")


@dataclass(frozen=True)
class Row:
    """One stored matrix or tensor, as `inspect` shows it.

    Attributes:
        name: of the module, or of the tensor where it was kept.
        kind: "linear", "embedding" or "keep".
        shape: (rows, columns) of a matrix as torch has it, whatever the source's layout.
        format: "trellis 2 bit", or the dtype.
        bits: nominal rate of the seeds; None for a kept tensor.
        nbytes: stored bytes, scales counted, file headers not.
        error: squared error relative to the source; 0 for a kept tensor, None where it is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    bits: float | None
    nbytes: int
    error: float | None

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rate(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    @property
    def floor(self) -> float | None:
        """Shannon floor of the error at the nominal rate; None for a kept tensor."""
        return None if self.bits is None else metrics.shannon_floor(self.bits)


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


def is_ours(path: Path) -> bool:
    """Whether a folder was written by this library, intact or not."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
        index = json.loads((path / INDEX).read_bytes())
        return config["quantization_config"]["quant_method"] == METHOD and isinstance(index["metadata"]["rbe"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def strangers(path: Path) -> list[str]:
    """Files in a compressed folder that this library did not put there.

    Raises:
        CorruptFile: the index cannot be read.
    """
    about = read_index(path)["metadata"]["rbe"]
    known = {CONFIG, INDEX, CARD, *about["files"], *about["copied"], *_LATER}
    return sorted(
        name
        for file in path.rglob("*")
        if not file.is_dir() and (name := file.relative_to(path).as_posix()) not in known
    )


@contextlib.contextmanager
def _sensible(path: Path) -> Iterator[None]:
    """A checksum can be right on content that makes no sense, when somebody else wrote it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as cause:
        raise CorruptFile(f"{path} does not have the content it should ({cause!r}); fetch the folder again") from cause


def _check_version(version: Any, path: Path) -> None:
    if type(version) is not int or version < 0:
        raise CorruptFile(f"{path}: format version {version!r} makes no sense; fetch the folder again")
    if version > FORMAT_VERSION:
        raise RbeError(
            f"{path.parent} has seeds of format version {version}; this rbe reads version {FORMAT_VERSION}: "
            "install a later rbe"
        )
    if version < FORMAT_VERSION:
        raise RbeError(
            f"{path.parent} has seeds of format version {version}, a draft whose weights this rbe (version "
            f"{FORMAT_VERSION}) cannot generate: compress the source again"
        )


def _sealed(index: dict[str, Any]) -> dict[str, Any]:
    """The index with its checksum of itself, over everything else in it."""
    metadata = {**index["metadata"], "rbe": {k: v for k, v in index["metadata"]["rbe"].items() if k != "checksum"}}
    whole = {**index, "metadata": metadata}
    metadata["rbe"]["checksum"] = shards.canonical_digest(whole)
    return whole


def read_index(dst: Path) -> dict[str, Any]:
    """The index of a compressed folder, checked against its own checksum.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: the index was changed.
    """
    path = dst / INDEX
    if not dst.is_dir():
        raise RbeError(f"{dst} does not exist; give a folder that `rbe compress` wrote")
    if not path.is_file() and not (dst / CONFIG).is_file():
        raise RbeError(f"{dst} is not a compressed model: it has no {INDEX}; give a folder that `rbe compress` wrote")
    index = shards.read_json(path)
    with _sensible(path):
        about = index.get("metadata", {}).get("rbe") if isinstance(index.get("metadata"), dict) else None
        if not isinstance(about, dict):
            raise RbeError(
                f"{dst} is not a compressed model: its index has no rbe part; give what `rbe compress` wrote"
            )
        _check_version(about.get("format_version"), path)
        if _sealed(index)["metadata"]["rbe"]["checksum"] != about.get("checksum"):
            raise CorruptFile(f"{path} was changed after it was written; fetch the folder again")
    return index


def read_config(dst: Path) -> dict[str, Any]:
    """config.json of a compressed folder; its part about the seeds must be as it was written.

    Other settings may be edited; `verify` reports that they were.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: the part about the seeds was changed.
    """
    return _read_config(dst, read_index(dst))


def _read_config(dst: Path, index: dict[str, Any]) -> dict[str, Any]:
    path = dst / CONFIG
    config = shards.read_json(path)
    with _sensible(path):
        about = config.get("quantization_config")
        if not isinstance(about, dict) or about.get("quant_method") != METHOD:
            raise CorruptFile(f"{path} has no rbe quantization_config, but the index beside it has; fetch it again")
        _check_version(about.get("format_version"), path)
        if shards.canonical_digest(about) != index["metadata"]["rbe"]["quantization"]:
            raise CorruptFile(f"{path}: quantization_config was changed after it was written; fetch it again")
    return config


def specs(config: Mapping[str, Any]) -> dict[str, tuple[SeedSpec, dict[str, Any]]]:
    """(spec, entry) of every module that has seeds.

    Raises:
        RbeError: an entry is no specification, or one of another version.
    """
    found = {}
    for module, entry in config["quantization_config"].get("modules", {}).items():
        spec = SeedSpec.from_json(entry["spec"])
        formats.get(spec.format).check(spec)
        found[module] = spec, entry
    return found


def expected(module: str, spec: SeedSpec, row_scale: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of a module.

    >>> expected("a", SeedSpec("trellis", (40, 33), bits=2.0), row_scale=False)
    {'a.seeds': ('I64', (9, 8)), 'a.scale': ('F32', ())}
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{module}.seeds": ("I64", (spec.blocks, formats.get(spec.format).words(spec))),
        f"{module}.scale": ("F32", ()),
    }
    if row_scale:
        stored[f"{module}.row_scale"] = ("F16", spec.shape[:1])
    return stored


@dataclass(frozen=True)
class Folder:
    """A compressed folder whose headers, index and configuration agree.

    Attributes:
        path: of the folder.
        index, config: contents of the two JSON files.
        tensors: by name; read them with `.read()`.
    """

    path: Path
    index: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def about(self) -> dict[str, Any]:
        """The part of the index that is ours."""
        return self.index["metadata"]["rbe"]  # type: ignore[no-any-return]

    def matrix(self, module: str) -> SeedMatrix:
        """The seed matrix of a module.

        Raises:
            CorruptFile: its tensors do not fit its specification.
        """
        spec, entry = specs(self.config)[module]
        names = expected(module, spec, entry["row_scale"])
        tensors = {name.rpartition(".")[2]: self.tensors[name].read() for name in names}
        return SeedMatrix.from_tensors(tensors, spec)


def open_tensors(dst: Path) -> Folder:
    """Open a compressed folder without reading tensors; everything that headers can tell is checked.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: index, configuration and shards do not agree.
    """
    index = read_index(dst)
    config = _read_config(dst, index)
    path = dst / INDEX
    tensors: dict[str, Stored] = {}
    with _sensible(path):
        about = index["metadata"]["rbe"]
        for name, size in ((name, entry["bytes"]) for name, entry in about["files"].items()):
            if not (dst / name).is_file():
                raise CorruptFile(f"{dst / name} is missing: a shard of the model; fetch the folder again")
            if (dst / name).stat().st_size != size:
                raise CorruptFile(
                    f"{dst / name} has {(dst / name).stat().st_size} bytes, it was written with {size}; fetch it again"
                )
            tensors.update(shards.read_header(dst / name)[0])
        for name, file in index["weight_map"].items():
            if name not in tensors or tensors[name].file.name != file:
                raise CorruptFile(f"{dst / file} does not hold {name}, which the index promises; fetch it again")
            if [tensors[name].dtype, list(tensors[name].shape)] != about["tensors"][name][:2]:
                raise CorruptFile(
                    f"{dst / file}: {name} has another dtype or shape than the index says; fetch it again"
                )
        if len(tensors) != len(index["weight_map"]) or len(tensors) != len(about["tensors"]):
            raise CorruptFile(f"{dst} has {len(tensors)} tensors in its shards, the index {len(index['weight_map'])}")
        for module, (spec, entry) in specs(config).items():
            for name, (dtype, shape) in expected(module, spec, entry["row_scale"]).items():
                if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
                    raise CorruptFile(f"{dst}: {name} should be there as {dtype} {list(shape)}; fetch the folder again")
    return Folder(dst, index, config, tensors)


def check_files(dst: Path) -> Folder:
    """`open_tensors`, with every byte of every shard compared with its checksum. A loader calls this.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: anything was changed; the message names the file and, where possible, the tensor.
    """
    folder = open_tensors(dst)
    for name, entry in folder.about["files"].items():
        if shards.file_digest(dst / name) != entry["sha256"]:
            damaged = [
                tensor for tensor in folder.tensors.values() if tensor.file.name == name and not _intact(folder, tensor)
            ]
            where = damaged[0].name if damaged else "its header"
            raise CorruptFile(f"{dst / name} was changed after it was written (in {where}); fetch it again")
    return folder


def _intact(folder: Folder, tensor: Stored) -> bool:
    found = shards.checksum(tensor.name, tensor.dtype, tensor.shape, tensor.chunks())
    return bool(found == folder.about["tensors"][tensor.name][2])


def load_matrices(dst: Path) -> tuple[dict[str, SeedMatrix], dict[str, Tensor]]:
    """(seed matrix of every module, all other tensors by name), every byte checked.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: anything was changed.
    """
    folder = check_files(dst)
    modules = specs(folder.config)
    seeds = {name for module, (spec, entry) in modules.items() for name in expected(module, spec, entry["row_scale"])}
    rest = {name: tensor.read() for name, tensor in folder.tensors.items() if name not in seeds}
    return {module: folder.matrix(module) for module in modules}, rest


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
        names = expected(module, spec, entry["row_scale"])
        seen.update(names)
        nbytes = sum(folder.tensors[name].nbytes for name in names)
        form = f"{spec.format} {spec.bits:g} bit"
        error = folder.about["errors"].get(module)
        rows.append(Row(module, entry["kind"], spec.shape, form, spec.bits, nbytes, error))
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
    problems = [f"{dst / t.file.name}: {t.name} was changed" for t in folder.tensors.values() if not _intact(folder, t)]
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
        taken.update(expected(module, spec, entry["row_scale"]))
        stored = dense.get(f"{module}.weight")
        shape = spec.shape[::-1] if entry["transposed"] else spec.shape
        if stored is None or stored.shape != shape:
            problems.append(f"{module}: {src} has no {shape[0]}x{shape[1]} weight of that name")
            continue
        weight = stored.read(copy=False)
        error = measured_error(folder.matrix(module), weight.T if entry["transposed"] else weight)
        known = folder.about["errors"].get(module)
        if known is not None and not math.isclose(error, known, rel_tol=1e-3, abs_tol=1e-9):
            problems.append(f"{module}: squared error against {src} is {error:.6g}, it was {known:.6g} when written")
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

    Sums in float64 over bands of rows, so that no float64 copy of the whole ever exists.
    """
    decoded = matrix.decode()
    band = max(1, (1 << 20) // max(1, weight.shape[1]))
    difference = power = 0.0
    for start in range(0, weight.shape[0], band):
        exact = weight[start : start + band].double()
        difference += float((decoded[start : start + band].double() - exact).square().sum())
        power += float(exact.square().sum())
    if power == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / power


@dataclass(frozen=True)
class Module:
    """What config.json says about one module with seeds.

    Attributes:
        spec, kind, row_scale, transposed: as in `rbe.allocate.Entry`.
        dtype: of the dense weight in the source.
        tied: modules whose weight is this one and is not stored.
    """

    spec: SeedSpec
    kind: str
    row_scale: bool = False
    transposed: bool = False
    dtype: str = "F32"
    tied: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        return {**asdict(self), "spec": self.spec.to_json(), "tied": list(self.tied)}


@dataclass(frozen=True)
class Contents:
    """Everything of a compressed folder but its tensors.

    Attributes:
        modules: by module name.
        config: the dense model's config.json, empty for a bare file.
        settings: of the encoder, for the record; goes into quantization_config.
        source: about the dense model, for the record.
        errors: squared error relative to the source, by module.
        copied: files to take over: name in the folder to path.
        card: text of README.md.
    """

    modules: Mapping[str, Module]
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    copied: Mapping[str, Path] = field(default_factory=dict)
    card: str = ""


def cut(tensors: Iterable[Outgoing], max_shard_size: int) -> list[list[Outgoing]]:
    """Tensors in shards of at most `max_shard_size` bytes of data; one that is larger gets a shard of its own."""
    parts: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > max_shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def write_folder(
    folder: Path, tensors: Sequence[Outgoing], contents: Contents, max_shard_size: int = 5_000_000_000
) -> None:
    """Fill an empty folder, one tensor in memory at a time; the caller gives it its name when it is complete."""
    modules = {name: module.to_json() for name, module in contents.modules.items()}
    parts = cut(tensors, max_shard_size)
    files, sums, weight_map = {}, {}, {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        names = {tensor.name for tensor in part}
        here = {module: entry["spec"] for module, entry in modules.items() if f"{module}.seeds" in names}
        digest, checksums = shards.write(folder / name, part, header_metadata(here))
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for tensor in part:
            sums[tensor.name] = [tensor.dtype, list(tensor.shape), checksums[tensor.name]]
            weight_map[tensor.name] = name
    copied = {}
    for name, origin in contents.copied.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shards.copy(origin, target)
        copied[name] = shards.file_digest(target)
    about = {"quant_method": METHOD, "format_version": FORMAT_VERSION, **contents.settings, "modules": modules}
    config = {**contents.config, "quantization_config": about}
    shards.write_atomic(folder / CONFIG, shards.to_json(config))
    if contents.card:
        shards.write_atomic(folder / CARD, contents.card.encode())
    ours = {
        "format_version": FORMAT_VERSION,
        "source": dict(contents.source),
        "files": files,
        "tensors": sums,
        "errors": dict(contents.errors),
        "copied": copied,
        "fingerprint": None,
    }
    total = sum(tensor.nbytes for tensor in tensors)
    _write_index(folder, {"metadata": {"total_size": total, "rbe": ours}, "weight_map": weight_map}, config)


def header_metadata(specs_here: Mapping[str, Any]) -> dict[str, str]:
    """`__metadata__` of a shard: enough to read its seeds without any other file."""
    return {
        "format": "pt",
        "rbe.format_version": str(FORMAT_VERSION),
        "rbe.tensors": json.dumps(specs_here, separators=(",", ":")),
    }


def _write_index(folder: Path, index: dict[str, Any], config: Mapping[str, Any]) -> None:
    about = index["metadata"]["rbe"]
    about["config"] = shards.file_digest(folder / CONFIG)
    about["quantization"] = shards.canonical_digest(config["quantization_config"])
    shards.write_atomic(folder / INDEX, shards.to_json(_sealed(index)))


def write_fingerprint(dst: Path, fingerprint: Mapping[str, Any] | None) -> None:
    """Put what the model answers to a fixed input into the index; `verify` compares later."""
    index = read_index(dst)
    index["metadata"]["rbe"]["fingerprint"] = None if fingerprint is None else dict(fingerprint)
    shards.write_atomic(dst / INDEX, shards.to_json(_sealed(index)))


def read_fingerprint(dst: Path) -> dict[str, Any] | None:
    """What `write_fingerprint` stored; None where there is none."""
    return read_index(dst)["metadata"]["rbe"]["fingerprint"]  # type: ignore[no-any-return]


def seal(folder: Path, errors: Mapping[str, float] | None = None, source: Mapping[str, Any] | None = None) -> None:
    """Index and checksums for shards and a config.json that `save_pretrained` has written.

    Raises:
        RbeError: the folder's config.json has no rbe quantization_config.
    """
    config = shards.read_json(folder / CONFIG)
    about = config.get("quantization_config")
    if not isinstance(about, dict) or about.get("quant_method") != METHOD:
        raise RbeError(f"{folder} is not a compressed model: its config.json has no rbe quantization_config")
    (folder / INDEX).unlink(missing_ok=True)
    found = sorted(folder.glob("model*.safetensors"))
    files, sums, weight_map = {}, {}, {}
    for number, old in enumerate(found, 1):
        file = old.rename(folder / f"model-{number:05d}-of-{len(found):05d}.safetensors")
        files[file.name] = {"bytes": file.stat().st_size, "sha256": shards.file_digest(file)}
        for name, tensor in shards.read_header(file)[0].items():
            digest = shards.checksum(name, tensor.dtype, tensor.shape, tensor.chunks())
            sums[name] = [tensor.dtype, list(tensor.shape), digest]
            weight_map[name] = file.name
    known = {CONFIG, INDEX, CARD, *files}
    others = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.relative_to(folder).as_posix() not in known]
    ours = {
        "format_version": FORMAT_VERSION,
        "source": dict(source or {}),
        "files": files,
        "tensors": sums,
        "errors": dict(errors or {}),
        "copied": {f.relative_to(folder).as_posix(): shards.file_digest(f) for f in others},
        "fingerprint": None,
    }
    total = sum(tensor.nbytes for name in files for tensor in shards.read_header(folder / name)[0].values())
    _write_index(folder, {"metadata": {"total_size": total, "rbe": ours}, "weight_map": weight_map}, config)
