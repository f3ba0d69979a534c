"""Encoder: error and speed on Gaussian weights, beside the Shannon bound and the best scalar quantiser.

    python -m benchmarks.encoder [--size 1024] [--bits 1 2 3 4] [--efforts fast balanced best] [--threads N]

Every row is checked: the reported error must be the error of the decoded matrix. Speed counts the whole call (rotation,
scale search, search) in seconds of processor time, all threads together: weights per second and core, whatever else
runs on the machine; the best of `--repeats`.
"""

import argparse
import math
import time

import torch

from rbe.formats import trellis
from rbe.search.viterbi import EFFORTS, default_threads, encode_trellis

# Lloyd-Max quantisers of the unit Gaussian with 2, 4, 8 and 16 levels (Max 1960).
LLOYD_MAX = {1.0: 0.3634, 2.0: 0.1175, 3.0: 0.03454, 4.0: 0.009497}


def row(W: torch.Tensor, bits: float, effort: str, threads: int, repeats: int) -> str:
    """One line of the table."""
    seconds = math.inf
    for _ in range(repeats):
        start = time.process_time()
        result = encode_trellis(W, bits=bits, effort=effort, threads=threads)
        seconds = min(seconds, time.process_time() - start)
    decoded = (result.matrix.decode().double() - W.double()).square().sum().item() / W.double().square().sum().item()
    if not math.isclose(decoded, result.error, rel_tol=1e-4):
        raise SystemExit(f"{bits:g} bits, {effort}: the decoded error is {decoded}, but {result.error} was reported")
    rate = 8 * result.matrix.seeds.nbytes / W.numel()
    gap = rate + 0.5 * math.log2(result.error)
    scalar = f"{LLOYD_MAX[bits]:.4f}" if bits in LLOYD_MAX else "-"
    speed = W.numel() / seconds
    errors = f"{result.error:.5f} | {2 ** (-2 * rate):.5f} | {scalar} | {gap:.3f}"
    return f"| {bits:g} | {effort} | {errors} | {speed / 1e3:,.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="the matrix is size x size")
    parser.add_argument("--bits", type=float, nargs="+", default=list(trellis.BITS))
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=list(EFFORTS))
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    W = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0))
    print(f"Relative squared error, {args.size}x{args.size} Gaussian weights; {args.threads} threads.\n")
    print("| bits | effort | error | Shannon bound | Lloyd-Max | gap, bits | thousand weights/s/core |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        for effort in args.efforts:
            print(row(W, bits, effort, args.threads, args.repeats), flush=True)


if __name__ == "__main__":
    main()
