"""Rows of the table: tune on validation, train, store, count, and read the test split once."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.trained.methods import HOST, METHODS, Method, Task, whole_of
from benchmarks.trained.stored import store, weight_bytes, whole_bytes
from rbe.train import Config, Progress, data, load, train
from rbe.train.config import Data, Model, Recipe, Seeds
from rbe.train.reading import find
from rbe.train.run import accuracy

FILES = {"mnist": "mnist/mnist.npz", "fashion": "fashion_mnist/fashion_mnist.npz"}
HELD = 5000
BATCH = 256
RECIPES = Path(__file__).with_name("recipes.json")


@dataclass(frozen=True)
class Plan:
    """What a table is about.

    Attributes:
        task, ratio: MNIST or Fashion-MNIST; of the host's weights to the seeds.
        whole: bytes that every network may fill.
        epochs, tune_epochs: of a run, and of a run that only tunes.
        shift, flip: pixels by which training images move; whether half of them are mirrored.
        teacher: folder of a finished run whose outputs are learned too.
        seed: of random numbers.
        folder: where runs are kept.
    """

    task: str
    ratio: int
    whole: int
    epochs: int = 40
    tune_epochs: int = 5
    shift: int = 0
    flip: bool = False
    teacher: Path | None = None
    seed: int = 0
    folder: Path = Path("runs/trained")

    @property
    def options(self) -> str:
        """In the names of folders and rows."""
        parts = [f"{self.whole} bytes"] if self.whole != whole_of(self.ratio) else []
        parts += [f"shift {self.shift}"] if self.shift else []
        parts += ["mirrored"] if self.flip else []
        parts += [f"taught by {self.teacher.name}"] if self.teacher else []
        parts += [f"seed {self.seed}"] if self.seed else []
        return ", ".join(parts)

    @property
    def place(self) -> Path:
        """Folder of this table."""
        return self.folder / " ".join(filter(None, [f"{self.task}-{self.ratio}", self.options]))


@dataclass(frozen=True)
class Row:
    """A method's result.

    Attributes:
        weight_bytes, bytes: of what stands for the matrices; of everything stored.
        validation, test: accuracy of the stored network, in [0, 1].
        seconds: of the final run.
        settings: that were chosen.
    """

    task: str
    ratio: int
    options: str
    method: str
    weight_bytes: int
    bytes: int
    validation: float
    test: float
    seconds: float
    settings: dict[str, Any]


def untested(plan: Plan) -> Path:
    """The training file without its test images, so that no run can read them: those held back stand in their place."""
    path = plan.folder / f"{plan.task}-untested.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with np.load(find(_tested(plan), _tested(plan).data.path)) as file:
            x, y = file["x_train"], file["y_train"]
        # Two tables may be made at once.
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, x_train=x, y_train=y, x_test=x[-HELD:], y_test=y[-HELD:])
        part.replace(path)
    return path.resolve()


def _tested(plan: Plan) -> Config:
    return Config("test", Data(path=FILES[plan.task], validation=HELD))


def configuration(plan: Plan, name: str, recipe: dict[str, Any], epochs: int, seeds: Seeds) -> Config:
    fixed = {"epochs": epochs, "batch": BATCH, "seed": plan.seed}
    model = Model(kind="mlp", widths=HOST, norm="batch")
    about = Data(path=str(untested(plan)), validation=HELD, shift=plan.shift, flip=plan.flip)
    return Config(name, about, model, seeds, Recipe(**{**fixed, **recipe}))


def run(
    plan: Plan, name: str, settings: dict[str, Any], epochs: int, say: Callable[[str], None]
) -> tuple[Path, Callable[[Config], nn.Module], float, float]:
    """Train a method with these settings, or find the finished run: folder, builder, validation, seconds."""
    method = METHODS[name]
    label = " ".join([name, *(f"{key} {value}" for key, value in settings.items()), f"{epochs} epochs"])
    recipe: dict[str, Any] = {**method.recipe, "lr": settings["lr"]}
    if plan.teacher is not None:
        recipe["teacher"] = str(plan.teacher.resolve())
    images = _train_images(plan)
    task = Task(plan.whole, plan.ratio, epochs * (images // BATCH))

    def build(_: Config) -> nn.Module:
        return method.build(task, **{key: value for key, value in settings.items() if key != "lr"})

    out = plan.place / label

    def tell(p: Progress) -> None:
        if p.epoch % 5 == 0 and p.validation is not None:
            say(f"{label}: {p.epoch}, validation {100 * p.validation:.2f} %, {p.left:.0f} s left")

    result = train(configuration(plan, label, recipe, epochs, method.seeds(task)), out, tell, build=build)
    return out, build, result.validation, result.seconds


def _train_images(plan: Plan) -> int:
    with np.load(untested(plan)) as file:
        return len(file["y_train"]) - HELD


def tune(plan: Plan, name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Settings that are best on validation: one after the other, each from the best of those before."""
    grid = METHODS[name].grid
    best = {key: values[0] for key, values in grid.items()}
    reached = _reached(plan, name, best, say)
    for key, values in grid.items():
        for value in values[1:]:
            other = {**best, key: value}
            validation = _reached(plan, name, other, say)
            if validation > reached:
                best, reached = other, validation
    say(f"{name}: tuned to {best} ({100 * reached:.2f} %)")
    return best


def _reached(plan: Plan, name: str, settings: dict[str, Any], say: Callable[[str], None]) -> float:
    """Validation accuracy of a short run; below any where nothing so small can be made."""
    try:
        return run(plan, name, settings, plan.tune_epochs, say)[2]
    except ValueError:
        return -1.0


def known(plan: Plan, name: str) -> dict[str, Any] | None:
    """The committed settings: tuned on MNIST at this ratio, else at the nearest."""
    recipes = json.loads(RECIPES.read_text()) if RECIPES.is_file() else {}
    ratios = sorted((int(ratio) for ratio in recipes if name in recipes[ratio]), key=lambda r: abs(r - plan.ratio))
    return recipes[str(ratios[0])][name] if ratios else None


def row(plan: Plan, name: str, say: Callable[[str], None], again: bool = False) -> Row | None:
    """A finished row, from the folder where it is there; None where the method makes nothing so small.

    Args:
        again: tune anew in place of taking the committed settings.
    """
    path = plan.place / f"{name}.json"
    if path.is_file() and not again:
        return Row(**json.loads(path.read_text()))
    settings = (None if again else known(plan, name)) or tune(plan, name, say)
    # Short runs may favour a rate that whole ones do not bear.
    rates = METHODS[name].grid["lr"]
    try:
        tried = [({**settings, "lr": lr}, *run(plan, name, {**settings, "lr": lr}, plan.epochs, say)) for lr in rates]
    except ValueError as cause:
        say(f"{name}: {cause}")
        return None
    settings, out, build, _, seconds = max(tried, key=lambda one: one[3])
    model = store(load(out, build))  # type: ignore[arg-type]
    images = data.load(_tested(plan))
    done = Row(
        plan.task,
        plan.ratio,
        plan.options,
        name,
        weight_bytes(model),
        whole_bytes(model),
        accuracy(model, *images.validation),
        accuracy(model, *images.test),
        seconds,
        settings,
    )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(done.__dict__, indent=1) + "\n")
    part.replace(path)
    return done


def rows(plan: Plan) -> list[Row]:
    """Every finished row of a task with the options of a plan, at all ratios."""
    found = [Row(**json.loads(p.read_text())) for p in sorted(plan.folder.glob(f"{plan.task}-*/*.json")) if _is_row(p)]
    return [row for row in found if row.options == plan.options]


def _is_row(path: Path) -> bool:
    return path.stem in METHODS


def draw(plan: Plan) -> Path:
    """Accuracy on the test split against whole bytes, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = rows(plan)
    for name in METHODS:
        points = sorted((r.bytes, 100 * r.test) for r in found if r.method == name)
        if points:
            style = "k-" if name in ("outer128", "stream") else "-" if name.startswith("dense") else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name)
    axes.set(xscale="log", xlabel="bytes, everything counted", ylabel="test accuracy, %", title=plan.task)
    axes.legend(fontsize=8)
    path = plan.folder / (" ".join(filter(None, [plan.task, plan.options])) + ".png")
    figure.savefig(path, dpi=120)
    return path


def text(found: list[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| method | settings | weight bytes | whole bytes | validation, % | test, % | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        settings = ", ".join(f"{key} {value:g}" for key, value in r.settings.items())
        lines.append(
            f"| {r.method} | {settings} | {r.weight_bytes:,} | {r.bytes:,} | {100 * r.validation:.2f} "
            f"| {100 * r.test:.2f} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def prepare(threads: int) -> None:
    """One number of threads for every method: seconds are then comparable."""
    torch.set_num_threads(threads)


__all__ = ["FILES", "Method", "Plan", "Row", "draw", "prepare", "row", "rows", "run", "text", "tune"]
