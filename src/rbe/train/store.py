"""The folder of a run: checkpoint, result and trained network, each under its name only when it is whole."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from rbe import shards
from rbe.errors import RbeError
from rbe.nn import Seeded, Stream, fold_norms, pack, unpack
from rbe.train import networks, packed
from rbe.train.config import Config
from rbe.train.result import Result

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
WEIGHTS = "model.rbe"
# Of runs of before there was a file of their own.
OLD = "model.pt"

Build = Callable[[Config], nn.Module]


def is_run(folder: Path) -> bool:
    """Whether a folder is of a run; models of transformers may have a result.json of their own."""
    return (folder / RESULT).exists() and not (folder / "model.safetensors").exists()


def load(folder: str | Path, build: Build = networks.build) -> nn.Module:
    """The trained network of a finished run, with frozen seeds, in evaluation mode; `train` has an example.

    Args:
        folder: of the run.
        build: what it was trained with.

    Raises:
        RbeError: the folder holds no finished run.
    """
    folder = Path(folder)
    try:
        known = _known(folder)
        config, edges = Config.from_json(known["config"]), {s["name"]: s["edge"] for s in known["result"]["plan"]}
        model, like = _empty(with_blocks(config, edges), build)
        if (folder / WEIGHTS).exists():
            state = packed.read((folder / WEIGHTS).read_bytes(), like)
        else:
            state = _read(folder / OLD)
        unpack(model, state)
    except Exception as cause:  # torch raises many kinds for a damaged file
        raise RbeError(
            f"train: there is no finished run in {folder}, or it is damaged ({_first(cause)}); train it: rbe train "
            f"CONFIG --out {folder}, with --restart if it is damaged"
        ) from cause
    return model.eval().requires_grad_(False)


def read_result(folder: str | Path) -> Result:
    """What a finished run came to; its `inputs` say what the network must be given.

    >>> read_result("runs/none")
    Traceback (most recent call last):
    rbe.errors.RbeError: train: there is no finished run in runs/none (No such file or directory); train it first

    Raises:
        RbeError: the folder holds no finished run, or a damaged one.
    """
    folder = Path(folder)
    try:
        return Result.from_json(_known(folder)["result"])
    except OSError as cause:
        raise RbeError(f"train: there is no finished run in {folder} ({cause.strerror}); train it first") from cause
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as cause:
        raise RbeError(f"train: the finished run in {folder} is damaged ({_first(cause)}); train it again") from cause


def _empty(config: Config, build: Build) -> tuple[nn.Module, dict[str, Tensor]]:
    """A frozen network of a configuration, for a loader to fill, and tensors like those that are stored of it."""
    model = build(config)
    for module in model.modules():
        if isinstance(module, Stream):
            module.shut()  # what is drawn anew is not worth packing
    freeze(model)
    if config.train.rest_bits < 32:
        fold_norms(model)
    return model, pack(model, config.train.rest_bits)


def compact(stored: Mapping[str, Tensor], config: Config, build: Build) -> bytes:
    """The file of what `rbe.nn.pack` made of a network of a configuration; blocks that were chosen are in it."""
    return packed.write(stored, _empty(config, build)[1])


def _read(path: Path) -> dict[str, Any]:
    """What torch saved, every byte of it checked: torch itself does not look at the checksums it writes."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} was changed after it was written")
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict):
        raise TypeError(f"it holds a {type(saved).__name__}")
    return saved


def _first(cause: Exception) -> str:
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


@contextmanager
def sensible(path: Path) -> Iterator[None]:
    """A checkpoint can be whole and still not be of this run.

    Raises:
        RbeError: what it holds does not fit.
    """
    try:
        yield
    except RbeError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as cause:
        raise RbeError(
            f"train: the checkpoint {path} does not fit this run ({_first(cause)}); start anew with --restart"
        ) from cause


def with_blocks(config: Config, edges: dict[str, int]) -> Config:
    """The configuration with these block edges in place of its budget."""
    return replace(config, seeds=config.seeds.planned(edges)) if edges else config


def freeze(model: nn.Module) -> None:
    """Pack the seeds of every layer."""
    for module in model.modules():
        if isinstance(module, Seeded | Stream):
            module.freeze()


def write(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Under its name only when it is whole, and on the disk.

    Raises:
        RbeError: it cannot be written.
    """
    try:
        shards.write_atomic(path, data)
    except (OSError, RuntimeError) as cause:  # torch raises RuntimeError where a disk is full
        told = getattr(cause, "strerror", None) or _first(cause)
        raise RbeError(f"train: {path} cannot be written ({told}); free space or choose --out") from cause


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep every other process out of the folder of a run, which is made where it is not there; not for nothing.

    Raises:
        RbeError: another process is at work there, or nothing can be written.
    """
    there = out.exists()
    try:
        lock = shards.locked(out)
    except OSError as cause:
        raise RbeError(f"train: {out} cannot be written to ({cause.strerror}); choose another --out") from cause
    try:
        yield
    finally:
        # Still held, so that nobody locks a file that is gone.
        with suppress(OSError):
            (out / "lock").unlink(missing_ok=True)
        lock.close()
        if not there:
            with suppress(OSError):  # something is in it
                out.rmdir()


def clear(out: Path) -> None:
    """Throw away the run that a folder holds, before the first step: half of that one is not half of the new one.

    Raises:
        RbeError: it cannot be.
    """
    try:
        for name in (CHECKPOINT, RESULT, WEIGHTS, OLD):
            (out / name).unlink(missing_ok=True)
    except OSError as cause:
        raise RbeError(f"train: {out} cannot be written to ({cause.strerror}); choose another --out") from cause


def digest(config: Mapping[str, Any], result: Mapping[str, Any], weights: bytes) -> str:
    """What ties the file of a network to the run that it is of: SHA-256 of both."""
    about = json.dumps({"config": config, "plan": result["plan"]}, sort_keys=True)
    return hashlib.sha256(about.encode() + b"\0" + weights).hexdigest()


def keep(out: Path, identity: str, result: Result, weights: bytes, alphabet: str | None = None) -> None:
    """Write a finished run; at any moment the folder holds a run to go on with, or a whole one."""
    config, about = json.loads(identity), result.to_json()
    if alphabet is not None and "tokenizer" in result.inputs:
        write(out / result.inputs["tokenizer"], alphabet.encode())
    write(out / WEIGHTS, weights)
    (out / OLD).unlink(missing_ok=True)
    whole = {"config": config, "result": about, "digest": digest(config, about, weights)}
    write(out / RESULT, (json.dumps(whole, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)


def _known(out: Path) -> dict[str, Any]:
    """What a finished run says of itself, if its network is its own; those of before there were digests have none."""
    known: dict[str, Any] = json.loads((out / RESULT).read_text())
    own, weights = known.get("digest"), out / WEIGHTS
    if own is not None and weights.exists() and digest(known["config"], known["result"], weights.read_bytes()) != own:
        raise ValueError(f"{WEIGHTS} is not of the run in {RESULT}, or one of them is damaged")
    return known


def finished(out: Path, identity: str) -> Result | None:
    """The result of a finished run of this configuration; None too where its network is gone.

    Raises:
        RbeError: it is damaged, or the folder holds another run.
    """
    if not (out / RESULT).is_file():
        return None
    going_on = (out / CHECKPOINT).exists()
    try:
        known = json.loads((out / RESULT).read_text())
        same = json.dumps(known["config"], sort_keys=True) == identity
        if same and any((out / name).is_file() for name in (WEIGHTS, OLD)):
            return Result.from_json(_known(out)["result"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as cause:
        if going_on:
            return None  # it ended while the result was written
        raise RbeError(
            f"train: the finished run in {out} is damaged ({_first(cause)}); choose another --out, or --restart to "
            "throw it away"
        ) from cause
    if not same and not going_on:
        other = _other(json.dumps(known["config"]), identity)
        raise RbeError(f"train: {out} holds another run ({other}); choose another --out, or --restart to throw it away")
    return None


def _other(one: str, two: str) -> str:
    """The first thing in which two configurations differ."""
    try:
        was, now = (_flat(json.loads(text)) for text in (one, two))
    except ValueError:
        return "of another version"
    for key in (*now, *was):
        if was.get(key) != now.get(key):
            return f"{key} was {was.get(key)!r}, now it is {now.get(key)!r}"
    return "of another version"


def _flat(some: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(some, dict):
        return {key: some}
    return {k: v for name, part in some.items() for k, v in _flat(part, f"{key}.{name}".strip(".")).items()}


def resume(out: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run of this configuration.

    Raises:
        RbeError: it is damaged, or of another run.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        saved = _read(path)
    except Exception as cause:  # torch raises many kinds for a damaged file
        raise RbeError(
            f"train: the checkpoint {path} is damaged ({_first(cause)}); start anew with --restart"
        ) from cause
    if saved.get("identity") != identity:
        other = _other(str(saved.get("identity") or "{}"), identity)
        raise RbeError(
            f"train: {path} is of another configuration ({other}); choose another --out, or --restart to throw it away"
        )
    return saved
