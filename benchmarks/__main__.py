"""Every table of the README, one after the other: `make bench`.

Each benchmark checks its results before it times them, and can be run alone as `python -m benchmarks.NAME`.
"""

import subprocess
import sys

# Cheap ones first; `peers` needs a library that is not installed here, `multipliers` is the search behind the format.
BENCHMARKS = (
    ["kernels"],
    ["packed"],
    ["outer"],
    ["encoder"],
    ["rings"],
    ["search"],
    ["models", "minilm"],
    ["models", "gpt"],
    ["rotations"],
)


def main() -> None:
    failed = []
    for command in BENCHMARKS:
        print(f"\n## {' '.join(command)}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]], check=False).returncode:
            failed.append(" ".join(command))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
