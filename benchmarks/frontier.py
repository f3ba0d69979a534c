"""Bytes against the metric: one example in streams, trained at several ratios with everything else alike.

    RBE_DATA=... python -m benchmarks.frontier gpt-200-stream --ratios 25 50 100 200 --epochs 6

Prints a row a ratio and draws them beside the dense network. Runs are kept in runs/frontier and go on where they were
interrupted; the test split is read once a run, at its end.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.headline import EXAMPLES, FORMS, ROWS, run, say
from rbe.errors import RbeError
from rbe.train import Result, load_config, train
from rbe.train.networks import dense
from rbe.train.planting import matrices

FOLDER = EXAMPLES.parent / "runs" / "frontier"

# Nearer than this the example itself is the point.
SAME = 0.01


def point(name: str, ratio: float, epochs: int) -> Result:
    """The example with its streams at a ratio to float32.

    Raises:
        RbeError: not all of its matrices share one number of bytes.
    """
    base = load_config(EXAMPLES / f"{name}.toml")
    weights = sum(m.weight.numel() for m in matrices(dense(base)))
    if any(layer.format or layer.bytes for layer in base.seeds.layer) or not base.seeds.streamed:
        raise RbeError(f"frontier: {name} divides its bytes among groups; give an example that is streams alone")
    label = f"{name} at {ratio:g} of {epochs} epochs"
    nbytes = int(4 * weights / ratio)
    if abs(nbytes / base.seeds.bytes - 1) < SAME and epochs <= base.train.epochs:
        return run(name, 0, epochs)
    seeds = replace(base.seeds, bytes=nbytes)
    config = replace(base, name=label, seeds=seeds, train=replace(base.train, epochs=epochs))
    return train(config, FOLDER / label, say(label))


def draw(path: Path, name: str, points: Sequence[Result], reference: Result) -> None:
    """The metric against seed bytes."""
    from matplotlib.figure import Figure

    factor = FORMS[reference.metric][0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*sorted((r.seed_bytes, factor * r.value) for r in points), strict=True), "o-", label="streams")
    axes.axhline(factor * reference.value, color="k", linestyle="--", label=f"dense, {reference.seed_bytes:,} bytes")
    axes.set(xscale="log", xlabel="seed bytes", ylabel=f"{reference.metric} on test", title=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("name", choices=[row.seeds for row in ROWS if row.seeds.endswith("-stream")])
    parser.add_argument("--ratios", type=float, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--epochs", type=int, help="of every run; those of the example by default")
    args = parser.parse_args()
    row = next(row for row in ROWS if row.seeds == args.name)
    epochs = args.epochs or load_config(EXAMPLES / f"{args.name}.toml").train.epochs
    reference = run(row.dense, 0, None)
    factor, decimals = FORMS[reference.metric]
    print("| asked | seed bytes | whole bytes | ratio | validation | test | dense | change |")
    print("|---|---|---|---|---|---|---|---|")
    points = []
    for ratio in args.ratios:
        one = point(args.name, ratio, epochs)
        points.append(one)
        values = (f"{factor * v:.{decimals}f}" for v in (one.validation, one.value, reference.value))
        change = 100 * (one.value / reference.value - 1)
        print(
            f"| {ratio:g}:1 | {one.seed_bytes:,} | {one.bytes:,} | {one.ratio:.0f}:1 | {' | '.join(values)} "
            f"| {change:+.1f} % |",
            flush=True,
        )
    path = FOLDER / f"{args.name} of {epochs} epochs.png"
    draw(path, args.name, points, reference)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
