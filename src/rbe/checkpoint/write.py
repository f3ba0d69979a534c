"""Writing a compressed folder, one tensor in memory at a time."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rbe import shards
from rbe.checkpoint.folder import CARD, CONFIG, FORMAT_VERSION, METHOD, guard_names, read_index, sealed
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.shards import Outgoing
from rbe.source import INDEX


@dataclass(frozen=True)
class Module:
    """What config.json says about one module with seeds.

    Attributes:
        spec, kind, row_scale, transposed: as in `rbe.allocate.Entry`.
        dtype: of the dense weight in the source.
        tied: modules whose weight is this one and is not stored.
        tensor: name of the dense weight in the source; empty where it is `<module>.weight`.
        sides: shape of the dense weight in the source; empty where it is the matrix', turned where `transposed`.
        outliers: how many single weights are kept beside the seeds.
        offset: what the dense weight is more than the seeds: 1 for the gain of a norm.
    """

    spec: SeedSpec
    kind: str
    row_scale: bool = False
    transposed: bool = False
    dtype: str = "F32"
    tied: tuple[str, ...] = ()
    tensor: str = ""
    sides: tuple[int, ...] = ()
    outliers: int = 0
    offset: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        entry = {**asdict(self), "spec": self.spec.to_json(), "tied": list(self.tied), "sides": list(self.sides)}
        seldom = ("tensor", "sides", "outliers", "offset")
        return {name: value for name, value in entry.items() if value or name not in seldom}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; what a later version adds is left out."""
        known = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        sides = tuple(entry.get("sides", ()))
        return cls(**{**known, "spec": SeedSpec.from_json(entry["spec"]), "tied": tuple(entry["tied"]), "sides": sides})


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
    if modules and "model_type" in contents.config:
        tensors = [*tensors, *(Outgoing(name, "F32", (0,), tuple) for name in guard_names(modules))]
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
    shards.write_atomic(folder / INDEX, shards.to_json(sealed(index)))


def write_fingerprint(dst: Path, fingerprint: Mapping[str, Any] | None) -> None:
    """Put what the model answers to a fixed input into the index; `verify` compares later."""
    index = read_index(dst)
    index["metadata"]["rbe"]["fingerprint"] = None if fingerprint is None else dict(fingerprint)
    shards.write_atomic(dst / INDEX, shards.to_json(sealed(index)))


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
