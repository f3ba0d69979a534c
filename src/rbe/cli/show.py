"""What the commands print: tables and progress for people, one JSON object for machines."""

import json
import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rbe.profile import size


def out() -> Console:
    """Standard output. Tables are never cut: a pipe gets as much width as they need."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """One line of results for people; nothing in it is markup."""
    out().print(escape(text), soft_wrap=True)


def machine(value: dict[str, Any]) -> None:
    """One JSON object on standard output. Infinities and NaN, which JSON has not, become null."""
    # Escapes and not letters: a path may hold what the stream's encoding does not.
    sys.stdout.write(json.dumps(_plain(value), default=str) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """A table; columns are numbers, right-aligned, except those in `left`."""
    shown = Table(title=escape(title) or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for k, name in enumerate(columns):
        # Long module names fold instead of pushing the figures off a narrow terminal.
        shown.add_column(escape(name), justify="left" if k in left else "right", overflow="fold", no_wrap=k not in left)
    for row in rows:
        shown.add_row(*map(escape, row))
    out().print(shown)


def short(seconds: float) -> str:
    """A time as people read it.

    >>> short(0.00042), short(0.5), short(75), short(4000)
    ('0.42 ms', '500 ms', '1 min 15 s', '1 h 06 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


class Steps:
    """Progress on standard error: a bar with rate and time left on a terminal, now and then a plain line elsewhere.

    Args:
        what: the work.
        unit: what is counted.
        silent: show nothing (machines).
        every: seconds between plain lines.
    """

    def __init__(self, what: str, unit: str, silent: bool = False, every: float = 15.0) -> None:
        self.what, self.unit, self.every = what, unit, every
        console = Console(stderr=True)
        self.live = console.is_terminal and not silent
        self.plain = not self.live and not silent
        self.start = self.said = time.monotonic()
        self.first: float | None = None
        self.task: TaskID | None = None
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", style="cyan", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not self.live,
            expand=True,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, done: float, total: float, name: str = "") -> None:
        """Say that `done` of `total` units are done, the present one being `name`."""
        if self.first is None:
            # What was done before this run (resumed work) says nothing about its rate.
            self.first, self.start = done, time.monotonic()
        now = time.monotonic()
        rate = (done - self.first) / (now - self.start) if now > self.start and done > self.first else 0.0
        said = f"{count(rate)} {self.unit}/s" if rate else ""
        if self.live:
            if self.task is None:
                self.task = self.bar.add_task(self.what, total=total, rate=said)
            about = f"{self.what} {name}".strip()
            self.bar.update(self.task, completed=done, total=total, description=_clip(about, 44), rate=said)
        elif self.plain and now - self.said >= self.every and total:
            self.said = now
            left = f", {short((total - done) / rate)} left" if rate else ""
            print(
                f"{self.what}: {100 * done / total:.0f} %, {said or 'starting'}{left}" + (f" ({name})" if name else ""),
                file=sys.stderr,
                flush=True,
            )

    def say(self, what: str, name: str = "") -> None:
        """Name another stage, of unknown length."""
        if self.live and self.task is not None:
            self.bar.update(self.task, description=_clip(f"{what} {name}".strip(), 44), rate="")


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def count(value: float) -> str:
    """A count as people read it.

    >>> count(950), count(61_500), count(22_713_216)
    ('950', '61.5 k', '22.7 M')
    """
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value:.3g}"


__all__ = ["Steps", "count", "err", "line", "machine", "out", "short", "size", "table"]
