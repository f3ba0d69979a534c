"""What a model costs: bytes, time, memory, operations. Pure measurement; nothing here prints or changes a model."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rbe.errors import RbeError


@dataclass(frozen=True)
class Files:
    """Bytes on disk of a model folder or file.

    Attributes:
        total: every file.
        weights: the .safetensors files, headers included.
        count: number of files.
    """

    total: int
    weights: int
    count: int


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call.

    Attributes:
        median: of the repeats; best: the least; spread: the middle half's width as a share of the median.
        repeats: number of timed calls.
    """

    median: float
    best: float
    spread: float
    repeats: int


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a fresh process.

    Attributes:
        start: after the imports; loaded: after the model was loaded; peak: the most ever resident.
    """

    start: int
    loaded: int
    peak: int

    @property
    def model(self) -> int:
        """Peak bytes over what an empty process with the same imports holds."""
        return self.peak - self.start


@dataclass(frozen=True)
class Operations:
    """Arithmetic of one call: multiply-adds and floating-point operations (two a multiply-add)."""

    macs: int
    flops: int


def files(path: Path) -> Files:
    """Real bytes on disk of a folder (recursively) or of one file.

    Raises:
        RbeError: there is nothing at `path`.
    """
    if not path.exists():
        raise RbeError(f"profile: {path} does not exist; give a model folder or a .safetensors file")
    found = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    sizes = [(p, p.stat().st_size) for p in found]
    return Files(
        total=sum(size for _, size in sizes),
        weights=sum(size for p, size in sizes if p.suffix == ".safetensors"),
        count=len(sizes),
    )


def size(nbytes: float) -> str:
    """Bytes as people read them.

    >>> size(512), size(5_876_224), size(90_868_376)
    ('512 B', '5.88 MB', '90.9 MB')
    """
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= step:
            return f"{nbytes / step:.3g} {unit}"
    return f"{nbytes:.0f} B"


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared storage counted once.

    >>> tensor_bytes(nn.Linear(8, 4))
    144
    """
    seen: dict[tuple[int, Any], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        seen[key] = max(seen.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())


def time_each(
    calls: Mapping[str, Callable[[], object]], warm_up: int = 2, repeats: int = 9, seconds: float = 20.0
) -> dict[str, Timing]:
    """Time several calls in turns, so that a change of clock or load meets all of them alike.

    >>> timing = time_each({"nothing": lambda: None}, repeats=3)["nothing"]
    >>> timing.repeats, timing.best <= timing.median
    (3, True)

    Args:
        calls: what to time, by name.
        warm_up: untimed calls of each.
        repeats: timed calls of each.
        seconds: stop starting new rounds after so long (one round is always made).
    """
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(warm_up):
                call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        for done in range(repeats):
            if done and time.perf_counter() > end:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
    return Timing(median, min(values), (high - low) / median if median else 0.0, len(values))


def operations(call: Callable[[], object]) -> Operations:
    """Multiply-adds and floating-point operations of one call, counted by torch's dispatcher.

    >>> layer, x = nn.Linear(8, 4, bias=False), torch.zeros(2, 8)
    >>> operations(lambda: layer(x))
    Operations(macs=64, flops=128)

    An operation without a formula counts as none; matrix products, convolutions and this library's ops have one.
    """
    # Not inference mode: the eager shortcut bypasses the dispatcher there, and the counter sees only the dispatcher.
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    return Operations(flops // 2, flops)


# Runs in the fresh process. VmHWM, not ru_maxrss: Linux hands the peak of the process that started it on to a child.
_PROBE = """
import json, resource, sys

def status(key):
    try:
        with open("/proc/self/status") as lines:
            return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(key + ":"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

job = json.loads(sys.argv[1])
space = {"arguments": job["arguments"]}
exec(compile(job["imports"], "imports", "exec"), space)
start = status("VmRSS")
exec(compile(job["setup"], "setup", "exec"), space)
loaded = status("VmRSS")
exec(compile(job["statement"], "statement", "exec"), space)
print(json.dumps({"start": start, "loaded": loaded, "peak": status("VmHWM")}))
"""


def memory(imports: str, setup: str, statement: str, arguments: Mapping[str, Any], timeout: float = 600.0) -> Memory:
    """Peak resident memory of code in a fresh process, so that two models do not see each other's leftovers.

    >>> found = memory("", "x = bytearray(65 << 20)", "len(bytes(x))", {})  # pages are counted in batches
    >>> found.peak - found.start >= 1 << 27
    True

    Args:
        imports: code run before the first reading.
        setup: code that loads the model.
        statement: code that uses it.
        arguments: what the code finds as the dictionary `arguments`; must survive JSON.
        timeout: seconds after which the process is ended.

    Raises:
        RbeError: the code failed; the message ends with its last line of output.
    """
    job = json.dumps({"imports": imports, "setup": setup, "statement": statement, "arguments": dict(arguments)})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, job],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise RbeError(f"profile: the memory measurement did not finish in {timeout:g} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RbeError(f"profile: the memory measurement failed in its own process: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def to_json(value: Any) -> dict[str, Any]:
    """A measurement as a dictionary."""
    return asdict(value)
