"""What `rbe train` does."""

import json
from collections.abc import Sequence
from pathlib import Path

from rbe.cli import show
from rbe.errors import RbeError
from rbe.train import Config, Progress, Result, Share, load_config
from rbe.train import train as run
from rbe.train.run import RESULT

PAGE = "report.html"
# Sentences that a teacher translates between two lines of progress.
TOLD_EVERY = 5000
# How a metric is read by people: factor, decimals, unit.
_FORMS = {
    "accuracy": (100.0, 2, " %"),
    "bits_per_character": (1.0, 4, " bits"),
    "bleu": (1.0, 2, " BLEU"),
    "perplexity": (1.0, 2, ""),
}


def train(config: Path, output: Path | None, restart: bool, as_json: bool, device: str = "cpu") -> None:
    """`rbe train`."""
    settings = load_config(config)
    folder = output or Path("runs") / settings.name
    console = show.err()
    page = _Page(settings, folder)

    def tell(p: Progress) -> None:
        where = f"epoch {p.epoch + 1}/{p.epochs}, step {p.step}/{p.steps}" if p.step else f"epoch {p.epoch}/{p.epochs}"
        reached = "" if p.step else f"validation {_shown(p.metric, p.validation)}  "
        console.print(
            f"{where}  loss {p.loss:.4f}  {reached}best {_shown(p.metric, p.best)}  {show.short(p.seconds)}, "
            f"{show.short(p.left)} left"
        )
        complaint = page.update(p)
        if complaint:
            console.print(complaint)

    def planned(shares: tuple[Share, ...]) -> None:
        if not as_json:
            show.table("plan", ["matrix", "shape", "block", "bytes", "sensitivity", "forecast loss"], _rows(shares))

    lines = 0

    def told(done: int, every: int) -> None:
        nonlocal lines
        if done == every or done // TOLD_EVERY > lines:
            lines += 1
            console.print(f"the teacher has translated {done:,} of {every:,} sentences to train on")

    before = not restart and (folder / RESULT).exists()
    result = run(settings, folder, tell, restart, planned=planned, told=told, device=device)
    if before and page.last is None:
        console.print(f"{folder} holds this run, finished before; nothing was trained now (--restart trains it anew)")
    complaint = page.finish(result)
    if complaint:
        console.print(complaint)
    if as_json:
        show.machine({**result.to_json(), "folder": folder})
        return
    show.table(settings.name, ["", "", ""], _results(result, folder), left=(0, 2))


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "none yet"
    factor, decimals, unit = _FORMS[metric]
    return f"{factor * value:.{decimals}f}{unit}"


def _rows(shares: Sequence[Share]) -> list[list[str]]:
    return [
        [s.name, f"{s.rows}x{s.columns}", str(s.edge), f"{s.bytes:,}", f"{s.sensitivity:.2e}", f"{s.loss:.2e}"]
        for s in shares
    ]


def _results(result: Result, folder: Path) -> list[list[str]]:
    metric, mixed = result.metric.replace("_", " "), any(part.format == "dense" for part in result.parts)
    parts = [
        [
            f"{part.format} {part.pattern}".strip(),
            f"{part.bytes:,} bytes",
            f"{part.ratio:.1f}:1 of {part.weights:,} weights",
        ]
        for part in result.parts
    ]
    return [
        [f"test {metric}", _shown(result.metric, result.value), f"epoch {result.epoch}, best on validation"],
        ["validation", _shown(result.metric, result.validation), ""],
        [
            "matrices, dense ones too" if mixed else "seeds",
            f"{result.seed_bytes:,} bytes",
            f"{result.ratio:.1f}:1 against float32",
        ],
        *(parts if len(parts) > 1 else ()),
        ["whole model", f"{result.bytes:,} bytes", f"{result.whole_ratio:.1f}:1; scales, biases and norms counted"],
        *([["model.rbe", f"{result.file_bytes:,} bytes", "the file"]] if result.file_bytes else ()),
        ["time", show.short(result.seconds), str(folder)],
    ]


class _Page:
    """The report of a run, written anew with every line of progress."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.path, self.gave_up = config, folder / PAGE, False
        self.last: Progress | None = None

    def finish(self, result: Result) -> str:
        """Write it once more, the outcome on top; a run that was finished before has its page already."""
        if self.last is None:
            return ""
        cards = [
            (_shown(result.metric, result.value), f"test {result.metric.replace('_', ' ')}"),
            (f"{result.seed_bytes:,}", "bytes of matrices"),
            (f"{result.ratio:.1f}:1", "matrices against float32"),
            (f"{result.bytes:,}", "bytes of the whole model"),
        ]
        return self.update(self.last, cards)

    def update(self, p: Progress, outcome: Sequence[tuple[str, str]] = ()) -> str:
        """Write it; what keeps it from being written is said once, and stops no run."""
        self.last = p
        if self.gave_up:
            return ""
        from rbe import report

        roles = list(dict.fromkeys(role for epoch in p.history for role in epoch.rates))
        factor, _, unit = _FORMS[p.metric]
        metric = f"validation {p.metric.replace('_', ' ')}{f' ({unit.strip()})' if unit.strip() == '%' else ''}"
        turned = [None if epoch.turned is None else 100 * epoch.turned for epoch in p.history]
        plots = [
            report.Curves("loss", {"training": [epoch.loss for epoch in p.history]}),
            report.Curves(metric, {"validation": [factor * epoch.validation for epoch in p.history]}),
            report.Curves("signs that have turned (%)", {"turned": turned}),
            report.Curves("learning rates", {role: [e.rates.get(role) for e in p.history] for role in roles}, log=True),
        ]
        cards = [
            *outcome,
            (_shown(p.metric, p.best), "best on validation"),
            (f"{p.epoch} / {p.epochs}", f"epochs, {p.step} of {p.steps} steps" if p.step else "epochs"),
            (show.short(p.seconds), f"{show.short(p.left)} left"),
        ]
        facts = [(key, json.dumps(part)) for key, part in self.config.to_json().items()]
        try:
            page = report.render_training(self.config.name, cards, plots, facts, live=not outcome)
            self.path.write_text(page, encoding="utf-8")
        except (RbeError, OSError) as cause:
            self.gave_up = True
            return f"no {PAGE}: {cause}"
        return ""
