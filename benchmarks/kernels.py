"""Products with seed matrices against torch's dense ones, on this processor.

    python -m benchmarks.kernels [--batches 1 4 16 64 256] [--shapes 4096x4096 ...]

Checks every product against float64 first. Then the sides take turns within one run, and large matrices are cycled over
more copies than the last-level cache holds of the dense ones, so that neither side is measured out of a cache that a
model would not have. Medians of wall time.
"""

import argparse
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rbe import kernels
from rbe.formats import SeedSpec, trellis
from rbe.kernels import Prepared, cpu, reference

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1536, 384), (384, 384))
BATCHES = (1, 4, 16, 64, 256)
# Bytes of dense float32 copies to cycle over; above the last-level cache of large servers.
CYCLE = 1500 << 20
# Vector instructions for one vector of windows at 2 bits (extraction, product, sums), the windows in it, and how many
# such instructions a core starts a cycle: 512-bit ones two, 256-bit ones four (AMD since 2017), of which two multiply.
INSTRUCTIONS = {"amx": {"float32": 4.0, "int8": 4.0}, "avx512": {"float32": 9.0, "int8": 6.0}}
INSTRUCTIONS["avx2"] = {"float32": 12.75, "int8": 10.75}
WINDOWS = {"amx": (32, 2), "avx512": (32, 2), "avx2": (16, 4)}
# AMD's AVX-512 starts one multiplication of 512 bits a cycle, and everything else beside it.
INSTRUCTIONS["zen4"], WINDOWS["zen4"] = {"float32": 6.0, "int8": 4.0}, (32, 1)
# A chain of multiplications, three cycles each on every x86-64 core of the last fifteen years.
CHAIN = """
#include <stdio.h>
#include <time.h>
int main(void) {
    unsigned long x = 3, n = 100000000;
    double best = 0;
    for (int k = 0; k < 3; k++) {
        clock_t start = clock();
        for (unsigned long i = 0; i < n; i += 10) {
#define M x *= x; __asm__ volatile("" : "+r"(x));
            M M M M M M M M M M
        }
        double hertz = 3.0 * n * CLOCKS_PER_SEC / (clock() - start);
        if (hertz > best) best = hertz;
    }
    printf("%.0f", best);
    return 0;
}
"""


def random_matrix(shape: tuple[int, int]) -> Prepared:
    spec = SeedSpec("trellis", shape, bits=2, rotation=(3, 5))
    seeds = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, trellis.words(spec)))
    return kernels.prepare(spec, seeds, torch.tensor(0.001), None)


def table_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def table_head(*cells: object) -> None:
    print()
    table_row(*cells)
    table_row(*["---"] * len(cells))


def check() -> None:
    """Every tier on this machine against float64, with the bound that the tests use."""
    matrix = random_matrix((384, 384))
    dense = reference.decode(matrix.spec, *matrix.tensors[:3], torch.float64)
    for name in filter(cpu.tier_available, cpu.FUSED_ROWS):
        cpu.set_tier(name)
        for batch in BATCHES:
            x = torch.randn(batch, 384)
            exact = x.double() @ dense.T
            naive = (reference.seed_matmul(x, matrix.spec, *matrix.tensors[:3]) - exact).abs().max()
            assert (matrix.matmul(x) - exact).abs().max() <= 2 * naive, (name, batch)
            error = float((matrix.matmul(x, "int8") - exact).norm() / exact.norm())
            assert error < 0.012, (name, batch, error)
    cpu.set_tier("")
    print(f"Checked against float64 on every tier; int8 activations: output error {100 * error:.2f} % RMS.")


def medians(sides: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Seconds of each side, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run(k)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare(shape: tuple[int, int], batches: Sequence[int]) -> None:
    rows, columns = shape
    copies = min(64, max(1, -(-CYCLE // (4 * rows * columns)))) if rows * columns > 1 << 20 else 1
    dense = [torch.randn(shape) for _ in range(copies)]
    half = [w.bfloat16() for w in dense]
    seeded = [random_matrix(shape) for _ in range(copies)]
    for batch in batches:
        x = torch.randn(batch, columns)
        narrow = x.bfloat16()

        def linear(k: int, x: Tensor = x) -> Tensor:
            return torch.nn.functional.linear(x, dense[k % copies])

        def linear_half(k: int, x: Tensor = narrow) -> Tensor:
            return torch.nn.functional.linear(x, half[k % copies])

        def exact(k: int, x: Tensor = x) -> Tensor:
            return seeded[k % copies].matmul(x)

        def int8(k: int, x: Tensor = x) -> Tensor:
            return seeded[k % copies].matmul(x, "int8")

        sides = {"float32": linear, "bfloat16": linear_half, "ours": exact, "ours int8": int8}
        t = medians(sides, 200 if rows * columns < 1 << 20 else max(9, min(2 * copies, 60) // (1 + batch // 16)))
        table_row(
            f"{rows}x{columns}",
            batch,
            *(f"{1e3 * seconds:.3f}" for seconds in t.values()),
            f"{t['float32'] / t['ours']:.2f}",
            f"{t['bfloat16'] / t['ours']:.2f}",
            f"{rows * columns / t['ours'] / 1e9 / torch.get_num_threads():.1f}",
        )


def clock() -> float:
    """Hertz, measured; NaN where there is no C compiler or another processor."""
    compiler = shutil.which("cc")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "chain.c"), Path(folder, "chain")
        source.write_text(CHAIN)
        subprocess.run([compiler, "-O1", str(source), "-o", str(program)], check=True)
        return float(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)


def limits() -> None:
    """One thread: weights a second, and how much of the processor and of its memory that is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    block = torch.ones(256 << 20 >> 2)
    stream = 4 * block.numel() / medians({"sum": lambda _: block.sum()}, 7)["sum"]
    shape = (4096, 4096)
    copies = 32
    seeded = [random_matrix(shape) for _ in range(copies)]
    x = torch.randn(1, shape[1])
    hertz, known = clock(), INSTRUCTIONS.get(kernels.tier())
    print(f"\nOne thread, 4096x4096, batch 1, tier {kernels.tier()}, {hertz / 1e9:.2f} GHz;", end=" ")
    print(f"memory streams {stream / 1e9:.1f} GB/s.")
    table_head("activations", "G weights/s", "of the memory stream", "arithmetic bound, G weights/s", "of it")
    for activations in ("float32", "int8"):
        run = medians({"": lambda k, a=activations: seeded[k % copies].matmul(x, a)}, 64)[""]
        rate = shape[0] * shape[1] / run
        share = ["-", "-"]
        if known:
            windows, starts = WINDOWS[kernels.tier()]
            bound = windows * starts * hertz / known[activations]
            share = [f"{bound / 1e9:.1f}", f"{100 * rate / bound:.0f} %"]
        table_row(activations, f"{rate / 1e9:.1f}", f"{100 * rate / 4 / stream:.0f} %", *share)
    torch.set_num_threads(threads)


def overhead() -> None:
    """What an eager call costs over the kernel itself, for small layers at batch 1, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("\nSmall layers, batch 1, one thread, microseconds.")
    table_head("layer", "kernel", "eager call", "overhead", "torch float32")
    for shape in ((384, 384), (1536, 384), (384, 1536)):
        matrix, dense = random_matrix(shape), torch.randn(shape)
        x, y = torch.randn(1, shape[1]), torch.empty(1, shape[0])
        native = cpu.native(matrix.spec, *matrix.tensors[:3])
        sides = {
            "kernel": lambda _, m=native, x=x, y=y: m.matmul(x.data_ptr(), 1, y.data_ptr(), 1, False),
            "eager": lambda _, m=matrix, x=x: m.matmul(x),
            "torch": lambda _, w=dense, x=x: torch.nn.functional.linear(x, w),
        }
        # Not in turns here: the dense matrix would evict the interpreter itself from the cache before our call.
        t = {name: 1e6 * medians({name: run}, 3000)[name] for name, run in sides.items()}
        numbers = (t["kernel"], t["eager"], t["eager"] - t["kernel"], t["torch"])
        table_row(f"{shape[0]}x{shape[1]}", *(f"{n:.1f}" for n in numbers))
    torch.set_num_threads(threads)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    args = parser.parse_args()
    torch.manual_seed(0)
    check()
    print(f"Tier {kernels.tier()}, {torch.get_num_threads()} threads, 2 bits a weight, rotations inside; milliseconds.")
    ratios = ("torch f32 / ours", "torch bf16 / ours", "G weights/s a thread")
    table_head("shape", "batch", "torch f32", "torch bf16", "ours", "ours int8", *ratios)
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        compare((rows, columns), args.batches)
    limits()
    overhead()


if __name__ == "__main__":
    main()
