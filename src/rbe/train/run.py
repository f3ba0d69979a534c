"""One training run: steps, validation, checkpoints, and the test split once, at the end."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.nn import Seeded
from rbe.optim import HybridAdam, PowerDecay
from rbe.train import data, networks
from rbe.train.config import Config
from rbe.train.data import Images

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
WEIGHTS = "model.pt"
# After this share of the steps discrete bits stay: the rest polishes what they are.
SETTLED = 0.75

Build = Callable[[Config], nn.Module]


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        epoch, epochs: done, and in all.
        loss: mean over the epoch.
        validation: accuracy after it, in [0, 1]; best: so far.
        seconds: of all sessions of this run; left: forecast.
    """

    epoch: int
    epochs: int
    loss: float
    validation: float
    best: float
    seconds: float
    left: float


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        name: of the run.
        accuracy: on the test split, in [0, 1], of the epoch that was best on validation.
        validation: accuracy there.
        epoch: the best one.
        weights: of the matrices.
        seed_bytes, bytes: of the seeds; of everything that is stored.
        ratio: 4 weights / seed_bytes, against float32; whole_ratio: the same with all bytes on both sides.
        seconds: of training.
        curve: validation accuracy by epoch.
    """

    name: str
    accuracy: float
    validation: float
    epoch: int
    weights: int
    seed_bytes: int
    bytes: int
    ratio: float
    whole_ratio: float
    seconds: float
    curve: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "curve": list(self.curve)}


def train(
    config: Config,
    out: str | Path,
    tell: Callable[[Progress], object] | None = None,
    restart: bool = False,
    build: Build = networks.build,
) -> Result:
    """Train a network, or go on where an interrupted run of the same configuration stood.

    Args:
        config: the run; its name tells apart what was built differently.
        out: folder for checkpoint, result and the trained model (frozen seeds, `model.pt`, a state dict).
        tell: called after every epoch.
        restart: throw away what is in the folder.
        build: makes the network in place of `networks.build`, for layers that are no seeds; a layer of its own kind
            has a method `stored`, see `networks.sizes`.

    Raises:
        RbeError: the data or the teacher are not there, the folder holds another run, or the loss is no number.
    """
    out = Path(out)
    identity = json.dumps(config.to_json(), sort_keys=True)
    saved = None if restart else _resume(out, identity)
    if (out / RESULT).is_file() and saved is None and not restart and _same(out, identity):
        known = json.loads((out / RESULT).read_text())["result"]
        return Result(**{**known, "curve": tuple(known["curve"])})
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    teacher = None if config.train.teacher is None else load(config.folder / config.train.teacher)
    images = data.load(config)
    torch.manual_seed(config.train.seed)
    model = build(config)
    run = _Run(config, images, model, teacher)
    if saved is not None:
        run.restore(saved)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise RbeError(f"train: {out} cannot be made ({cause.strerror}); choose another folder") from cause
    while not run.done:
        run.epoch()
        _write(out / CHECKPOINT, lambda path: torch.save({"identity": identity, **run.state()}, path))
        if tell is not None:
            tell(run.progress)
    return _finish(run, out, identity)


class _Run:
    """Everything that changes while a network is trained."""

    def __init__(self, config: Config, images: Images, model: nn.Module, teacher: nn.Module | None) -> None:
        recipe = config.train
        self.config, self.images, self.model, self.teacher = config, images, model, teacher
        self.optimizer = HybridAdam(
            model,
            recipe.lr,
            method=recipe.method,  # type: ignore[arg-type]
            latent_lr=recipe.latent_lr,
            weight_decay=recipe.weight_decay,
            pull=recipe.pull,
            clip_norm=recipe.clip_norm,
            seed=recipe.seed,
        )
        self.steps = max(1, len(images.train[0]) // recipe.batch)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, total_steps=recipe.epochs * self.steps, cycle_momentum=False
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.curve: list[float] = []
        self.losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = -1
        self.seconds = 0.0

    @property
    def done(self) -> bool:
        recipe = self.config.train
        waited = len(self.curve) - 1 - self.best_epoch
        return len(self.curve) >= recipe.epochs or bool(recipe.patience and self.curve and waited >= recipe.patience)

    @property
    def progress(self) -> Progress:
        done, epochs = len(self.curve), self.config.train.epochs
        left = self.seconds / done * (epochs - done)
        best = self.curve[self.best_epoch]
        return Progress(done, epochs, self.losses[-1], self.curve[-1], best, self.seconds, left)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "curve": self.curve,
            "losses": self.losses,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        self.curve, self.losses, self.best = state["curve"], state["losses"], state["best"]
        self.best_epoch, self.seconds = state["best_epoch"], state["seconds"]

    def epoch(self) -> None:
        """One pass over the training images, then validation."""
        recipe, began = self.config.train, time.monotonic()
        x, y = self.images.train
        order = torch.randperm(len(x), generator=self.generator)
        self.model.train()
        total = 0.0
        for k in range(self.steps):
            chosen = order[k * recipe.batch : (k + 1) * recipe.batch]
            batch = data.shifted(x[chosen], self.config.data.shift, self.images.black, self.generator)
            labels = y[chosen]
            hints = None
            if self.teacher is not None:
                with torch.no_grad():
                    hints = functional.softmax(self.teacher(batch) / recipe.softness, 1)

            def loss(batch: Tensor = batch, labels: Tensor = labels, hints: Tensor | None = hints) -> Tensor:
                return self.loss(batch, labels, hints)

            self.optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            total += value.item()
            self._flip(len(self.curve) * self.steps + k, loss)
        if not math.isfinite(total):
            raise RbeError(f"train: the loss of epoch {len(self.curve) + 1} is no number; lower [train] lr")
        self.losses.append(total / self.steps)
        self.curve.append(accuracy(self.model, *self.images.validation))
        if self.best_epoch < 0 or self.curve[-1] > self.curve[self.best_epoch]:
            self.best_epoch = len(self.curve) - 1
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.seconds += time.monotonic() - began

    def loss(self, batch: Tensor, labels: Tensor, hints: Tensor | None) -> Tensor:
        out = self.model(batch)
        loss = functional.cross_entropy(out, labels)
        if hints is None:
            return loss
        recipe = self.config.train
        soft = functional.cross_entropy(out / recipe.softness, hints) * recipe.softness**2
        return (1 - recipe.weight) * loss + recipe.weight * soft

    def _flip(self, step: int, loss: Callable[[], Tensor]) -> None:
        recipe = self.config.train
        last = SETTLED * recipe.epochs * self.steps
        if not recipe.flip_every or step % recipe.flip_every or step >= last:
            return
        share = recipe.flip_share * PowerDecay(start=max(1.0, last / 3), exponent=2.0)(step)
        temperature = recipe.flip_temperature / (1 + 0.1 * len(self.curve))
        self.optimizer.flip(loss, share=max(share, 1e-6), temperature=temperature)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of images whose largest output is their label."""
    training = model.training
    model.eval()
    parts = zip(torch.split(x, batch), torch.split(y, batch), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    model.train(training)
    return right / len(x)


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
        about = json.loads((folder / RESULT).read_text())["config"]
        state = torch.load(folder / WEIGHTS, weights_only=True)
    except (OSError, KeyError, ValueError) as cause:
        raise RbeError(
            f"train: there is no finished run in {folder} ({cause}); train it first: rbe train CONFIG --out {folder}"
        ) from cause
    model = build(Config.from_json(about))
    for module in model.modules():
        if isinstance(module, Seeded):
            module.freeze()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Under its name only when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    except OSError as cause:
        raise RbeError(
            f"train: {path} cannot be written ({cause.strerror or cause}); free space or choose --out"
        ) from cause


def _same(out: Path, identity: str) -> bool:
    try:
        return json.dumps(json.loads((out / RESULT).read_text())["config"], sort_keys=True) == identity
    except (OSError, KeyError, ValueError):
        return False


def _resume(out: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run of this configuration."""
    path = out / CHECKPOINT
    if not path.exists():
        if (out / RESULT).is_file() and not _same(out, identity):
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


def _finish(run: _Run, out: Path, identity: str) -> Result:
    """Freeze the best epoch, test it once, and write everything."""
    run.model.load_state_dict(run.best)
    for module in run.model.modules():
        if isinstance(module, Seeded):
            module.freeze()
    sizes = networks.sizes(run.model)
    dense = 4 * sizes["weights"]
    rest = sizes["bytes"] - sizes["seed_bytes"]
    result = Result(
        name=run.config.name,
        accuracy=accuracy(run.model, *run.images.test),
        validation=run.curve[run.best_epoch],
        epoch=run.best_epoch + 1,
        weights=sizes["weights"],
        seed_bytes=sizes["seed_bytes"],
        bytes=sizes["bytes"],
        ratio=dense / sizes["seed_bytes"],
        whole_ratio=(dense + rest) / sizes["bytes"],
        seconds=run.seconds,
        curve=tuple(run.curve),
    )
    _write(out / WEIGHTS, lambda path: torch.save(run.model.state_dict(), path))
    text = json.dumps({"config": json.loads(identity), "result": result.to_json()}, indent=1)
    _write(out / RESULT, lambda path: path.write_text(text + "\n"))
    (out / CHECKPOINT).unlink(missing_ok=True)
    return result
