"""A dense model on disk: a transformers folder or one .safetensors file, validated and read tensor by tensor."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbe import shards
from rbe.errors import CorruptFile, RbeError
from rbe.nn import swap
from rbe.nn.swap import Site
from rbe.outliers import Outliers
from rbe.shards import Stored

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Formats of other programs in which model repositories repeat their weights.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ckpt", ".tflite", ".mlmodel")
_OTHER_FOLDERS = ("onnx", "openvino", "coreml", "original", "__pycache__")


@dataclass(frozen=True)
class Source:
    """A dense model: where every tensor is, and what else lies beside the weights.

    Attributes:
        path: the folder or the file.
        files: the weight files, in the order of their names.
        tensors: by name, in counting order of the names.
        config: contents of config.json; None for a bare file.
        others: paths, relative to the folder, of the files that are not weights.
        metadata: `__metadata__` of the first weight file.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    config: dict[str, Any] | None = None
    others: tuple[Path, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def bare(self) -> bool:
        """Whether it is one file without a model configuration."""
        return self.config is None

    @property
    def name(self) -> str:
        """Of the folder or file, for people: what is no text in it is replaced."""
        named = self.path if self.path.name not in ("", "..") else self.path.resolve()
        return named.name.encode(errors="replace").decode()

    def fingerprint(self) -> str:
        """Changes when a file does: names, sizes, times of change, headers, and all of config.json."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            with file.open("rb") as handle:
                header = handle.read(int.from_bytes(handle.read(8), "little"))
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns} ".encode() + header)
        return digest.hexdigest()


def open_source(path: Path) -> Source:
    """Find and validate a dense model; reads headers, not weights.

    Raises:
        RbeError: there is nothing, it is no model, or its weights are in a form that cannot be read.
        CorruptFile: a weight file is missing, cut or damaged.
    """
    if not path.exists():
        raise RbeError(f"{path} does not exist; give a transformers model folder or a .safetensors file")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise RbeError(f"{path} is a file, but no .safetensors file; give that or a transformers model folder")
        tensors, metadata = shards.read_header(path)
        return _filled(Source(path, (path,), _ordered(tensors), metadata=metadata))
    config = _config(path)
    files = _weight_files(path)
    tensors = {}
    metadata = {}
    for file in files:
        found, about = shards.read_header(file)
        metadata = metadata or about
        twice = tensors.keys() & found.keys()
        if twice:
            raise CorruptFile(f"{path}: {min(twice)} is stored in two files; fetch the folder again")
        tensors.update(found)
    if (path / INDEX).is_file() and files[0].name != SINGLE:
        _check_index(path, tensors)
    return _filled(Source(path, files, _ordered(tensors), config, tuple(_others(path, files)), metadata))


def _ordered(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """By name, numbers inside names in counting order, so that a table of layers reads well."""
    return dict(sorted(tensors.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key in which layer 10 comes after layer 9.

    >>> sorted(["h.10.a", "h.9.a"], key=natural)
    ['h.9.a', 'h.10.a']
    """
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def _filled(source: Source) -> Source:
    if not source.tensors:
        raise RbeError(f"{source.path} holds no tensors; is it the right file?")
    return source


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        hint = f"; for a bare file give {path / files[0]}" if files else ""
        raise RbeError(f"{path} is not a transformers model folder: it has no config.json{hint}")
    config = shards.read_json(path / "config.json")
    about = config.get("quantization_config") or {}
    method = about.get("quant_method") if isinstance(about, dict) else "unknown method"
    if method == "rbe":
        raise RbeError(f"{path} is compressed already; give the dense model, or restore one with `rbe decompress`")
    if method is not None or "quantization_config" in config:
        raise RbeError(f"{path} is quantized already ({method or 'unknown method'}); give the original dense model")
    return config


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / SINGLE).is_file():
        return (path / SINGLE,)
    if (path / INDEX).is_file():
        weight_map = shards.read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"{path / INDEX} has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise CorruptFile(f"{path / INDEX} names a file outside the folder: {name!r}")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CorruptFile(
                f"{path}: {len(missing)} of {len(names)} shards missing ({', '.join(missing[:3])}); fetch them again"
            )
        return tuple(path / name for name in names)
    others = sorted(file.name for file in path.iterdir() if file.suffix in _OTHER_WEIGHTS)
    if others:
        raise RbeError(
            f"{path} has its weights in {others[0]}, which can run code when it is opened, so it is not read; "
            "save the model as safetensors first: from_pretrained(...).save_pretrained(folder)"
        )
    raise RbeError(f"{path} has a config.json but no {SINGLE} or {INDEX}; is the download complete?")


def _check_index(path: Path, tensors: dict[str, Stored]) -> None:
    weight_map = shards.read_json(path / INDEX)["weight_map"]
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CorruptFile(f"{path}: the index promises {name} in {file}, but it is not there; fetch it again")


def _others(path: Path, files: tuple[Path, ...]) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        top = len(relative.parts) == 1
        if (
            not file.is_file()
            or file in files
            or any(part.startswith(".git") or part in _OTHER_FOLDERS or ".rbe-" in part for part in relative.parts)
            or (top and (relative.suffix in (".safetensors", *_OTHER_WEIGHTS) or relative.name == "config.json"))
            or relative.name.endswith((".safetensors.index.json", ".bin.index.json", ".h5.index.json"))
        ):
            continue
        try:
            relative.as_posix().encode()
        except UnicodeEncodeError:
            raise RbeError(f"{path}: the name of {relative!r} is no text; rename the file, or move it away") from None
        yield relative


@dataclass(frozen=True)
class Roles:
    """What the tensors of a source are to its model.

    Attributes:
        modules: for each module of the source that has a two-sided weight, its layer; None where nothing is known.
        tied: tensors that repeat another one, with the name of that one.
        ignored: tensors that the architecture does not use.
        missing: names in the model of what the source lacks; transformers fills it with random numbers.
        remarks: what a user should know.
    """

    modules: dict[str, Site] | None = None
    tied: dict[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def roles(source: Source) -> Roles:
    """Ask the architecture, built without weights, what its layers are.

    Without a configuration, transformers, or knowledge of the architecture the names have to do; a remark says so.
    """
    if source.config is None:
        return Roles()
    if importlib.util.find_spec("transformers") is None:
        return Roles(remarks=("transformers is not installed: layers were told apart by their names",))
    try:
        model = _build(source)
    except Exception as cause:  # whatever remote or future architectures raise, the names are still there
        what = architecture(source.config) or source.config.get("model_type")
        first = str(cause).strip().partition("\n")[0]
        return Roles(remarks=(f"architecture {what} could not be built ({first}): layers were told apart by names",))
    return _roles_in(source, model)


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a configuration names first; empty where it names none.

    >>> architecture({"architectures": ["BertModel"]}), architecture({"architectures": 5})
    ('BertModel', '')
    """
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _build(source: Source) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    build = getattr(transformers, architecture(source.config or {}), None)
    with torch.device("meta"):
        if build is None:
            return transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        return build(config)


def _roles_in(source: Source, model: Any) -> Roles:
    sites = {path: site for site in swap.find(model) for path in site.names}
    names = Names(model)
    modules: dict[str, Site] = {}
    tied: dict[str, str] = {}
    holders: dict[tuple[str, ...], str] = {}
    # An owner comes before what is tied to it, so that the embedding holds the matrix and not the head.
    weights = [name for name in source.tensors if name.endswith(".weight")]
    found = {name: site for name in weights if (site := sites.get(names.module(name))) is not None}
    for name, site in sorted(found.items(), key=lambda item: names.module(item[0]) != item[1].module):
        module = name.removesuffix(".weight")
        holder = holders.setdefault(site.names, name)
        if holder == name:
            modules[module] = site
        elif _same(source.tensors[holder], source.tensors[name]):
            tied[name] = holder
        else:  # the configuration ties them, the file does not; then the file counts
            layer = model.get_submodule(names.module(name))
            modules[module] = replace(site, kind="embedding" if isinstance(layer, torch.nn.Embedding) else "linear")
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    ignored = frozenset(
        name for name in source.tensors if not names.known(name) and any(p.search(name) for p in patterns)
    )
    missing = _missing(names, source, model)
    remarks = []
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        remarks.append(
            f"{source.path} lacks {len(missing)} of the tensors of a {type(model).__name__} ({named}); transformers "
            "fills them with random numbers whenever it loads the model"
        )
    return Roles(modules, tied, ignored, missing, tuple(remarks))


def _missing(names: "Names", source: Source, model: Any) -> tuple[str, ...]:
    """What the model has, apart from what is tied to something in the source, and the source has not."""
    if names.merged:
        return ()
    held = {name for stored in source.tensors if (name := names.found(stored)) is not None}
    for target, origin in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in held or origin in held:
            held |= {target, origin}
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return tuple(
        name
        for name in names.state
        if name not in held and not name.endswith(".num_batches_tracked") and not any(p.search(name) for p in patterns)
    )


def _same(a: Stored, b: Stored) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))


class Names:
    """Names in a file, translated to the names in the model that the file is of.

    Attributes:
        state: the model's names.
        merged: whether some of its tensors are put together from several of the file, so that names do not tell.
    """

    def __init__(self, model: Any) -> None:
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")
        self.state = dict.fromkeys(model.state_dict(), True)
        self.renamings, self.merged = _renamings(model)

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        yield name.removeprefix(f"{self.prefix}.")
        yield f"{self.prefix}.{name}"
        if self.renamings:
            from transformers import core_model_loading

            yield core_model_loading.rename_source_key(name, self.renamings, [], self.prefix, self.state)[0]

    def found(self, name: str) -> str | None:
        """The model's name of it, or None."""
        return next((candidate for candidate in self._candidates(name) if candidate in self.state), None)

    def known(self, name: str) -> bool:
        """Whether the model has a parameter or a stored buffer for it."""
        return self.found(name) is not None

    def module(self, name: str) -> str:
        """Path of the model's module that has this weight; the file's own where the model has none."""
        return (self.found(name) or name).removesuffix(".weight")


def _renamings(model: Any) -> tuple[list[Any], bool]:
    """The renamings that transformers applies to old files of an architecture, and whether it also merges tensors."""
    try:
        from transformers import conversion_mapping, core_model_loading

        mapping = conversion_mapping.get_model_conversion_mapping(model) or []
        found = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
        return found, len(found) < len(mapping)
    except (ImportError, AttributeError):
        return [], False


def check_values(source: Source, encoded: frozenset[str]) -> None:
    """Look at every weight once, a part at a time.

    Raises:
        RbeError: a number to be encoded, or in a weight or bias to be copied, is not finite.
    """
    for name, stored in source.tensors.items():
        must = name in encoded or name.endswith((".weight", ".bias"))
        if stored.dtype in shards.FLOATS and must:
            where = _first_not_finite(stored.read(copy=False))
            if where is not None:
                index, value = where
                raise RbeError(
                    f"{source.path}: {name}[{', '.join(map(str, index))}] is {value}; "
                    "a weight must be finite in float32: repair the model, or fetch it again"
                )


def extremes(source: Source, names: Iterable[str]) -> dict[str, int]:
    """How many weights of each of these tensors are extreme; every tensor is read once."""
    return {name: Outliers.extremes(source.tensors[name].read(copy=False)) for name in names}


def _first_not_finite(tensor: Tensor) -> tuple[list[int], float] | None:
    flat = tensor.reshape(-1)
    step = 1 << 22
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        # Overflow of the float32 that the encoder works in counts too.
        bad = ~torch.isfinite(part.float())
        if bad.any():
            at = start + int(bad.int().argmax())
            index: list[int] = []
            rest = at
            for side in reversed(tensor.shape):
                rest, place = divmod(rest, side)
                index.insert(0, place)
            return index, float(flat[at])
    return None
