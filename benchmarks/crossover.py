"""From how many rows of x on is it better to decode bands of the matrix and call the platform's GEMM?

    python -m benchmarks.crossover

The answer, tier by tier, is `FUSED_ROWS` in rbe/kernels/cpu.py. One thread, its own processor time.
"""

import statistics
import time
from collections.abc import Callable

import torch

from rbe import kernels
from rbe.formats import SeedSpec, trellis
from rbe.kernels import cpu

SIDE = 2048
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 128)


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(1e3 * (time.thread_time() - start))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    spec = SeedSpec("trellis", (SIDE, SIDE), bits=2)
    seeds = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, trellis.words(spec)))
    matrix = kernels.prepare(spec, seeds, torch.tensor(0.01), None)
    dense = matrix.matmul(torch.eye(SIDE)).T.contiguous()
    print(f"Milliseconds, {SIDE}x{SIDE} at 2 bits, one thread: fused / by bands\n")
    tiers = [name for name in cpu.FUSED_ROWS if cpu.tier_available(name)]
    print("| rows of x | torch float32 |", " | ".join(tiers), "|\n|---|---|" + "---|" * len(tiers))
    for batch in BATCHES:
        x = torch.randn(batch, SIDE)
        cells = [f"{milliseconds(lambda x=x: torch.nn.functional.linear(x, dense)):.2f}"]
        for name in tiers:
            cpu.set_tier(name)
            kept, products, times = cpu.FUSED_ROWS[name], [], []
            for limit in (1 << 30, 0):
                cpu.FUSED_ROWS[name] = limit
                products.append(matrix.matmul(x))
                times.append(milliseconds(lambda x=x: matrix.matmul(x)))
            cpu.FUSED_ROWS[name] = kept
            assert torch.allclose(*products, rtol=1e-4, atol=1e-2)
            cells.append(f"{times[0]:.2f} / {times[1]:.2f}")
        print(f"| {batch} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
