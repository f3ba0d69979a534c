"""The tables of the README, one after the other: `make bench`; those of training, which take days: `make bench-long`.

Each benchmark checks its results before it times them, and can be run alone as `python -m benchmarks.NAME`.
"""

import subprocess
import sys

# Cheap ones first; `peers` needs a library that is not installed here, `multipliers` is the search behind the format.
BENCHMARKS = (
    ["kernels"],
    ["packed"],
    ["outer"],
    ["streams"],
    ["distillation"],
    ["encoder"],
    ["rings"],
    ["search"],
    ["models", "minilm"],
    ["models", "gpt"],
    ["rotations"],
)

# Finished runs are kept in runs/, and an interrupted one goes on.
LONG = (
    ["headline", "--seeds", "0", "1", "2", "--only", "mnist-64-stream", "mnist-256-stream", "mnist-1000", "lenet5-555"],
    ["headline", "--seeds", "0", "1", "2", "--only", "lenet5-1110", "fashion-64-stream", "cifar-mlp-64-stream"],
    ["headline", "--seeds", "0", "1", "2", "--only", "mnist-64", "mnist-256", "lenet5-fc-300"],
    ["headline", "--only", "resnet20-64-stream", "resnet20x4-150-stream", "lstm-180-stream", "multi30k-stream"],
    ["headline", "--only", "gpt-200-stream"],
    ["smaller", "--only", "mnist-64-stream", "fashion-64-stream", "cifar-mlp-64-stream", "lstm-180-stream"],
    ["smaller", "--only", "resnet20-64-stream", "resnet20x4-150-stream", "--share", "0.06"],
    ["smaller", "--only", "gpt-200-stream", "--epochs", "6", "--share", "0.06", "--rate", "0.01"],
    ["smaller", "--only", "gpt-200-stream", "--share", "0.04", "--rate", "0.03"],
    ["frontier", "gpt-200-stream", "--ratios", "50", "100", "200", "--epochs", "6"],
    ["trained", "--ratio", "64", "--whole", "13793"],
    ["trained", "--task", "fashion", "--ratio", "64", "--whole", "14557"],
    # In the whole bytes of the streams above.
    ["trained", "--ratio", "256", "--whole", "3569"],
    ["trained", "--ratio", "1000", "--whole", "932"],
    ["points", "--epochs", "3", "--formats", "outer128"],
    ["bits", "--epochs", "2", "--share", "0.5"],
    ["bits", "--epochs", "2", "--share", "0.05"],
    ["rounds", "--epochs", "12"],
    ["rest"],
)


def main() -> None:
    failed = []
    for command in LONG if sys.argv[1:] == ["--long"] else BENCHMARKS:
        print(f"\n## {' '.join(command)}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]], check=False).returncode:
            failed.append(" ".join(command))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
