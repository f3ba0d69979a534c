"""The folder of a run: checkpoint, result and trained network, each under its name only when it is whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rbe.errors import RbeError
from rbe.nn import Seeded, Stream, fold_norms, unpack
from rbe.train import networks
from rbe.train.config import Config

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
WEIGHTS = "model.pt"

Build = Callable[[Config], nn.Module]


def load(folder: str | Path, build: Build = networks.build) -> nn.Module:
    """The trained network of a finished run, with frozen seeds, in evaluation mode.

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
        state = torch.load(folder / WEIGHTS, weights_only=True)
    except (OSError, KeyError, ValueError) as cause:
        raise RbeError(
            f"train: there is no finished run in {folder} ({cause}); train it first: rbe train CONFIG --out {folder}"
        ) from cause
    model = build(with_blocks(config, edges))
    for module in model.modules():
        if isinstance(module, Stream):
            module.shut()  # what is drawn anew is not worth packing
    freeze(model)
    if config.train.rest_bits < 32:
        fold_norms(model)
        unpack(model, state)
    else:
        model.load_state_dict(state)
    return model.eval().requires_grad_(False)


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
    """The result of a finished run of this configuration."""
    try:
        known = json.loads((out / RESULT).read_text())
        same = json.dumps(known["config"], sort_keys=True) == identity
        return known["result"] if same else None
    except (OSError, KeyError, ValueError):
        return None


def resume(out: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run of this configuration.

    Raises:
        RbeError: it is damaged, or the folder holds another run.
    """
    path = out / CHECKPOINT
    if not path.exists():
        if (out / RESULT).is_file() and finished(out, identity) is None:
            raise RbeError(f"train: {out} holds another run; choose another --out, or --restart to throw it away")
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as cause:  # torch raises many kinds for a damaged file
        raise RbeError(f"train: the checkpoint {path} is damaged ({cause}); start anew with --restart") from cause
    if saved.get("identity") != identity:
        raise RbeError(
            f"train: {path} is of another configuration; choose another --out, or --restart to throw it away"
        )
    return saved
