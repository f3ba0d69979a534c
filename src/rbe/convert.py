"""A dense model folder to seeds and back: prepare, encode, verify, write; interrupted, it goes on where it was."""

import errno
import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbe import __version__, allocate, checkpoint, search, shards, source
from rbe.allocate import Entry, Plan
from rbe.checkpoint import Contents, Module
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.journal import Journal, lock
from rbe.metrics import shannon_floor
from rbe.shards import Outgoing, Stored
from rbe.source import Roles, Source

EFFORTS = {"fast": 12, "balanced": 16, "best": 16}  # window of each effort
# Headers, index, configuration and model card, beside the tensors and the copied files.
_BESIDE = 1 << 20


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: "prepare", "encode" or "write".
        name: the tensor or file at work.
        done, total: weights, of those that are encoded.
        seconds: since encoding began.
        rate: weights a second in this run, earlier work not counted.
        left: seconds left at this rate; None until there is one.
    """

    stage: str
    name: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    left: float | None = None


@dataclass(frozen=True)
class Encoded:
    """One matrix that became seeds.

    Attributes:
        name: of the tensor in the source.
        spec: with the rotation that the encoder chose.
        nbytes: stored bytes of seeds and scales.
        error: squared error relative to the source, measured on what was stored.
        floor: Shannon floor of the error at the nominal rate, 2^(-2R).
        seconds: the encoder took, in the run that found the seeds.
    """

    name: str
    spec: SeedSpec
    nbytes: int
    error: float
    floor: float
    seconds: float


@dataclass(frozen=True)
class Conversion:
    """What `compress` did, or would do.

    Attributes:
        path: the folder that was written.
        plan: what happens to every tensor.
        encoded: every matrix that became seeds; empty in a dry run.
        weights: elements of all stored tensors.
        nbytes: bytes of all .safetensors files, headers included; in a dry run without the headers.
        fp32_bytes, fp16_bytes: what the same weights take as numbers of that width.
        source_bytes: bytes of the source's tensors.
        needed_bytes: of disk space, while working.
        seconds: of the whole run; in a dry run an estimate for this machine.
        peak_rss: most resident bytes of this process so far, None where the system does not say.
        resumed: matrices whose seeds were found in earlier, interrupted work.
        fingerprint: what the model answers to a fixed input, None where nothing can ask it.
        remarks: what a user should know.
        dry_run: nothing was written.
    """

    path: Path
    plan: Plan
    encoded: tuple[Encoded, ...]
    weights: int
    nbytes: int
    fp32_bytes: int
    fp16_bytes: int
    source_bytes: int
    needed_bytes: int
    seconds: float
    peak_rss: int | None = None
    resumed: int = 0
    fingerprint: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return self.fp32_bytes / self.nbytes

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        encoded = [{**asdict(one), "spec": one.spec.to_json()} for one in self.encoded]
        return {
            **asdict(replace(self, plan=Plan(()), encoded=())),
            "path": str(self.path),
            "plan": self.plan.to_json(),
            "encoded": encoded,
            "remarks": list(self.remarks),
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class _Job:
    """One matrix to encode; travels to other processes."""

    number: int
    entry: Entry
    stored: Stored
    effort: str
    seed: int
    threads: int | None


def compress(
    src: str | Path,
    dst: str | Path,
    bits: float = 2,
    effort: str = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings_bits: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 1,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Callable[[Progress], object] | None = None,
    fingerprint: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Conversion:
    """Write a model as seeds.

    Everything is validated first. Finished matrices are kept in a work folder beside `dst`, so that the same call after
    an interruption goes on with the next one and ends with the same bytes. `dst` appears when it is complete.

    Args:
        src: a transformers folder or a .safetensors file.
        dst: folder to write; one that this function wrote before is replaced, any other is refused.
        bits, embeddings_bits, include, exclude: as in `rbe.allocate.make_plan`.
        effort: "fast", "balanced" or "best".
        seed: of the rotations.
        threads: of each encoder; by default the cores are shared out among the workers.
        workers: matrices encoded at a time, by joblib; its `parallel_config` chooses threads, processes or machines.
        dry_run: say what would be done, and write nothing.
        max_shard_size: bytes of a weight file, as a number or like "500MB".
        progress: called with a `Progress` now and then.
        fingerprint: asks the model in a folder for its answer to a fixed input. By default `rbe.hf.fingerprint`, for
            models that transformers knows.

    Raises:
        RbeError: anything about the source, the target or the settings that cannot work.
    """
    began = time.monotonic()
    tell = progress or (lambda event: None)
    src, dst = Path(src), Path(dst)
    shard_size = _bytes(max_shard_size)
    if effort not in EFFORTS:
        raise RbeError(f"compress: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    if workers < 1 or (threads is not None and threads < 1):
        raise RbeError(f"compress: {workers} workers and {threads} threads; there must be one at least")
    tell(Progress("prepare", str(src)))
    dense = source.open_source(src)
    dst = _free_target(src, dst)
    roles = source.roles(dense)
    plan = allocate.make_plan(
        {name: (tensor.shape, tensor.dtype) for name, tensor in dense.tensors.items()},
        roles.modules,
        bits=bits,
        embeddings_bits=embeddings_bits,
        window=EFFORTS[effort],
        include=include,
        exclude=exclude,
        tied=roles.tied,
        ignored=roles.ignored,
    )
    _check_plan(plan, src)
    source.check_values(dense, frozenset(entry.name for entry in plan.seeded))
    settings = {"bits": float(bits), "effort": effort, "include": list(include), "exclude": list(exclude)}
    settings |= {"embeddings_bits": embeddings_bits, "seed": seed}
    work = dst.parent / f".{dst.name}.rbe-partial"
    if threads is None and workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
    jobs = [
        _Job(number, entry, dense.tensors[entry.name], effort, seed, threads)
        for number, entry in enumerate(plan.seeded)
    ]
    needed = _check_space(dense, plan, dst, work)
    outcome = Conversion(
        path=dst,
        plan=plan,
        encoded=(),
        weights=plan.weights,
        nbytes=plan.nbytes,
        fp32_bytes=4 * plan.weights,
        fp16_bytes=2 * plan.weights,
        source_bytes=plan.source_bytes,
        needed_bytes=needed,
        seconds=0.0,
        remarks=roles.remarks,
        dry_run=dry_run,
    )
    if dry_run:
        return replace(outcome, seconds=_estimate(jobs, workers))
    identity: dict[str, Any] = {"source": dense.fingerprint(), "plan": plan.to_json(), "settings": settings}
    identity |= {"version": __version__, "format": checkpoint.FORMAT_VERSION}
    with _disk_errors(dst, work):
        work.mkdir(parents=True, exist_ok=True)
        with lock(work):
            journal = Journal(work, shards.canonical_digest(identity))
            remarks = [*roles.remarks, *([journal.remark] if journal.remark else [])]
            resumed = len(journal.done)
            _encode_all(jobs, journal, workers, tell)
            encoded = tuple(_encoded(job.entry, journal.done[job.entry.name]) for job in jobs)
            if dense.fingerprint() != identity["source"]:
                raise RbeError(f"{src} was changed while it was read; run again, and leave it alone meanwhile")
            out = work / "out"
            _assemble(out, dense, roles, plan, journal, settings, shard_size, tell)
            answer = _answer(out, dense, fingerprint, remarks)
            checkpoint.write_fingerprint(out, answer)
            tell(Progress("write", "checking"))
            checkpoint.check_files(out)
            nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            _publish(out, dst)
        shutil.rmtree(work, ignore_errors=True)
    return replace(
        outcome,
        encoded=encoded,
        nbytes=nbytes,
        seconds=time.monotonic() - began,
        peak_rss=_peak_rss(),
        resumed=resumed,
        fingerprint=answer,
        remarks=tuple(remarks),
    )


def _bytes(size: int | str) -> int:
    """Bytes of a size like "500MB".

    >>> _bytes("1.5GB"), _bytes(64)
    (1500000000, 64)
    """
    text = str(size).strip().upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
    try:
        value = int(float(text if factor == 1 else text[:-1]) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise RbeError(f"max_shard_size {size!r} is no size; give bytes, or something like '500MB' or '5GB'")
    return value


def _free_target(src: Path, dst: Path) -> Path:
    """The absolute path of a target that may be written."""
    given, origin = dst, src.resolve()
    dst = dst.resolve()
    if dst == origin or origin in dst.parents or dst in origin.parents:
        raise RbeError(f"{given} and the source {src} lie in each other; give a folder elsewhere")
    aside = _aside(dst)
    if aside.exists() and not dst.exists():  # an earlier run was killed between its last two renames
        aside.rename(dst)
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        if not checkpoint.is_ours(dst):
            raise RbeError(f"{given} exists and was not written by rbe; nothing was changed: choose another name")
        foreign = checkpoint.strangers(dst)
        if foreign:
            raise RbeError(
                f"{given} was written by rbe, but holds other files too ({', '.join(foreign[:3])}), which replacing it "
                "would delete; move them, or choose another name"
            )
    parent = _existing(dst.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RbeError(f"{given} cannot be created: {parent} is no folder that you may write to")
    return dst


def _aside(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.rbe-old"


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _check_plan(plan: Plan, src: Path) -> None:
    if not plan.seeded:
        reasons = sorted({entry.reason for entry in plan if entry.reason and len(entry.shape) == 2})
        raise RbeError(
            f"{src} has no matrix that can become seeds ({'; '.join(reasons[:4]) or 'it has no matrices'}); "
            "check include and exclude, or give another model"
        )
    names = {entry.name for entry in plan}
    for entry in plan.seeded:
        clash = names & {f"{entry.module}.{key}" for key in ("seeds", "scale", "row_scale")}
        if clash:
            raise RbeError(f"{src} already has a tensor {min(clash)}; exclude {entry.module}, or rename the tensor")


def _check_space(dense: Source, plan: Plan, dst: Path, work: Path) -> int:
    """Bytes needed beside what earlier work holds: seeds as pieces and in the result, kept tensors, copied files."""
    copied = sum((dense.path / name).stat().st_size for name in dense.others)
    needed = plan.nbytes + sum(entry.nbytes for entry in plan.seeded) + copied + _BESIDE
    present = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(dst.parent)).free
    if free + present < needed:
        raise RbeError(
            f"{dst} needs {needed:,} bytes while it is written, and {free + present:,} are free in {dst.parent}; "
            "free some, or choose another place"
        )
    return needed


def _estimate(jobs: Sequence[_Job], workers: int) -> float:
    """Seconds that encoding will take here, from a small matrix encoded with the same settings."""
    largest = max(jobs, key=lambda job: job.entry.weights)
    spec = largest.entry.spec
    assert spec is not None
    sample = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    took = []
    for _ in range(2):
        began = time.monotonic()
        search.encode(sample, bits=spec.bits, effort=largest.effort, threads=largest.threads)
        took.append(time.monotonic() - began)
    return sum(job.entry.weights for job in jobs) * min(took) / sample.numel() / workers


@contextmanager
def _disk_errors(dst: Path, work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(work / "out", ignore_errors=True)
        raise RbeError(
            f"the disk is full: {dst} could not be written. What is done is kept in {work}; free some space and run "
            "the same command again"
        ) from cause


def _encode_all(jobs: Sequence[_Job], journal: Journal, workers: int, tell: Callable[[Progress], object]) -> None:
    """Encode what the journal does not have yet, and enter it there as it comes."""
    total = sum(job.entry.weights for job in jobs)
    earlier = sum(job.entry.weights for job in jobs if job.entry.name in journal.done)
    pending = [job for job in jobs if job.entry.name not in journal.done]
    began = time.monotonic()
    done = earlier

    def report(name: str, within: float = 0.0) -> None:
        seconds = time.monotonic() - began
        fresh = done - earlier + within
        rate = fresh / seconds if seconds > 0 else 0.0
        left = (total - done - within) / rate if rate > 0 else None
        tell(Progress("encode", name, round(done + within), total, seconds, rate, left))

    def inside(job: _Job, part: int, whole: int) -> None:
        report(job.entry.name, job.entry.weights * part / max(1, whole))

    results: Iterator[tuple[int, dict[str, Any], dict[str, Any]]]
    if workers == 1:
        results = (_encode(job, partial(inside, job)) for job in pending)
    else:
        results = _in_parallel(pending, workers)
    by_number = {job.number: job for job in pending}
    if pending:
        report(pending[0].entry.name)
    for number, tensors, record in results:
        name = by_number[number].entry.name
        journal.add(name, number, {key: torch.from_numpy(value) for key, value in tensors.items()}, record)
        done += by_number[number].entry.weights
        report(name)


def _in_parallel(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    import joblib

    # The encoder leaves Python's lock, so threads are enough; parallel_config can still choose processes or machines.
    with joblib.Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered") as parallel:
        yield from parallel(joblib.delayed(_encode)(job) for job in jobs)


def _encode(
    job: _Job, progress: Callable[[int, int], object] | None = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Encode one matrix, decode it again, and measure: (number, tensors as arrays, record for the journal)."""
    began = time.monotonic()
    entry, spec = job.entry, job.entry.spec
    assert spec is not None
    stored = job.stored.read(copy=False)
    weight = stored.T if entry.transposed else stored
    embedding = entry.kind == "embedding"
    matrix = search.encode(
        weight,
        format=spec.format,
        bits=spec.bits,
        effort=job.effort,
        # The rows of an embedding are generated one by one, so they must not be mixed.
        rotate="in" if embedding else True,
        row_scale=entry.row_scale,
        seed=job.seed,
        window=spec.window,
        threads=job.threads,
        progress=progress,
    )
    tensors = {key: value.numpy() for key, value in matrix.to_tensors().items()}
    error = checkpoint.measured_error(matrix, weight)
    record = {"spec": matrix.spec.to_json(), "error": error, "seconds": time.monotonic() - began}
    return job.number, tensors, record


def _encoded(entry: Entry, record: Mapping[str, Any]) -> Encoded:
    spec = SeedSpec.from_json(record["spec"])
    nbytes = allocate.seed_bytes(spec, entry.row_scale)
    return Encoded(entry.name, spec, nbytes, record["error"], shannon_floor(spec.bits), record["seconds"])


def _assemble(
    out: Path,
    dense: Source,
    roles: Roles,
    plan: Plan,
    journal: Journal,
    settings: Mapping[str, Any],
    shard_size: int,
    tell: Callable[[Progress], object],
) -> None:
    """Put shards, index, configuration, card and copied files together in the work folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tensors: list[Outgoing] = []
    modules: dict[str, Module] = {}
    for entry in plan:
        if entry.spec is None:
            if entry.stored:
                kept = dense.tensors[entry.name]
                tensors.append(Outgoing(kept.name, kept.dtype, kept.shape, kept.chunks))
            continue
        found = journal.tensors(entry.name)
        for key in ("seeds", "scale", "row_scale"):
            if key in found:
                piece = found[key]
                tensors.append(Outgoing(f"{entry.module}.{key}", piece.dtype, piece.shape, piece.chunks))
        tied = tuple(name.removesuffix(".weight") for name, holder in roles.tied.items() if holder == entry.name)
        spec = SeedSpec.from_json(journal.done[entry.name]["spec"])
        modules[entry.module] = Module(spec, entry.kind, entry.row_scale, entry.transposed, entry.dtype, tied)
    tell(Progress("write", dense.path.name))
    copied = {}
    for name in dense.others:
        target = name.as_posix()
        copied["README.source.md" if target == checkpoint.CARD else target] = dense.path / name
    about = {"name": dense.path.name, "bare": dense.bare, "bytes": plan.source_bytes, "metadata": dense.metadata}
    contents = Contents(
        modules=modules,
        config=dense.config or {},
        settings=settings,
        source=about,
        errors={entry.module: journal.done[entry.name]["error"] for entry in plan.seeded},
        copied=copied,
        card=_card(dense, plan),
    )
    checkpoint.write_folder(out, tensors, contents, shard_size)


def _card(dense: Source, plan: Plan) -> str:
    """README.md of the folder: without it a reader could load random weights with only a warning."""
    if dense.bare:
        load = "from pathlib import Path\nfrom rbe import checkpoint\n\n"
        load += 'matrices, others = checkpoint.load_matrices(Path("this-folder"))\n'
        load += "matrices[name].matmul(x)      # name is that of the tensor, without .weight"
    else:
        name = ((dense.config or {}).get("architectures") or ["AutoModel"])[0]
        load = (
            "import rbe.hf                 # without this line transformers would fill the layers with random weights\n"
        )
        load += f'from transformers import {name}\n\nmodel = {name}.from_pretrained("this-folder")'
    rates = sorted({f"{entry.spec.bits:g}" for entry in plan.seeded if entry.spec is not None})
    share = sum(entry.weights for entry in plan.seeded) / max(1, plan.weights)
    return (
        f"# {dense.path.name}, stored as seeds\n\n"
        f"{len(plan.seeded)} matrices with {100 * share:.1f} % of the {plan.weights:,} numbers of `{dense.path.name}` "
        f"are stored at {', '.join(rates)} bits each and generated where they are used. The rest is stored as it was.\n\n"
        f"```python\n{load}\n```\n\n"
        "`rbe inspect` shows what is inside, `rbe verify` checks that it is intact and that the model answers as it\n"
        "did, `rbe decompress` writes an ordinary dense model again.\n"
    )


def _answer(
    out: Path, dense: Source, fingerprint: Callable[[Path], Mapping[str, Any]] | None, remarks: list[str]
) -> Mapping[str, Any] | None:
    """What the model answers to a fixed input, or None with a remark why nothing could ask it."""
    if fingerprint is not None:
        return fingerprint(out)
    if dense.bare or importlib.util.find_spec("transformers") is None:
        return None
    try:
        asked: Mapping[str, Any] = importlib.import_module("rbe.hf").fingerprint(out)
        return asked
    except Exception as cause:  # hours of encoding must not be lost because the model wants images, or newer code
        first = str(cause).strip().partition("\n")[0]
        remarks.append(f"no fingerprint of the outputs was stored: the model could not be asked ({first})")
        return None


def _publish(out: Path, dst: Path) -> None:
    """Give a complete folder its name, in one step where the name is free."""
    for folder in sorted({file.parent for file in out.rglob("*")}, reverse=True):
        shards.flush_folder(folder)
    aside = _aside(dst)
    if dst.exists() and any(dst.iterdir()):
        shutil.rmtree(aside, ignore_errors=True)
        dst.rename(aside)
    elif dst.exists():
        dst.rmdir()
    out.rename(dst)
    shards.flush_folder(dst.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _peak_rss() -> int | None:
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
    shard_size = _bytes(max_shard_size)
    out = given.resolve()
    folder = checkpoint.check_files(dst)
    bare = bool(folder.about["source"].get("bare"))
    if out == dst.resolve() or dst.resolve() in out.parents or out in dst.resolve().parents:
        raise RbeError(f"{given} and {dst} lie in each other; give a folder elsewhere")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RbeError(f"{given} exists; nothing was changed: choose another name")
    tensors = _dense_tensors(folder, dtype)
    needed = sum(tensor.nbytes for tensor in tensors) + _BESIDE
    free = shutil.disk_usage(_existing(out.parent)).free
    if free < needed:
        raise RbeError(f"{given} needs {needed:,} bytes, and {free:,} are free in {out.parent}; free some")
    work = out.parent / f".{out.name}.rbe-partial"
    with _disk_errors(out, work):
        work.mkdir(parents=True, exist_ok=True)
        with lock(work):
            whole = work / "out"
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            _write_dense(whole, folder, tensors, dtype, shard_size)
            if bare and out.suffix == ".safetensors":
                next(whole.glob("*.safetensors")).replace(out)
            else:
                _publish(whole, out)
        shutil.rmtree(work, ignore_errors=True)
    return out


def _dense_tensors(folder: checkpoint.Folder, dtype: torch.dtype | None) -> list[Outgoing]:
    """Every tensor of the source, seeds generated when their turn comes."""
    tensors = {}
    taken: set[str] = set()
    for module, (spec, entry) in checkpoint.specs(folder.config).items():
        taken.update(checkpoint.expected(module, spec, entry["row_scale"]))
        target = dtype or shards.torch_dtype(entry.get("dtype", "F32")) or torch.float32
        shape = spec.shape[::-1] if entry["transposed"] else spec.shape

        def generate(
            module: str = module, flip: bool = entry["transposed"], to: torch.dtype = target
        ) -> Iterator[bytes]:
            weight: Tensor = folder.matrix(module).decode()
            yield shards.raw((weight.T if flip else weight).to(to))

        for name in (module, *entry.get("tied", ())):
            tensors[f"{name}.weight"] = Outgoing(f"{name}.weight", shards.dtype_name(target), shape, generate)
    for name, stored in folder.tensors.items():
        if name not in taken:
            tensors[name] = Outgoing(name, stored.dtype, stored.shape, stored.chunks)
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
