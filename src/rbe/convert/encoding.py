"""Every matrix of a plan to seeds, in this process or in several, each finished one entered in the journal."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rbe import allocate, checkpoint, formats
from rbe.allocate import Entry, Form
from rbe.compress import encode_entry
from rbe.convert.journal import Journal
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.shards import Stored

# Sides of the matrix that is encoded to estimate the time.
_SAMPLE = 128


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
        floor: Shannon floor of the error at the nominal rate, 2^(-2R): `floor` of `compress --json`. That of `inspect`
            is at the stored rate, padding and scales counted, and so lower.
        seconds: the encoder took, in the run that found the seeds.
    """

    name: str
    spec: SeedSpec
    nbytes: int
    error: float
    floor: float
    seconds: float


@dataclass(frozen=True)
class Job:
    """One matrix to encode; travels to other processes."""

    number: int
    entry: Entry
    stored: Stored
    effort: str
    seed: int
    threads: int | None
    moments: Tensor | None = None


def encode_all(
    jobs: Sequence[Job],
    journal: Journal,
    workers: int,
    tell: Callable[[Progress], object],
    turns: Callable[[Sequence[Job]], Iterable[Sequence[Job]]] = lambda jobs: [jobs],
) -> None:
    """Encode what the journal does not have yet, and enter it there as it comes; `turns` prepares it part by part."""
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

    def inside(job: Job, part: int, whole: int) -> None:
        report(job.entry.name, job.entry.weights * part / max(1, whole))

    def results() -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        for part in turns(pending):
            if workers == 1:
                yield from (_encode(job, partial(inside, job)) for job in part)
            else:
                yield from _in_parallel(part, workers)

    by_number = {job.number: job for job in pending}
    if pending:
        report(pending[0].entry.name)
    for number, tensors, record in results():
        name = by_number[number].entry.name
        journal.add(name, number, {key: torch.from_numpy(value) for key, value in tensors.items()}, record)
        done += by_number[number].entry.weights
        report(name)


def _in_parallel(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    import joblib

    # The encoder leaves Python's lock, so threads are enough; parallel_config can still choose processes or machines.
    with joblib.Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered") as parallel:
        yield from parallel(joblib.delayed(_encode)(job) for job in jobs)


def _encode(
    job: Job, progress: Callable[[int, int], object] | None = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Encode one matrix, decode it again, and measure: (number, tensors as arrays, record for the journal)."""
    began = time.monotonic()
    entry, spec = job.entry, job.entry.spec
    assert spec is not None
    stored = job.stored.read(copy=False)
    weight = checkpoint.as_matrix(stored, spec, entry.transposed)
    matrix = encode_entry(
        entry, weight, job.effort, seed=job.seed, threads=job.threads, progress=progress, moments=job.moments
    )
    tensors = {key: value.numpy() for key, value in matrix.to_tensors().items()}
    error = checkpoint.measured_error(matrix, weight)
    if not math.isfinite(error):
        raise RbeError(
            f"{entry.name}: its largest number, {float(weight.abs().max()):.3g}, leaves no room in float32 for the "
            "rotation; exclude it, or rescale the layer"
        )
    record = {"spec": matrix.spec.to_json(), "error": error, "seconds": time.monotonic() - began}
    return job.number, tensors, record


def summary(entry: Entry, record: Mapping[str, Any]) -> Encoded:
    spec = SeedSpec.from_json(record["spec"])
    nbytes = allocate.seed_bytes(spec, entry.row_scale, entry.outliers)
    return Encoded(entry.name, spec, nbytes, record["error"], allocate.floor(spec), record["seconds"])


def estimate(jobs: Sequence[Job], workers: int) -> float:
    """Seconds that encoding will take here, from a small matrix encoded with the same settings."""
    largest = max(jobs, key=lambda job: job.entry.weights)
    spec = largest.entry.spec
    assert spec is not None
    sample = torch.randn(_SAMPLE, _SAMPLE, generator=torch.Generator().manual_seed(0))
    form: Form = {"format": spec.format, "block": spec.block, "mode": spec.mode}
    form |= {"precision": spec.precision, "stages": spec.stages}
    bits = None if formats.is_disk(spec.format) else next(part.bits for _, part in spec.parts)
    small = formats.make_spec(shape=(_SAMPLE, _SAMPLE), bits=bits, window=spec.window, **form)
    entry = Entry("sample", "linear", (_SAMPLE, _SAMPLE), "F32", small)
    took = []
    for _ in range(2):
        began = time.monotonic()
        encode_entry(entry, sample, largest.effort, threads=largest.threads)
        took.append(time.monotonic() - began)
    return sum(job.entry.weights for job in jobs) * min(took) / sample.numel() / workers
