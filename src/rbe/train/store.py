"""The folder of a run: checkpoint, result and trained network, each under its name only when it is whole."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn import Seeded, Stream, fold_norms, pack, unpack
from rbe.train import networks, packed
from rbe.train.config import Config

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
WEIGHTS = "model.rbe"
# Of runs of before there was a file of their own.
OLD = "model.pt"

Build = Callable[[Config], nn.Module]


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
        known = json.loads((folder / RESULT).read_text())
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


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Under its name only when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        put(part)
        part.replace(path)
    except OSError as cause:
        raise RbeError(
            f"train: {path} cannot be written ({cause.strerror or cause}); free space or choose --out"
        ) from cause


def finished(out: Path, identity: str) -> dict[str, Any] | None:
    """The result of a finished run of this configuration; None too where its network is gone."""
    there = any((out / name).is_file() for name in (WEIGHTS, OLD))
    return _result(out, identity) if there else None


def _result(out: Path, identity: str) -> dict[str, Any] | None:
    try:
        known = json.loads((out / RESULT).read_text())
        same = json.dumps(known["config"], sort_keys=True) == identity
        return known["result"] if same else None
    except (OSError, KeyError, ValueError, TypeError):
        return None


def resume(out: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run of this configuration.

    Raises:
        RbeError: it is damaged, or the folder holds another run.
    """
    path = out / CHECKPOINT
    if not path.exists():
        if (out / RESULT).is_file() and _result(out, identity) is None:
            raise RbeError(f"train: {out} holds another run; choose another --out, or --restart to throw it away")
        return None
    try:
        saved = _read(path)
    except Exception as cause:  # torch raises many kinds for a damaged file
        raise RbeError(
            f"train: the checkpoint {path} is damaged ({_first(cause)}); start anew with --restart"
        ) from cause
    if saved.get("identity") != identity:
        raise RbeError(
            f"train: {path} is of another configuration; choose another --out, or --restart to throw it away"
        )
    return saved
