"""What the rest of a trained network, all that is no seed, costs in bytes and accuracy when it is rounded.

    RBE_DATA=... python -m benchmarks.rest [--only mnist-64]

Trains the example if it is not in runs/ yet. The test split is read once a row: four roundings of one network.
"""

import argparse
import copy

from benchmarks.headline import EXAMPLES, FORMS, run
from benchmarks.kernels import table_head, table_row
from rbe.nn import fold_norms, round_rest
from rbe.train import load, load_config
from rbe.train.networks import sizes
from rbe.train.run import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rest", description=__doc__)
    parser.add_argument("--only", default="mnist-64", help="an example without rest_bits")
    name = parser.parse_args().only
    config = load_config(EXAMPLES / f"{name}.toml")
    result, task = run(name, 0, None), TASKS[config.data.task](config)
    trained, (factor, decimals) = load(EXAMPLES.parent / "runs" / name), FORMS[result.metric]
    table_head("rest", "bytes of everything", "validation", "test")
    for rest in ("float32, norms as they are", "norms folded", "16 bits", "8 bits"):
        model, stored = copy.deepcopy(trained), None
        if rest == "norms folded":
            fold_norms(model)
        elif rest.endswith("bits"):
            stored = round_rest(model, int(rest.split()[0]))
        values = [f"{factor * task.measure(model, split):.{decimals}f}" for split in ("validation", "test")]
        table_row(rest, f"{sizes(model, stored)['bytes']:,}", *values)


if __name__ == "__main__":
    main()
