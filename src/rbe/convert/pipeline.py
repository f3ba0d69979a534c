"""`compress`: prepare, encode, verify, write; interrupted, it goes on where it was."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rbe import __version__, checkpoint, formats, shards, source
from rbe.allocate import Form, Plan, make_plan, usual_rate
from rbe.budget import MIDDLE
from rbe.convert import place
from rbe.convert.allocation import Allocation
from rbe.convert.assembly import KEYS, ask, assemble
from rbe.convert.calibration import Calibration
from rbe.convert.encoding import Encoded, Job, Progress, encode_all, estimate, summary
from rbe.convert.journal import Journal
from rbe.errors import RbeError
from rbe.formats import Rate
from rbe.search.viterbi import EFFORTS
from rbe.source import Source


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


def compress(
    src: str | Path,
    dst: str | Path,
    bits: float | None = None,
    effort: str = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings_bits: float | None = None,
    rates: Mapping[str, Rate] | None = None,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 1,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Callable[[Progress], object] | None = None,
    fingerprint: Callable[[Path], Mapping[str, Any]] | None = None,
    *,
    format: str = "trellis",
    block: int | None = 16,
    mode: str | None = None,
    precision: int = 32,
    stages: int = 1,
    outliers: float | None = None,
    calibrate: str | Path | None = None,
    allocate: str | Path | None = None,
) -> Conversion:
    """Write a model as seeds.

    Everything is validated first. Finished matrices are kept in a work folder beside `dst`, so that the same call after
    an interruption goes on with the next one and ends with the same bytes. `dst` appears when it is complete.

    Args:
        src: a transformers folder or a .safetensors file.
        dst: folder to write; one that this function wrote before is replaced, any other is refused.
        bits, embeddings_bits, rates, outliers, include, exclude: as in `rbe.allocate.make_plan`.
        format, block, mode, precision, stages: of all seeds, as in `SeedSpec`.
        effort: "fast", "balanced" or "best".
        calibrate: linear layers are encoded so that their outputs, not their weights, come near: "random" runs the
            dense model on random tokens; a path names a text of sentences to run it on. The model is then in memory,
            and up to 1 GiB of second moments. The bytes can depend on the number of threads of torch.
        allocate: `bits` is then the mean of the trellis rates, and each matrix gets a rate by how much the model's
            answer hangs on it: "random" asks the dense model with random tokens, a path with the sentences of a text.
            Matrices that `rates` or `embeddings_bits` name keep the rate given there. The table of input tokens gets
            several rates: more for its first rows, which tokenizers give to frequent tokens.
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
    shard_size = place.size(max_shard_size)
    if effort not in EFFORTS:
        raise RbeError(f"compress: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    if workers < 1 or (threads is not None and threads < 1):
        raise RbeError(f"compress: {workers} workers and {threads} threads; there must be one at least")
    tell(Progress("prepare", str(src)))
    dense = source.open_source(src)
    dst = place.free_target(src, dst)
    roles = source.roles(dense)
    form: Form = {"format": format, "block": block, "mode": mode, "precision": precision, "stages": stages}
    planned = partial(
        make_plan,
        {name: (tensor.shape, tensor.dtype) for name, tensor in dense.tensors.items()},
        roles.modules,
        embeddings_bits=embeddings_bits,
        window=EFFORTS[effort].window,
        include=include,
        exclude=exclude,
        tied=roles.tied,
        ignored=roles.ignored,
        outliers=outliers,
        **form,
    )
    if allocate is not None and formats.is_disk(format):
        raise RbeError(f"compress: allocate is for the trellis; {format} has one rate: leave it out")
    plan = planned(bits=bits if allocate is None else MIDDLE, rates=rates)
    _check_plan(plan, src)
    source.check_values(dense, frozenset(entry.name for entry in plan.seeded))
    if outliers is None:
        planned = partial(planned, extremes=source.extremes(dense, [entry.name for entry in plan.seeded]))
        plan = planned(bits=bits if allocate is None else MIDDLE, rates=rates)
    work = dst.parent / f".{dst.name}.rbe-partial"
    allocation = None
    if allocate is not None:
        mean = MIDDLE if bits is None else bits
        allocation = Allocation(Calibration(dense, allocate, "allocate"), plan, mean, embeddings_bits, rates or {})
        tell(Progress("prepare", "sensitivities"))
        rates = allocation.rates(work)
        plan = planned(bits=MIDDLE, rates=rates)
    settings: dict[str, Any] = {"effort": effort, "include": list(include), "exclude": list(exclude), "seed": seed}
    settings |= {"bits": bits if allocation else usual_rate(bits, form), "embeddings_bits": embeddings_bits}
    settings |= {"rates": dict(rates or {})}
    settings |= form if formats.is_disk(format) else {}
    settings |= {} if outliers is None else {"outliers": outliers}
    if calibrate is not None and formats.is_disk(format):
        raise RbeError(f"compress: calibrate is for the trellis; {format} cannot use it: leave it out")
    calibration = None if calibrate is None else Calibration(dense, calibrate)
    settings |= {} if calibration is None else {"calibrate": calibration.identity}
    settings |= {} if allocation is None else {"allocate": allocation.identity}
    if threads is None and workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
    jobs = [
        Job(number, entry, dense.tensors[entry.name], effort, seed, threads) for number, entry in enumerate(plan.seeded)
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
        return replace(outcome, seconds=estimate(jobs, workers))
    identity: dict[str, Any] = {"source": dense.fingerprint(), "plan": plan.to_json(), "settings": settings}
    identity |= {"version": __version__, "format": checkpoint.FORMAT_VERSION}
    with place.disk_errors(dst, work, resumes=True), place.lock(work):
        place.put_back(dst)
        if allocation is not None:
            allocation.keep(work)
        journal = Journal(work, shards.canonical_digest(identity))
        remarks = [*roles.remarks, *([journal.remark] if journal.remark else [])]
        resumed = len(journal.done)
        if calibration is None:
            encode_all(jobs, journal, workers, tell)
        else:
            encode_all(jobs, journal, workers, tell, calibration.prepared_turns)
        encoded = tuple(summary(job.entry, journal.done[job.entry.name]) for job in jobs)
        if dense.fingerprint() != identity["source"]:
            raise RbeError(f"{src} was changed while it was read; run again, and leave it alone meanwhile")
        out = work / "out"
        assemble(out, dense, roles, plan, journal, settings, shard_size, tell)
        answer = ask(out, dense, fingerprint, remarks, roles.missing)
        checkpoint.write_fingerprint(out, answer)
        tell(Progress("write", "checking"))
        checkpoint.check_files(out)
        nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        place.publish(out, dst)
        place.remove(work)
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


def _check_plan(plan: Plan, src: Path) -> None:
    if not plan.seeded:
        reasons = sorted({entry.reason for entry in plan if entry.reason and len(entry.shape) == 2})
        raise RbeError(
            f"{src} has no matrix that can become seeds ({'; '.join(reasons[:4]) or 'it has no matrices'}); "
            "check include and exclude, or give another model"
        )
    names = {entry.name for entry in plan}
    for entry in plan.seeded:
        clash = names & {f"{entry.module}.{key}" for key in KEYS}
        if clash:
            raise RbeError(f"{src} already has a tensor {min(clash)}; exclude {entry.module}, or rename the tensor")


def _check_space(dense: Source, plan: Plan, dst: Path, work: Path) -> int:
    """Bytes needed beside what earlier work holds: seeds as pieces and in the result, kept tensors, copied files."""
    copied = sum((dense.path / name).stat().st_size for name in dense.others)
    needed = plan.nbytes + sum(entry.nbytes for entry in plan.seeded) + copied + place.BESIDE
    present = place.occupied(work)
    free = shutil.disk_usage(place.existing(dst.parent)).free
    if free + present < needed:
        raise RbeError(
            f"{dst} needs {needed:,} bytes while it is written, and {free + present:,} are free in {dst.parent}; "
            "free some, or choose another place"
        )
    return needed


def _peak_rss() -> int | None:
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
