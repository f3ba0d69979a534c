"""Products with seed matrices against torch's dense ones, on this processor.

    python -m benchmarks.kernels

Checks every product against float64 first. Then the sides take turns within one run, and large matrices are cycled over
more copies than the last-level cache holds of the dense ones, so that neither side is measured out of a cache that a
model would not have. Medians of wall time.
"""

import statistics
import time
from collections.abc import Callable
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
# 512-bit instructions on the two vector ports for 32 weights at 2 bits: extraction, product and, without tiles, sums.
INSTRUCTIONS = {"amx": {"float32": 4, "int8": 4}, "avx512": {"float32": 9, "int8": 6}}


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
    for name in filter(cpu.tier_available, ("portable", "avx2", "avx512", "amx")):
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


def compare(shape: tuple[int, int]) -> None:
    rows, columns = shape
    copies = min(64, max(1, -(-CYCLE // (4 * rows * columns)))) if rows * columns > 1 << 20 else 1
    dense = [torch.randn(shape) for _ in range(copies)]
    half = [w.bfloat16() for w in dense]
    seeded = [random_matrix(shape) for _ in range(copies)]
    for batch in BATCHES:
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
    """Hertz, as the system reports it; NaN where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return 1e6 * max(float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz"))
    except (OSError, ValueError):
        return float("nan")


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
    print(f"\nOne thread, 4096x4096, batch 1, tier {kernels.tier()}; memory streams {stream / 1e9:.1f} GB/s.")
    table_head("activations", "G weights/s", "of the memory stream", "of two 512-bit instructions a cycle")
    for activations in ("float32", "int8"):
        run = medians({"": lambda k, a=activations: seeded[k % copies].matmul(x, a)}, 64)[""]
        rate = shape[0] * shape[1] / run
        known = INSTRUCTIONS.get(kernels.tier())
        share = f"{100 * rate * known[activations] / 32 / 2 / clock():.0f} %" if known else "-"
        table_row(activations, f"{rate / 1e9:.1f}", f"{100 * rate / 4 / stream:.0f} %", share)
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
    torch.manual_seed(0)
    check()
    print(f"Tier {kernels.tier()}, {torch.get_num_threads()} threads, 2 bits a weight, rotations inside; milliseconds.")
    ratios = ("torch f32 / ours", "torch bf16 / ours", "G weights/s a thread")
    table_head("shape", "batch", "torch f32", "torch bf16", "ours", "ours int8", *ratios)
    for shape in SHAPES:
        compare(shape)
    limits()
    overhead()


if __name__ == "__main__":
    main()
