"""The table of trained networks: every task, its dense network and its seeds, beside what the papers claim.

    RBE_DATA=... python -m benchmarks.headline [--only mnist-64-stream ...] [--seeds 0 1 2] [--epochs 20]

Runs the configurations of examples/, dense networks that teach others (those of seed 0) first. Runs are kept in runs/,
as those of `rbe train` are, and go on where they were interrupted: all of them take days of two cores. The test split
is read once a run, at its end.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rbe.train import Config, Progress, Result, load_config, train

EXAMPLES = Path(__file__).parent.parent / "examples"
# How a metric is read: factor and decimals.
FORMS = {"accuracy": (100.0, 2), "bits_per_character": (1.0, 4), "bleu": (1.0, 2), "perplexity": (1.0, 2)}


@dataclass(frozen=True)
class Row:
    """A line of the table: configurations of seeds and of the dense network, what the papers claim, what we aim for."""

    task: str
    seeds: str
    dense: str
    claim: str
    target: str
    met: Callable[[float, float], bool]


def points(most: float) -> tuple[str, Callable[[float, float], bool]]:
    """At most so many points of accuracy below the dense network."""
    return f"dense - {most:g} points", lambda own, dense: 100 * own >= 100 * dense - most


def least(value: float) -> tuple[str, Callable[[float, float], bool]]:
    """So much accuracy, in percent."""
    return f"at least {value:g} %", lambda own, _: 100 * own >= value


def more(percent: float) -> tuple[str, Callable[[float, float], bool]]:
    """At most so many percent above the dense network, where less is better."""
    return f"dense + {percent:g} %", lambda own, dense: own <= dense * (1 + percent / 100)


def fewer(percent: float) -> tuple[str, Callable[[float, float], bool]]:
    """At most so many percent below the dense network."""
    return f"dense - {percent:g} %", lambda own, dense: own >= dense * (1 - percent / 100)


ROWS = (
    Row("MNIST 784-256-128-10, 64:1", "mnist-64-stream", "mnist-dense", "-1.4 points", *points(0.1)),
    Row("MNIST 784-256-128-10, 64:1", "mnist-64", "mnist-dense", "-1.4 points", *points(0.1)),
    Row("the same, 256:1", "mnist-256-stream", "mnist-dense", "", *least(97)),
    Row("the same, 256:1", "mnist-256", "mnist-dense", "", *least(97)),
    Row("the same, 1000:1", "mnist-1000", "mnist-dense", "", *least(94)),
    Row("MNIST, LeNet-5, 555:1", "lenet5-555", "lenet5-dense", "", *least(99.3)),
    Row("MNIST, LeNet-5, 1110:1", "lenet5-1110", "lenet5-dense", "", *least(99)),
    Row("Fashion-MNIST, 64:1", "fashion-64-stream", "fashion-dense", "", *points(0.5)),
    Row("CIFAR-10, ResNet-20, 64:1", "resnet20-64-stream", "resnet20-dense", "-2.5 points", *points(2.5)),
    Row("CIFAR-10, ResNet-20 x 4, 150:1", "resnet20x4-150-stream", "resnet20x4-dense", "-2.3 points", *points(1)),
    Row("CIFAR-10, 3072-256-128-10, 64:1", "cifar-mlp-64-stream", "cifar-mlp-dense", "-2.5 points", *points(0.5)),
    Row("LeNet-5, its 500-unit layer, 300:1", "lenet5-fc-300", "lenet5-dense", "-1.8 points", *points(0.2)),
    Row("tiny-shakespeare, LSTM, 180:1", "lstm-180-stream", "lstm-dense", "-2.9 %", *more(2.9)),
    Row("Multi30k, Transformer, 200:1 and 250:1", "multi30k-stream", "multi30k-dense", "-3.2 %, -1.2 %", *fewer(1.2)),
    Row("WikiText-2, language model, 200:1", "gpt-200-stream", "gpt-dense", "+4.4 %", *more(4.4)),
)


def say(name: str) -> Callable[[Progress], None]:
    def tell(p: Progress) -> None:
        best = "none" if p.best is None else f"{p.best:.4f}"
        at = f"epoch {p.epoch + p.step / p.steps:.2f}/{p.epochs}"
        line = f"{name}: {at}, loss {p.loss:.4f}, best {best}, {p.left / 60:.0f} min left"
        print(line, file=sys.stderr, flush=True)

    return tell


def run(name: str, seed: int, epochs: int | None) -> Result:
    """The run of an example, from where it stands; those that it starts from or learns from come first."""
    config = load_config(EXAMPLES / f"{name}.toml")
    for needed in dict.fromkeys((config.model.start, config.train.teacher)):
        if needed and (EXAMPLES / needed).resolve().parent == (EXAMPLES / "../runs").resolve():
            run(Path(needed).name, 0, None)
    folder = EXAMPLES.parent / "runs" / (name if seed == 0 else f"{name}-{seed}")
    recipe = replace(config.train, seed=seed)
    if epochs is not None and epochs < recipe.epochs:
        recipe, folder = replace(recipe, epochs=epochs), folder.with_name(f"{folder.name}-of-{epochs}")
    shorter: Config = replace(config, train=recipe)
    return train(shorter, folder, say(folder.name))


def line(row: Row, results: Sequence[Result], dense: Sequence[Result]) -> str:
    factor, decimals = FORMS[dense[0].metric]

    def shown_of(some: Sequence[Result]) -> str:
        values = [f"{factor * r.value:.{decimals}f}" for r in some]
        mean = f"{factor * statistics.mean(r.value for r in some):.{decimals}f}"
        return mean + (f" ({', '.join(values)})" if len(values) > 1 else "")

    means = [statistics.mean(r.value for r in some) for some in (results, dense)]
    # Of several runs the largest.
    largest = max(results, key=lambda r: r.bytes)
    of_seeds = [part for part in largest.parts if part.format != "dense"]
    mixed = len(largest.parts) > 1 and of_seeds
    shown = [(part.bytes, part.ratio) for part in of_seeds] if mixed else [(largest.seed_bytes, largest.ratio)]
    cells = (
        f"{row.task} (`{row.seeds}`)",
        " + ".join(f"{size:,}" for size, _ in shown),
        f"{largest.bytes:,}",
        ", ".join(f"{ratio:.0f}:1" for _, ratio in shown),
        shown_of(results),
        shown_of(dense),
        row.claim,
        f"{row.target}: {'met' if row.met(*means) else 'missed'}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[row.seeds for row in ROWS], help="rows; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of runs, of the dense networks too")
    parser.add_argument("--epochs", type=int, help="at most so many for the networks in seeds, in runs of their own")
    args = parser.parse_args()
    print("| task | seed bytes | whole bytes | ratio | ours | dense | the papers claim | target |")
    print("|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if args.only and row.seeds not in args.only:
            continue
        dense = [run(row.dense, seed, None) for seed in args.seeds]
        print(line(row, [run(row.seeds, seed, args.epochs) for seed in args.seeds], dense), flush=True)


if __name__ == "__main__":
    main()
