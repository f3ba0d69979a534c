"""Peers of seeds at equal bytes: `python -m benchmarks.trained --task mnist --ratio 64`, with RBE_DATA set.

Prints, per method: bytes that stand for the matrices, whole bytes (norms and biases as float16 included), accuracy on
validation and test, seconds. Settings are tuned on validation, the rate once more in whole runs; the test images are
read once, after the last run.
Finished rows are kept in runs/trained and an interrupted table goes on. `--method` may be given several times.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.trained.methods import METHODS, RATIOS, whole_of
from benchmarks.trained.table import FILES, Plan, draw, prepare, row, text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__)
    parser.add_argument("--task", choices=FILES, default="mnist")
    parser.add_argument("--ratio", type=int, choices=RATIOS, default=64)
    parser.add_argument("--method", action="append", choices=METHODS, help="one row; all by default")
    parser.add_argument("--whole", type=int, help="bytes of everything, in place of those of outer128 at the ratio")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--shift", type=int, default=0, help="move training images by up to so many pixels")
    parser.add_argument("--flip", action="store_true", help="mirror half of the training images")
    parser.add_argument("--teacher", type=Path, help="folder of a finished run that teaches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="tune anew in place of taking the committed settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/trained"))
    given = parser.parse_args()
    prepare(given.threads)
    whole = given.whole or whole_of(given.ratio)
    plan = Plan(
        given.task, given.ratio, whole, given.epochs, shift=given.shift, flip=given.flip, teacher=given.teacher,
        seed=given.seed, folder=given.folder,
    )  # fmt: skip

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    done = [row(plan, name, say, given.tune) for name in given.method or METHODS]
    print(text([r for r in done if r is not None]))
    print(f"\n{draw(plan)}")


if __name__ == "__main__":
    main()
