"""Whole compressed models to a folder and back: `save` and `load`, for transformers and for plain torch models."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor, nn

from rbe import checkpoint, shards
from rbe.checkpoint import Contents, Folder, Module
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn import Seeded, set_activations, swap
from rbe.nn.stream import Stream
from rbe.nn.streams import check_stream, describe_streams, place_stream
from rbe.source import INDEX

# In quantization_config of a folder that a plain torch model was saved to.
_CLASS = "model_class"
_SAME = "same_tensor"


def save(model: nn.Module, folder: str | Path, max_shard_size: int = 5_000_000_000) -> Path:
    """Write a compressed model to a folder, with checksums of everything; the folder appears when it is complete.

    >>> import rbe, tempfile, torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> _ = rbe.compress_(model, effort="fast")
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = save(model, Path(parent) / "small")
    ...     again = load(folder, model=nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    >>> x = torch.randn(3, 64)
    >>> torch.equal(again(x), model(x))
    True

    Args:
        model: a transformers model or any torch module, with seed layers or streams inside.
        folder: must not exist, or be empty.
        max_shard_size: bytes of a shard.

    Returns:
        the folder.

    Raises:
        RbeError: the model holds no seeds, is one of transformers that holds streams, or the folder is in use.
    """
    folder = Path(folder)
    if isinstance(model, Seeded | Stream):
        raise RbeError(
            "save: the model is a single layer, whose tensors would have no names; save nn.Sequential(layer)"
        )
    stream = next((name or "the model" for name, module in model.named_modules() if isinstance(module, Stream)), None)
    if stream is not None and _is_transformers(model):
        raise RbeError(
            f"save: {stream} holds a stream, and a folder of transformers holds seeds in blocks alone; freeze() its "
            "streams and keep model.state_dict()"
        )
    if stream is None and not any(isinstance(module, Seeded) for module in model.modules()):
        raise RbeError("save: the model holds no seeds; call rbe.compress_(model, bits=2) first")
    with _new_folder(folder) as work:
        if _is_transformers(model):
            _save_transformers(model, work, max_shard_size)
        else:
            _save_plain(model, work, max_shard_size)
        checkpoint.check_files(work)
    return folder


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    activations: str = "float32",
    **kwargs: Any,
) -> Any:
    """Load what `save` or `rbe compress` wrote, every byte checked first.

    Args:
        folder: a compressed folder.
        model: for a plain torch model: one of the same shape, dense, its weights of no importance (it may be on the
            meta device). Its layers are replaced in place. Not needed for transformers models.
        activations: "float32" (exact) or "int8" (faster).
        kwargs: for transformers' `from_pretrained`.

    Returns:
        the model, in evaluation mode; or, where the source was one bare .safetensors file, a dictionary of its tensors'
        names (`<module>.weight`) to `SeedMatrix` or tensor.

    Raises:
        RbeError: the folder is not a compressed one, is of another format version, or needs `model`.
        CorruptFile: anything was changed.
    """
    folder = Path(folder)
    _refuse_dense(folder)
    config = checkpoint.read_config(folder)
    if model is None and ("model_type" in config or "architectures" in config):
        from rbe import hf

        return hf.load(folder, activations, **kwargs)
    found = checkpoint.check_files(folder)
    if model is not None:
        if kwargs:
            raise RbeError(f"load: {', '.join(kwargs)} have no meaning together with model=")
        _fill(model, found)
        return set_activations(model.eval(), activations)
    about = found.config["quantization_config"]
    if _CLASS in about:
        raise RbeError(
            f"load: {folder} holds the seeds of a {about[_CLASS]}, which only your program can build; "
            f"give one: rbe.load({str(folder)!r}, model={about[_CLASS]}(...))"
        )
    matrices, rest = checkpoint.load_matrices(folder)
    names = {module: checkpoint.weight_name(module, entry) for module, entry in about["modules"].items()}
    tensors: dict[str, SeedMatrix | Tensor] = {names[module]: matrix for module, matrix in matrices.items()}
    return {**tensors, **rest}


def _is_transformers(model: nn.Module) -> TypeGuard[Any]:
    return any(cls.__module__.startswith("transformers.") and cls.__name__ == "PreTrainedModel"
               for cls in type(model).__mro__)  # fmt: skip


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A working folder beside `folder` that takes its name at the end, or vanishes."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RbeError(f"save: {folder} exists; give a new name, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.rbe-", dir=folder.absolute().parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
        shards.flush_folder(folder.absolute().parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _save_transformers(model: Any, work: Path, max_shard_size: int) -> None:
    from rbe import hf

    if getattr(model, "hf_quantizer", None) is None:
        hf.attach(model)
    # Not under the names of older files, which some architectures translate: the description has the model's own.
    model.save_pretrained(work, max_shard_size=max_shard_size, save_original_format=False)
    name = type(model).__name__
    code = f"import rbe.hf\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained('this-folder')"
    _write_card(work, name, "transformers raises a mismatch of sizes if `rbe.hf` is not imported first.", code)
    checkpoint.seal(work)
    checkpoint.write_fingerprint(work, hf.fingerprint_of(model))


def _save_plain(model: nn.Module, work: Path, max_shard_size: int) -> None:
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    same = {}
    for name, tensor in swap.packed_state(model).items():
        if not isinstance(tensor, Tensor):
            raise RbeError(f"save: the state of {name} is a {type(tensor).__name__}, which safetensors cannot hold")
        # One tensor under two names is stored once; an empty one has no place of its own.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if first.setdefault(place, name) == name:
            tensors[name] = tensor
        else:
            same[name] = first[place]
    described = swap.describe(model)
    modules = {name: Module.from_json(entry) for name, entry in described.items()}
    settings: dict[str, Any] = {_CLASS: type(model).__name__, _SAME: same}
    renamed = {name: dense for name in tensors if (dense := swap.dense_name(name, model)) != name}
    settings |= {checkpoint.RENAMED: renamed} if renamed else {}
    forms = {path: form.to_json() for path, form in describe_streams(model).items()}
    settings |= {checkpoint.STREAMS: forms} if forms else {}
    outgoing = [shards.outgoing(name, tensor) for name, tensor in tensors.items()]
    checkpoint.write_folder(work, outgoing, Contents(modules, settings=settings), max_shard_size)
    name = type(model).__name__
    code = f"import rbe\n\nmodel = rbe.load('this-folder', model={name}(...))"
    _write_card(work, name, "The model that is given only lends its shape; its weights are replaced.", code)


def _write_card(work: Path, name: str, advice: str, code: str) -> None:
    text = f"# {name}, stored as seeds\n\n{advice}\n\n```python\n{code}\n```\n"
    shards.write_atomic(work / checkpoint.CARD, text.encode())


def _refuse_dense(folder: Path) -> None:
    """Say it well when a folder is dense; the strict reader says everything else that can be wrong."""
    try:
        about = shards.read_json(folder / checkpoint.CONFIG).get("quantization_config")
        sealed = (folder / INDEX).is_file() and checkpoint.has_checksums(folder)
    except RbeError:
        return
    ours = isinstance(about, dict) and about.get("quant_method") == checkpoint.METHOD
    if not ours and not sealed:
        raise RbeError(f"load: {folder} is not a compressed model; transformers itself loads a dense one")


def _fill(model: nn.Module, found: Folder) -> None:
    """Put the folder's seed layers into a dense model of the same shape, and all of its tensors."""
    sites = {path: site for site in swap.find(model) for path in site.names}
    about = found.config["quantization_config"]
    # Folders of bare files know layers by their tensors' names.
    paths = {name: site.module for site in sites.values() if site.group for name in site.tensors}
    entries = {paths.get(path, path): value for path, value in checkpoint.specs(found.config).items()}
    recurrent = {site.group for site in sites.values() if site.group and site.module in entries}
    state = {_path_of(name, paths, recurrent): stored.read() for name, stored in found.tensors.items()}
    held = {path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Seeded)}
    for path, (spec, entry) in entries.items():
        _check_place(path, spec, entry, sites, held)
    forms = checkpoint.forms(found.config)
    for path, form in forms.items():
        check_stream(model, path, form)
    state.update({name: state[source] for name, source in about.get(_SAME, {}).items()})
    wanted = {_path_of(n, paths, recurrent) for n in _names_after(model, entries, forms)}
    # Files of older torch have no counters of batches; torch fills them in.
    missing = {n for n in wanted ^ set(state) if n in state or not n.endswith(".num_batches_tracked")}
    if missing:
        raise RbeError(
            f"load: the given model and the folder do not have the same tensors ({', '.join(sorted(missing)[:4])}); "
            "build the model as it was when it was saved"
        )
    for own, tensor in model.state_dict().items():
        name = _path_of(own, paths, recurrent)
        # Of seeds of streams the length is known only by the file.
        stream = name.removesuffix(".seed") in forms
        if name in state and state[name].shape != tensor.shape and not stream:
            raise RbeError(
                f"load: {name} is {tuple(tensor.shape)} in the given model, "
                f"but {tuple(state[name].shape)} in the folder"
            )
    for path, (spec, entry) in entries.items():
        shared = tuple(entry.get("tied", ()))
        if path in held:
            swap.shut(held[path])
            swap.room_for_outliers(held[path], entry.get("outliers", 0))
        elif entry["kind"] == "vector":
            swap.place_vector(model, path, spec)
        else:
            site = replace(sites[path], module=path, shared=shared)
            swap.place(model, site, spec, entry["row_scale"], entry.get("outliers", 0))
    for path, form in forms.items():
        place_stream(model, path, form)
    model.load_state_dict(state, assign=True)
    # Assigning gives every name a parameter of its own; what was one must be one again.
    for name, source in about.get(_SAME, {}).items():
        owner, target = model.get_submodule(source.rpartition(".")[0]), model.get_submodule(name.rpartition(".")[0])
        value = getattr(owner, source.rpartition(".")[2])
        if getattr(target, name.rpartition(".")[2]) is not value:
            setattr(target, name.rpartition(".")[2], value)


def _path_of(name: str, paths: dict[str, str], recurrent: Collection[str]) -> str:
    """The name that a tensor of a dense model, or of a bare file, has in the model in seeds."""
    place, _, leaf = name.rpartition(".")
    if place in paths:
        return f"{paths[place]}.{leaf}"
    kind, _, part = leaf.partition("_")
    return f"{place}.{part}.{kind}" if place in recurrent and kind == "bias" else name


def _check_place(
    path: str, spec: SeedSpec, entry: dict[str, Any], sites: dict[str, swap.Site], held: dict[str, Seeded]
) -> None:
    """Refuse a model that has no place for a seed layer of the folder, or another one."""
    if path in held:
        if held[path].spec != spec:
            raise RbeError(
                f"load: {path} is {held[path].spec} in the given model, but {spec} in the folder; build the model with "
                "the settings it was saved with"
            )
        return
    owner = path.rpartition(".")[0]
    site = sites.get(owner if entry["kind"] == "vector" else path)
    if site is None or site.kind == "keep":
        reason = "it has no such layer" if site is None else site.reason
        raise RbeError(f"load: the folder holds seeds for {path}, but the given model cannot: {reason}")
    shape = (site.shape[0], 1) if entry["kind"] == "vector" else site.shape
    if spec.shape != shape:
        raise RbeError(f"load: {path} is {shape} in the given model, but {spec.shape} in the folder")


def _names_after(
    model: nn.Module, entries: dict[str, tuple[SeedSpec, dict[str, Any]]], forms: dict[str, checkpoint.Form]
) -> set[str]:
    """Names in the state dict once the seed layers are in place."""
    names = set(model.state_dict())
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, (spec, entry) in entries.items():
        owner = modules.get(path)
        for other in (path, *entry.get("tied", ())):
            names.discard(f"{other}.weight")
            names.difference_update(f"{other}.{name}" for name in ("code", "latent", "radius", "angle", "scale"))
            if other == path or modules.get(other) is owner:
                names.update(checkpoint.expected(other, spec, entry["row_scale"], entry.get("outliers", 0)))
        names.discard(checkpoint.weight_name(path, entry))
    for path, form in forms.items():
        owner = modules.get(path)
        for other in [name for name, module in modules.items() if module is owner and owner is not None] or [path]:
            names.difference_update(f"{other}.{name}" for name in ("weight", "bias", "latent", "log_scale"))
            names.update(checkpoint.names(other))
        if form.kind == "recurrent":
            names.difference_update((form.tensor, form.tensor.replace(".weight_", ".bias_")))
    return names
