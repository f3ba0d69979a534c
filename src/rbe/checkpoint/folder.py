"""Reading a compressed folder: index, configuration and shards that agree, and tensors when they are asked for."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rbe import formats, shards
from rbe.checkpoint import streams
from rbe.errors import CorruptFile, RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.shards import Stored
from rbe.source import INDEX, SINGLE

METHOD = "rbe"
CONFIG = "config.json"
CARD = "README.md"
# In quantization_config: tensors that have another name in the dense model.
RENAMED = "dense_names"
FORMAT_VERSION = formats.get("trellis").VERSION
# What our own commands may leave in a compressed folder later.
_LATER = ("report.html", "report.json")


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
        names = expected(module, spec, entry["row_scale"], entry.get("outliers", 0))
        tensors = {name.rpartition(".")[2]: self.tensors[name].read() for name in names}
        try:
            return SeedMatrix.from_tensors(tensors, spec)
        except RbeError as cause:
            raise CorruptFile(f"{self.path}: {module}: {cause}") from cause


def is_ours(path: Path) -> bool:
    """Whether a folder was written by this library, intact or not."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
        index = json.loads((path / INDEX).read_bytes())
        return config["quantization_config"]["quant_method"] == METHOD and isinstance(index["metadata"]["rbe"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def has_checksums(path: Path) -> bool:
    """Whether the folder was sealed; transformers' `save_pretrained` alone writes no checksums.

    Raises:
        CorruptFile: the index cannot be read.
    """
    if not (path / INDEX).is_file():
        return not (path / SINGLE).is_file()  # an index is lost: only `save_pretrained` writes one file without any
    metadata = shards.read_json(path / INDEX).get("metadata")
    return isinstance(metadata, dict) and "rbe" in metadata


def _says_ours(path: Path) -> bool:
    """Whether config.json speaks of seeds."""
    try:
        about = shards.read_json(path / CONFIG).get("quantization_config")
    except CorruptFile:
        return False
    return isinstance(about, dict) and about.get("quant_method") == METHOD


def strangers(path: Path) -> list[str]:
    """Files in a compressed folder that this library did not put there.

    Raises:
        CorruptFile: the index cannot be read.
    """
    about = read_index(path)["metadata"]["rbe"]
    with _sensible(path / INDEX):
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


def sealed(index: dict[str, Any]) -> dict[str, Any]:
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
        wrong = "is not a folder" if dst.exists() else "does not exist"
        raise RbeError(f"{dst} {wrong}; give a folder that `rbe compress` wrote")
    if not path.is_file() and not (dst / CONFIG).is_file():
        raise RbeError(f"{dst} is not a compressed model: it has no {INDEX}; give a folder that `rbe compress` wrote")
    if not has_checksums(dst) and _says_ours(dst):
        raise RbeError(
            f"{dst} was written by save_pretrained and has no checksums; load it with rbe.hf.load, and write it with "
            "rbe.save to have them"
        )
    index = shards.read_json(path)
    with _sensible(path):
        about = index.get("metadata", {}).get("rbe") if isinstance(index.get("metadata"), dict) else None
        if not isinstance(about, dict):
            raise RbeError(
                f"{dst} is not a compressed model: its index has no rbe part; give what `rbe compress` wrote"
            )
        _check_version(about.get("format_version"), path)
        if sealed(index)["metadata"]["rbe"]["checksum"] != about.get("checksum"):
            raise CorruptFile(f"{path} was changed after it was written; fetch the folder again")
        for name in _files_named(index):
            if not _inside(name):
                raise CorruptFile(
                    f"{path} names a file outside the folder: {name!r}; nothing was written: do not trust who made it"
                )
    return index


def _files_named(index: dict[str, Any]) -> Iterator[Any]:
    """Every name in an index that is used as a file's, when reading or when the dense model is written again."""
    about = index["metadata"]["rbe"]
    yield from about["files"]
    yield from about["copied"]
    yield from index["weight_map"].values()
    if about["source"].get("bare"):
        yield about["source"].get("name")


def _inside(name: Any) -> bool:
    """Whether a name stays inside the folder it is meant for: whoever made an index made its checksum too."""
    return (
        isinstance(name, str)
        and "\0" not in name
        and (p := Path(name)).parts != ()
        and not p.anchor
        and ".." not in p.parts
    )


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


def expected(module: str, spec: SeedSpec, row_scale: bool, outliers: int = 0) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of a module with so many outliers.

    >>> expected("a", SeedSpec("trellis", (40, 33), bits=2.0), row_scale=False)
    {'a.seeds': ('I64', (9, 8)), 'a.scale': ('F32', ())}
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{module}.seeds": ("I64", formats.seeds_shape(spec)),
        f"{module}.scale": ("F32", ()),
    }
    if row_scale:
        stored[f"{module}.row_scale"] = ("F16", spec.shape[:1])
    if outliers:
        stored[f"{module}.outlier_index"] = ("I32", (outliers,))
        stored[f"{module}.outlier_values"] = ("F16", (outliers,))
    return stored


def weight_name(module: str, entry: Mapping[str, Any]) -> str:
    """Name of the dense weight of a module in the source.

    >>> weight_name("lstm.weight_ih_l0", {"tensor": "lstm.weight_ih_l0"}), weight_name("a", {})
    ('lstm.weight_ih_l0', 'a.weight')
    """
    return str(entry.get("tensor") or f"{module}.weight")


def guard_names(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the empty tensors that stand in a transformers folder where dense weights would.

    transformers without `rbe.hf` finds no weights under the names it knows and would go on with random ones; over
    these, which have not the shape of their layers, it raises. There is one for each part of the model, a part being
    what has the first two names of a path in common, because a class may have some of the parts only.

    >>> guard_names({"lm_head": {}, "h.0.mlp": {}, "h.0.attn": {}, "h.1.mlp": {}})
    ['h.0.attn.weight', 'h.1.mlp.weight', 'lm_head.weight']
    """
    first: dict[tuple[str, ...], str] = {}
    for name in sorted(modules):  # JSON may have another order
        first.setdefault(tuple(name.split(".")[:2]), name)
    return [weight_name(name, modules[name]) for name in first.values()]


def _without_guards(tensors: dict[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors that are the model's: a weight that has seeds is not stored, so under its name is a guard."""
    weights = {weight_name(module, entry) for module, (_, entry) in specs(config).items()}
    return {name: tensor for name, tensor in tensors.items() if name not in weights or tensor.shape != (0,)}


def weight_sides(spec: SeedSpec, entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the dense weight of a module in the source.

    Raises:
        CorruptFile: it has not as many elements as the matrix.
    """
    sides = tuple(entry.get("sides", ())) or (spec.shape[::-1] if entry["transposed"] else spec.shape)
    if not all(type(side) is int for side in sides) or math.prod(sides) != math.prod(spec.shape):
        raise CorruptFile(f"a weight of shape {sides} is no {spec.shape} matrix; fetch the folder again")
    return sides


def as_matrix(weight: Tensor, spec: SeedSpec, transposed: bool) -> Tensor:
    """A dense weight of the source as the (rows, columns) matrix that its seeds stand for."""
    return weight.T if transposed else weight.reshape(spec.shape)


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
            weight_sides(spec, entry)
            for name, (dtype, shape) in expected(module, spec, entry["row_scale"], entry.get("outliers", 0)).items():
                if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
                    raise CorruptFile(f"{dst}: {name} should be there as {dtype} {list(shape)}; fetch the folder again")
        for module in streams.forms(config):
            streams.check_headers(module, tensors)
        return Folder(dst, index, config, _without_guards(tensors, config))


def check_files(dst: Path) -> Folder:
    """`open_tensors`, with every byte of every shard compared with its checksum. A loader calls this.

    Raises:
        RbeError: the folder is not a compressed one, or of another version.
        CorruptFile: anything was changed, or a number stands for no weight; the message names the file and, where
            possible, the tensor or the field of the seed.
    """
    folder = open_tensors(dst)
    for name, entry in folder.about["files"].items():
        if shards.file_digest(dst / name) != entry["sha256"]:
            damaged = [
                tensor for tensor in folder.tensors.values() if tensor.file.name == name and not intact(folder, tensor)
            ]
            where = damaged[0].name if damaged else "its header"
            raise CorruptFile(f"{dst / name} was changed after it was written (in {where}); fetch it again")
    for module in specs(folder.config):
        folder.matrix(module)  # whoever wrote the checksums may have written radii outside of the disk too
    for module, form in streams.forms(folder.config).items():
        streams.dense(module, form, folder.tensors)
    return folder


def intact(folder: Folder, tensor: Stored) -> bool:
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
    seeds = {
        name
        for module, (spec, entry) in modules.items()
        for name in expected(module, spec, entry["row_scale"], entry.get("outliers", 0))
    }
    rest = {name: tensor.read() for name, tensor in folder.tensors.items() if name not in seeds}
    return {module: folder.matrix(module) for module in modules}, rest
