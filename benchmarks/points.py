"""How points move, compared: tangent plane, geodesics, polar; the same small MNIST run with each.

    RBE_DATA=... python -m benchmarks.points [--epochs 5] [--formats outer128 packed128]

Every method gets every learning rate; the one that is best on validation is tested, once. Prints a table per format.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rbe.optim.motion import METHODS
from rbe.train import load_config, train

CONFIG = Path(__file__).parent.parent / "examples" / "mnist-64.toml"
RATES = (3e-3, 1e-2, 3e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=["outer128", "packed128"])
    args = parser.parse_args()
    base = load_config(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        for format in args.formats:
            print(f"\n{format}, {args.epochs} epochs\n")
            rates = " | ".join(f"validation, rate {rate:g}" for rate in RATES)
            print(f"| method | {rates} | test at the best |\n|---|{'---|' * len(RATES)}---|", flush=True)
            for method in METHODS:
                found = []
                for rate in RATES:
                    # Signs move alike everywhere: only what the points do is compared.
                    recipe = replace(base.train, epochs=args.epochs, method=method, lr=rate, latent_lr=1e-2)
                    config = replace(base, seeds=replace(base.seeds, format=format), train=recipe)
                    found.append(train(config, Path(folder) / f"{format}-{method}-{rate}"))
                best = max(found, key=lambda result: result.validation)
                cells = " | ".join(f"{100 * result.validation:.2f}" for result in found)
                print(f"| {method} | {cells} | {100 * best.accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
