"""What `rbe train` does."""

from pathlib import Path

from rbe.cli import show
from rbe.train import Progress, load_config
from rbe.train import train as run


def train(config: Path, output: Path | None, restart: bool, as_json: bool) -> None:
    """`rbe train`."""
    settings = load_config(config)
    folder = output or Path("runs") / settings.name
    console = show.err()

    def tell(p: Progress) -> None:
        console.print(
            f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.4f}  validation {100 * p.validation:.2f} %  "
            f"best {100 * p.best:.2f} %  {show.short(p.seconds)}, {show.short(p.left)} left"
        )

    result = run(settings, folder, tell, restart)
    if as_json:
        show.machine({**result.to_json(), "folder": folder})
        return
    rows = [
        ["test accuracy", f"{100 * result.accuracy:.2f} %", f"epoch {result.epoch}, best on validation"],
        ["validation", f"{100 * result.validation:.2f} %", ""],
        ["seeds", f"{result.seed_bytes:,} bytes", f"{result.ratio:.1f}:1 against float32"],
        ["whole model", f"{result.bytes:,} bytes", f"{result.whole_ratio:.1f}:1; scales, biases and norms counted"],
        ["time", show.short(result.seconds), str(folder)],
    ]
    show.table(settings.name, ["", "", ""], rows, left=(0, 2))
