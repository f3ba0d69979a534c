"""A compressed folder back to an ordinary dense model."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rbe import checkpoint, shards, source
from rbe.convert import place
from rbe.errors import RbeError
from rbe.shards import Outgoing


def decompress(
    dst: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write an ordinary dense model from a compressed folder, one tensor in memory at a time.

    Names, layouts and dtypes are those of the source; the values are those that the seeds generate.

    Args:
        dst: a compressed folder; every byte of it is checked first.
        out: folder to write, or a .safetensors file where the source was one; must not exist.
        dtype: of the dense matrices; by default each one's in the source.
        max_shard_size: bytes of a weight file, as a number or like "500MB".

    Returns:
        the path that was written.

    Raises:
        RbeError: `dst` is not a compressed folder, or `out` cannot be written.
        CorruptFile: `dst` was changed.
    """
    dst, given = Path(dst), Path(out)
    shard_size = place.size(max_shard_size)
    out = given.resolve()
    folder = checkpoint.check_files(dst)
    bare = bool(folder.about["source"].get("bare"))
    if out == dst.resolve() or dst.resolve() in out.parents or out in dst.resolve().parents:
        raise RbeError(f"{given} and {dst} lie in each other; give a folder elsewhere")
    if not place.is_free(out):
        raise RbeError(f"{given} exists; nothing was changed: choose another name")
    tensors = _dense_tensors(folder, dtype)
    needed = sum(tensor.nbytes for tensor in tensors) + place.BESIDE
    free = shutil.disk_usage(place.existing(out.parent)).free
    if free < needed:
        raise RbeError(f"{given} needs {needed:,} bytes, and {free:,} are free in {out.parent}; free some")
    work = out.parent / f".{out.name}.rbe-dense"
    with place.disk_errors(out, work, resumes=False), place.lock(work):
        whole = work / "out"
        try:
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            _write_dense(whole, folder, tensors, dtype, shard_size)
            if bare and out.suffix == ".safetensors":
                next(whole.glob("*.safetensors")).replace(out)
            else:
                place.publish(whole, out)
        finally:  # nothing is taken up again, so that nothing may stay
            place.remove(work)
    return out


def _dense_tensors(folder: checkpoint.Folder, dtype: torch.dtype | None) -> list[Outgoing]:
    """Every tensor of the source, seeds generated when their turn comes."""
    tensors = {}
    taken: set[str] = set()
    for module, (spec, entry) in checkpoint.specs(folder.config).items():
        taken.update(checkpoint.expected(module, spec, entry["row_scale"], entry.get("outliers", 0)))
        target = dtype or shards.torch_dtype(entry.get("dtype", "F32")) or torch.float32
        shape = checkpoint.weight_sides(spec, entry)

        def generate(
            module: str = module,
            flip: bool = entry["transposed"],
            to: torch.dtype = target,
            offset: float = entry.get("offset", 0.0),
        ) -> Iterator[bytes]:
            weight: Tensor = folder.matrix(module).decode() + offset
            yield shards.raw((weight.T if flip else weight).to(to))

        tied = [f"{name}.weight" for name in entry.get("tied", ())]
        for name in (checkpoint.weight_name(module, entry), *tied):
            tensors[name] = Outgoing(name, shards.dtype_name(target), shape, generate)
    for module, form in checkpoint.forms(folder.config).items():
        taken.update(checkpoint.names(module))
        target = dtype or torch.float32
        for part, (name, sides) in enumerate(((form.tensor, form.sides), (form.offset, form.shape[:1]))):

            def read(
                module: str = module, form: checkpoint.Form = form, part: int = part, to: torch.dtype = target
            ) -> Iterator[bytes]:
                tensor = checkpoint.dense(module, form, folder.tensors)[part]
                assert tensor is not None
                yield shards.raw(tensor.to(to))

            if name:
                tensors[name] = Outgoing(name, shards.dtype_name(target), sides, read)
        if form.kind == "recurrent" and form.offset:  # torch has two biases
            second, count = form.offset.replace("bias_ih_", "bias_hh_"), form.shape[0]
            zeros = shards.raw(torch.zeros(count, dtype=target))
            tensors[second] = Outgoing(second, shards.dtype_name(target), (count,), partial(iter, [zeros]))
    renamed = folder.config["quantization_config"].get(checkpoint.RENAMED, {})
    for name, stored in folder.tensors.items():
        if name not in taken:
            dense = str(renamed.get(name, name))
            tensors[dense] = Outgoing(dense, stored.dtype, stored.shape, stored.chunks)
    return [tensors[name] for name in sorted(tensors, key=source.natural)]


def _write_dense(
    whole: Path, folder: checkpoint.Folder, tensors: list[Outgoing], dtype: torch.dtype | None, shard_size: int
) -> None:
    about = folder.about["source"]
    metadata = about.get("metadata") or {"format": "pt"}
    if about.get("bare"):
        shards.write(whole / about["name"], tensors, metadata)
        return
    parts = checkpoint.cut(tensors, shard_size)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = source.SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shards.write(whole / name, part, metadata)
        weight_map.update({tensor.name: name for tensor in part})
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        shards.write_atomic(whole / source.INDEX, shards.to_json(index))
    for name in folder.about["copied"]:
        target = whole / (checkpoint.CARD if name == "README.source.md" else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shards.copy(folder.path / name, target)
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    shards.write_atomic(whole / checkpoint.CONFIG, shards.to_json(config))
