"""One training run: steps, validation, checkpoints, and the test split once, at the end."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn import pack, round_rest
from rbe.optim import Cooling, HybridAdam, PowerDecay, StreamAdam
from rbe.train import budget, networks, store
from rbe.train.budget import Share
from rbe.train.characters import Characters
from rbe.train.checks import check_alphabet, check_measured, check_saved, check_sequences, check_teacher, contents
from rbe.train.config import Config
from rbe.train.devices import at_hand, device_draws, draw_on, named_device
from rbe.train.distillation import loss_of
from rbe.train.images import Pictures, accuracy
from rbe.train.language import Language
from rbe.train.norms import measure_norms
from rbe.train.planting import start
from rbe.train.recipe import PHASES, build_optimizer
from rbe.train.result import Epoch, Progress, Result
from rbe.train.store import CHECKPOINT, RESULT, WEIGHTS, Build, load
from rbe.train.task import Batch, Task
from rbe.train.translation import Translation

__all__ = ["CHECKPOINT", "RESULT", "WEIGHTS", "Build", "Epoch", "Progress", "Result", "accuracy", "load", "train"]

# After this share of the steps discrete bits stay: the rest polishes what they are.
SETTLED = 0.75
# Seconds between two checkpoints, and two lines of progress, within an epoch.
EVERY = 120.0

TASKS: dict[str, type[Task]] = {
    "images": Pictures,
    "characters": Characters,
    "translation": Translation,
    "language": Language,
}


def train(
    config: Config,
    out: str | Path,
    tell: Callable[[Progress], object] | None = None,
    restart: bool = False,
    build: Build = networks.build,
    planned: Callable[[tuple[Share, ...]], object] | None = None,
    told: Callable[[int, int], object] | None = None,
    device: str | torch.device = "cpu",
) -> Result:
    """Train a network, or go on where an interrupted run of the same configuration stood.

    >>> import tempfile
    >>> import numpy as np
    >>> from rbe.train.config import Data, Model, Recipe
    >>> images = np.random.default_rng(0).integers(0, 256, (120, 8, 8)).astype(np.uint8)
    >>> parts = {"x_train": images[:100], "x_test": images[100:]}
    >>> parts |= {name.replace("x", "y"): np.arange(len(x)) % 4 for name, x in parts.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/noise.npz", **parts)
    ...     model, recipe = Model(widths=(64, 16, 4)), Recipe(epochs=1, batch=20)
    ...     config = Config("noise", Data(f"{folder}/noise.npz", validation=20), model, train=recipe)
    ...     result = train(config, f"{folder}/run")
    ...     network = load(f"{folder}/run")
    >>> result.metric, result.seed_bytes, result.ratio, network(torch.zeros(3, 1, 8, 8)).shape
    ('accuracy', 80, 54.4, torch.Size([3, 4]))

    Args:
        config: the run; its name tells apart what was built differently.
        out: folder for checkpoint, result and the trained model (`model.rbe`, see `rbe.train.packed`).
        tell: called after every epoch, and within one every two minutes.
        restart: throw away what is in the folder.
        build: makes the network in place of `networks.build`, for layers that are no seeds; a layer of its own kind
            has a method `stored`, see `networks.sizes`. For translation the network has `encode` and `follow` as
            `rbe.train.texts.Translator`.
        planned: called with what each matrix gets, where the configuration has a number of bytes to divide.
        told: called with the sentences that the teacher has translated so far, and all, where it does so first.
        device: where the network is trained and validated, one of torch's; a run may go on on another one. What is kept
            is frozen and tested on the CPU.

    Raises:
        RbeError: the data, the teacher or the device are not there, the folder holds another run, or the loss is no
            number.
    """
    out, where = Path(out), named_device(device)
    identity = json.dumps(config.to_json(), sort_keys=True)
    # What is finished is told even where nothing can be written.
    if not restart and (known := store.finished(out, identity)) is not None:
        return known
    with store.held(out):
        saved = None
        if not restart:
            # Another process may have ended meanwhile.
            if (known := store.finished(out, identity)) is not None:
                return known
            saved = store.resume(out, identity)
        run = _begin(config, out, saved, restart, build, planned, told, where)
        return _through(run, out, identity, build, tell)


def _begin(
    config: Config,
    out: Path,
    saved: dict[str, Any] | None,
    restart: bool,
    build: Build,
    planned: Callable[[tuple[Share, ...]], object] | None,
    told: Callable[[int, int], object] | None,
    device: torch.device,
) -> "_Run":
    """A fresh run, or one where it was saved; whatever is wrong is found before anything is thrown away."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    task = TASKS[config.data.task](config)
    teacher = _network(config, task, config.train.teacher)
    # The network to start from is often the teacher.
    same = config.model.start == config.train.teacher
    source = teacher if same else _network(config, task, config.model.start)
    content = contents(task, teacher, source)
    if saved is not None:
        check_saved(task, content, saved)
    for named in (config.model.start, config.train.teacher):
        check_alphabet(config, task, named)
    shares: tuple[Share, ...] = ()
    if config.seeds.bytes and not config.seeds.streamed:
        with store.sensible(out / CHECKPOINT):
            shares = () if saved is None else tuple(Share(**s) for s in saved["plan"])
        shares = budget.plan(config, task, teacher) if saved is None else shares
        if planned is not None:
            planned(shares)
    torch.manual_seed(config.train.seed)
    model = build(store.with_blocks(config, {s.name: s.edge for s in shares}))
    if source is not None:
        start(model, source)
    if teacher is not None:
        check_teacher(config, teacher, model, task)
    check_sequences(config, task, teacher, model)
    if build is networks.build:
        check_measured(config, model)
    if restart:
        store.clear(out)
    for network in (model, teacher):
        if network is not None:
            network.to(device)
    targets = _targets(config, task, teacher, saved, out, told)
    run = _Run(config, task, model, teacher, shares, targets, content, device)
    if saved is not None:
        with store.sensible(out / CHECKPOINT):
            run.restore(saved)
    return run


def _targets(
    config: Config,
    task: Task,
    teacher: nn.Module | None,
    saved: dict[str, Any] | None,
    out: Path,
    told: Callable[[int, int], object] | None,
) -> tuple[Tensor, ...]:
    """The teacher's translations, where they are asked for, from now on the targets of the task."""
    if not (config.train.sequence_level and config.train.epochs and isinstance(task, Translation)) or teacher is None:
        return ()
    targets = task.told(teacher, told) if saved is None else ()
    with store.sensible(out / CHECKPOINT):
        targets = targets if saved is None else saved["targets"]
        task.retell(*targets)
    return targets


def _through(run: "_Run", out: Path, identity: str, build: Build, tell: Callable[[Progress], object] | None) -> Result:
    """What is left of a run, to its end."""

    def pause() -> None:
        store.write(out / CHECKPOINT, lambda file: torch.save({"identity": identity, **run.state()}, file))
        if tell is not None:
            tell(run.progress)

    if not run.config.train.epochs:
        run.judge(0.0)
    if run.history and run.done and run.config.train.epochs and tell is not None:
        tell(run.progress)
    while not run.done:
        run.epoch(pause)
        pause()
    return _finish(run, out, identity, build)


def _network(config: Config, task: Task, folder: str | None) -> nn.Module | None:
    """The trained network of a folder."""
    if folder is None:
        return None
    place = config.folder / folder
    if isinstance(task, Language) and not store.is_run(place):
        return task.foreign(folder)
    return load(place)


class _Run:
    """Everything that changes while a network is trained."""

    def __init__(
        self,
        config: Config,
        task: Task,
        model: nn.Module,
        teacher: nn.Module | None,
        plan: tuple[Share, ...],
        targets: tuple[Tensor, ...],
        content: int,
        device: torch.device,
    ) -> None:
        recipe = config.train
        self.config, self.task, self.model, self.teacher = config, task, model, teacher
        self.plan, self.targets, self.content, self.device = plan, targets, content, device
        self.steps = task.steps
        self.optimizer = build_optimizer(config, model, max(1, recipe.epochs) * task.steps)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, total_steps=max(1, recipe.epochs) * self.steps, cycle_momentum=False
        )
        self.phases = PHASES[recipe.phases](max(1, recipe.epochs) * self.steps)
        self._enter(0)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = -1
        self.seconds = 0.0
        # Steps of the epoch that is under way, the sum of their losses, and the draws that its batches began with.
        self.step, self.total, self.drawn = 0, 0.0, self.generator.get_state()
        self.signs = _signs(model)
        self.finite = {name for name, buffer in model.named_buffers() if bool(buffer.isfinite().all())}

    @property
    def curve(self) -> list[float]:
        return [epoch.validation for epoch in self.history]

    @property
    def done(self) -> bool:
        recipe = self.config.train
        waited = len(self.history) - 1 - self.best_epoch
        return len(self.history) >= recipe.epochs or bool(recipe.patience and self.best and waited >= recipe.patience)

    @property
    def progress(self) -> Progress:
        whole, epochs = len(self.history), self.config.train.epochs
        done = whole + self.step / self.steps
        return Progress(
            epoch=whole,
            epochs=epochs,
            step=self.step,
            steps=self.steps,
            loss=self.total / self.step if self.step else self.history[-1].loss,
            validation=self.curve[-1] if whole else None,
            best=self.curve[self.best_epoch] if self.best_epoch >= 0 else None,
            seconds=self.seconds,
            left=self.seconds / done * (epochs - done),
            metric=self.task.metric,
            history=tuple(self.history),
        )

    def state(self) -> dict[str, Any]:
        return {
            "model": at_hand(self.model.state_dict()),
            "optimizer": at_hand(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "generator": self.drawn,
            "step": self.step,
            "total": self.total,
            "torch": torch.get_rng_state(),
            **device_draws(self.device),
            "history": [asdict(epoch) for epoch in self.history],
            "signs": at_hand(self.signs),
            "plan": [share.to_json() for share in self.plan],
            "targets": self.targets,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "examples": self.task.examples,
            "content": self.content,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.drawn, self.step, self.total = state["generator"], state.get("step", 0), state.get("total", 0.0)
        torch.set_rng_state(state["torch"])
        draw_on(self.device, state)
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.signs = {name: signs.to(self.device) for name, signs in state["signs"].items()}
        self.best = state["best"]
        self.best_epoch, self.seconds = state["best_epoch"], state["seconds"]

    def epoch(self, pause: Callable[[], object] = lambda: None) -> None:
        """One pass over the training examples, or what is left of it, then validation.

        Args:
            pause: called now and then, at a point from which the run can go on.
        """
        recipe, began = self.config.train, time.monotonic()
        self.model.train()
        batches = self.task.batches(self.generator)
        # What an interrupted run had learned from is drawn once more and let go.
        for k, batch in islice(enumerate(batches), self.step, self.steps):
            batch, hints = batch.to(self.device), None
            if self.teacher is not None:
                with torch.no_grad(), self._products():
                    hints = self.teacher(*batch.inputs).flatten(0, -2)

            def loss(batch: Batch = batch, hints: Tensor | None = hints) -> Tensor:
                return self.loss(batch, hints)

            self.optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            if recipe.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
            self.optimizer.step()
            self.schedule.step()
            self.total += value.item()
            step = len(self.history) * self.steps + k
            self._turn(step, loss)
            self._enter(step + 1)
            self.step = k + 1
            if self.step < self.steps and time.monotonic() - began > EVERY:
                self._check_loss()
                self.seconds += time.monotonic() - began
                pause()
                began = time.monotonic()
        self._check_loss()
        loss_mean, self.step, self.total, self.drawn = self.total / self.steps, 0, 0.0, self.generator.get_state()
        self.judge(loss_mean)
        self.seconds += time.monotonic() - began

    def _check_loss(self) -> None:
        if not math.isfinite(self.total):
            raise RbeError(f"train: the loss of epoch {len(self.history) + 1} is no number; lower [train] lr")

    def judge(self, loss: float) -> None:
        """Validate, and keep the network if none was better."""
        rates = {group["role"]: float(group["lr"]) for group in self.optimizer.param_groups}
        # Only networks that keep to their bytes are candidates.
        fits = not isinstance(self.optimizer, StreamAdam) or self.optimizer.settle()
        if not self.config.train.epochs and isinstance(self.optimizer, StreamAdam):
            fits = self.optimizer.fit() > 0
        if self.config.train.epochs:
            measure_norms(self.model, self.task, len(self.history))
        value = self.task.measure(self.model, "validation")
        self.history.append(Epoch(loss, value, _turned(self.model, self.signs), rates))
        fits = fits and math.isfinite(value) and not self._broken()
        best = self.curve[self.best_epoch]
        if fits and (self.best_epoch < 0 or (value > best if self.task.rises else value < best)):
            self.best_epoch = len(self.history) - 1
            self.best = {name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()}

    def _broken(self) -> bool:
        """Whether a number is none; buffers, such as masks, may have been so from the start."""
        tensors = [*self.model.parameters(), *(b for name, b in self.model.named_buffers() if name in self.finite)]
        return not all(bool(t.isfinite().all()) for t in tensors)

    def loss(self, batch: Batch, hints: Tensor | None) -> Tensor:
        with self._products():
            scores = self.model(*batch.inputs).flatten(0, -2)
        return loss_of(scores, batch.targets.flatten(), hints, self.config.train)

    def _products(self) -> AbstractContextManager[object]:
        """Within it products are of the recipe's dtype."""
        if self.config.train.dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _turn(self, step: int, loss: Callable[[], Tensor]) -> None:
        """Discrete bits, every so many steps."""
        recipe = self.config.train
        last = SETTLED * recipe.epochs * self.steps
        factor = self.phases(step).bits * PowerDecay(start=max(1.0, last / 3), exponent=2.0)(step)
        if step >= last or not factor or not isinstance(self.optimizer, HybridAdam):
            return
        if recipe.flip_every and step % recipe.flip_every == 0:
            temperature = Cooling(recipe.flip_temperature)(len(self.history))
            self.optimizer.flip(loss, share=max(recipe.flip_share * factor, 1e-6), temperature=temperature)
        if recipe.beam_every and step % recipe.beam_every == 0:
            self.optimizer.beam(loss, share=max(recipe.beam_share * factor, 1e-6))

    def _enter(self, step: int) -> None:
        """Learning rates of a step, and signs that are held from it on, where a phase begins or lasts."""
        if self.config.train.phases == "one":
            return
        phase = self.phases(step)
        # A schedule computes every rate anew, so that factors do not pile up.
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate * getattr(phase, "dense" if group["role"] == "scale" else group["role"])
        latents = any(group["role"] == "latent" for group in self.optimizer.param_groups)
        if latents and isinstance(self.optimizer, HybridAdam) and step and phase != self.phases(step - 1):
            self.optimizer.hold(phase.held)


def _signs(model: nn.Module) -> dict[str, Tensor]:
    """The signs of every layer that trains them."""
    latents = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "latent"}
    return {name: p.detach() >= 0 for name, p in latents.items()}


def _turned(model: nn.Module, before: dict[str, Tensor]) -> float | None:
    """Share of the signs that are others now."""
    count = sum(signs.numel() for signs in before.values())
    now = _signs(model)
    return sum(int((now[name] != signs).sum()) for name, signs in before.items()) / count if count else None


def _finish(run: _Run, out: Path, identity: str, build: Build) -> Result:
    """Freeze the best epoch, test it once, and write everything.

    Raises:
        RbeError: there is none to keep.
    """
    if not run.best:
        raise RbeError(
            "train: no epoch left a network of finite numbers; lower [train] lr or name another network to start from, "
            "and give --restart"
        )
    run.model.cpu().load_state_dict(run.best)
    store.freeze(run.model)
    rest_bits = run.config.train.rest_bits
    validation, stored = run.curve[run.best_epoch], None
    if rest_bits < 32:
        stored = round_rest(run.model, rest_bits)
        validation = run.task.measure(run.model, "validation")
    sizes, parts = networks.sizes(run.model, stored), networks.parts(run.model, run.config.seeds, stored)
    planned = store.with_blocks(run.config, {share.name: share.edge for share in run.plan})
    data = store.compact(pack(run.model, 32) if stored is None else stored, planned, build)
    dense = 4 * sizes["weights"]
    rest = sizes["bytes"] - sizes["seed_bytes"]
    result = Result(
        name=run.config.name,
        metric=run.task.metric,
        value=run.task.measure(run.model, "test"),
        validation=validation,
        epoch=run.best_epoch + 1 if run.config.train.epochs else 0,
        weights=sizes["weights"],
        seed_bytes=sizes["seed_bytes"],
        bytes=sizes["bytes"],
        ratio=dense / sizes["seed_bytes"],
        whole_ratio=(dense + rest) / sizes["bytes"],
        seconds=run.seconds,
        curve=tuple(run.curve),
        plan=run.plan,
        parts=parts,
        file_bytes=len(data),
        inputs=run.task.inputs,
    )
    store.keep(out, identity, result, data, run.task.alphabet)
    return result
