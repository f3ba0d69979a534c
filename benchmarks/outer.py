"""outer128: products of the 64:1 network against torch's dense ones, and a training step against the dense step.

    python -m benchmarks.outer

Checks products and derivatives against float64 first, on every tier. Then the sides take turns within one run, medians
of several. Dense matrices, and seeds, are cycled over more copies than the last-level cache holds.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.kernels import CYCLE, clock, medians, table_head, table_row
from rbe import kernels
from rbe.formats import SeedSpec, make_spec, outer128
from rbe.kernels import Prepared, Tensors, bands, cpu, outer_cpu
from rbe.kernels.reference import Definition
from rbe.nn import Linear, StreamLinear
from rbe.optim import HybridAdam, StreamAdam
from rbe.optim.stream import price
from rbe.profile import memory

SIDE = 4096
BATCHES = (1, 4, 32, 256)
BLOCKS = (8, 16, 32, 64)
SEED_COPIES = 64  # 64 MB of seeds at 64:1
WIDTHS = (784, 1024, 1024, 10)
LARGE = (1024, 4096, 4096, 10)  # where matrices outweigh libraries and activations
LEAST_SPEEDUP, MOST_STEP = 5.0, 2.5  # the targets: batch 1, and training
SETUP = """
torch.set_num_threads(1)
torch.manual_seed(0)
kind, sides = arguments["kind"], arguments["sides"]
make = {
    "dense": nn.Linear,
    "outer128": lambda i, o: seeds.Linear(i, o, format="outer128"),
    "streams": seeds.StreamLinear,
}[kind]
model = nn.Sequential(*(part for i, o in zip(sides, sides[1:]) for part in (make(i, o), nn.ReLU())))
optimizer = {
    "dense": lambda: torch.optim.Adam(model.parameters(), lr=1e-3),
    "outer128": lambda: optim.HybridAdam(model, lr=1e-3),
    "streams": lambda: optim.StreamAdam(model, bytes=1_300_000, steps=10_000, lr=1e-3),
}[kind]()
x, y = torch.randn(256, sides[0]), torch.randint(0, sides[-1], (256,))

def step():
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
"""


def random_tensors(side: int, block: int) -> tuple[SeedSpec, Tensors]:
    spec = make_spec("outer128", (side, side), block=block)
    code = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, 1))
    radius, angle = 0.9 * torch.rand(spec.blocks, 1), 6 * torch.rand(spec.blocks, 1)
    return spec, Tensors(code, torch.tensor(0.01), None, radius, angle)


def random_matrix(side: int, block: int) -> Prepared:
    spec, (code, scale, _, radius, angle, _, _) = random_tensors(side, block)
    assert radius is not None and angle is not None
    return kernels.prepare(spec, outer128.join(code, radius, angle, spec), scale, None)


def check() -> None:
    """Every tier on this machine, at most twice the error of the same computation in plain float32."""
    for block in BLOCKS:
        spec, tensors = random_tensors(320, block)
        exact, naive = (Definition(spec, tensors, dtype) for dtype in (torch.float64, torch.float32))
        dense = exact.band(0, spec.grid[0])
        for tier in filter(cpu.tier_available, ("portable", "avx2", "avx512")):
            cpu.set_tier(tier)
            mine = outer_cpu.Outer(spec, tensors)
            for batch in BATCHES:
                x, y = torch.randn(batch, spec.shape[1]), torch.randn(batch, spec.shape[0])
                plain = naive.band(0, spec.grid[0])
                d_x, _, _ = outer_cpu.backward(mine, None, y, True)
                assert d_x is not None
                for ours, other, right in (
                    (outer_cpu.matmul(mine, x), x @ plain.T, x.double() @ dense.T),
                    (d_x, y @ plain, y.double() @ dense),
                ):
                    allowed = 2 * (other.double() - right).norm() + 1e-6 * right.norm()
                    assert (ours.double() - right).norm() <= allowed, (block, tier, batch)
    cpu.set_tier("")
    print("Checked against float64 on every tier and in every block: products, and transposed products.")


def compare(threads: int) -> float:
    """Times of all batches; returns how many times faster the product is at batch 1."""
    torch.set_num_threads(threads)
    print(f"\n{SIDE}x{SIDE}, blocks of 16 (64:1), {threads} thread(s), tier {kernels.tier()}; milliseconds.")
    table_head("batch", "torch float32", "outer128", "dense / ours", "G weights/s a thread", "target")
    copies = max(2, min(8, CYCLE // (4 * SIDE * SIDE)))
    dense = [torch.randn(SIDE, SIDE) for _ in range(copies)]
    seeded = [random_matrix(SIDE, 16) for _ in range(SEED_COPIES)]
    first = 0.0
    for batch in BATCHES:
        x = torch.randn(batch, SIDE)
        sides: dict[str, Callable[[int], object]] = {
            "dense": lambda k, x=x: nn.functional.linear(x, dense[k % copies]),
            "ours": lambda k, x=x: seeded[k % SEED_COPIES].matmul(x),
        }
        t = medians(sides, 65 if batch <= 4 else 9)
        ratio, least = t["dense"] / t["ours"], LEAST_SPEEDUP if batch == 1 else 1.0
        first = first or ratio
        met = f"{least:.0f}: {'met' if ratio >= least else 'NOT met'}"
        rate = SIDE * SIDE * batch / t["ours"] / 1e9 / threads
        table_row(batch, *(f"{1e3 * seconds:.3f}" for seconds in t.values()), f"{ratio:.1f}", f"{rate:.1f}", met)
    return first


def ratios() -> None:
    """Every block edge at batch 1 and 256, one thread."""
    torch.set_num_threads(1)
    print(f"\n{SIDE}x{SIDE}, one thread; milliseconds, and nanoseconds a block and row of x.")
    table_head(
        "block", "ratio", "batch 1", "batch 256", "ns a block, batch 1", "ns a block and row, batch 256", "decode"
    )
    for block in BLOCKS:
        matrix = random_matrix(SIDE, block)
        one, many = torch.randn(1, SIDE), torch.randn(256, SIDE)
        sides: dict[str, Callable[[int], object]] = {
            "one": lambda _, m=matrix, x=one: m.matmul(x),
            "many": lambda _, m=matrix, x=many: m.matmul(x),
            "decode": lambda _, m=matrix: m.decode(),
        }
        t = medians(sides, 5)
        blocks = matrix.spec.blocks
        times = (
            1e3 * t["one"],
            1e3 * t["many"],
            1e9 * t["one"] / blocks,
            1e9 * t["many"] / 256 / blocks,
            1e3 * t["decode"],
        )
        table_row(block, f"{block * block / 4:.0f}:1", *(f"{v:.2f}" for v in times))


def limits() -> None:
    """One thread: the share of the memory's stream, and of two additions of eight floats a cycle."""
    torch.set_num_threads(1)
    block = torch.ones(256 << 20 >> 2)
    stream = 4 * block.numel() / medians({"sum": lambda _: block.sum()}, 7)["sum"]
    seeded = [random_matrix(SIDE, 16) for _ in range(SEED_COPIES)]
    one, many = torch.randn(1, SIDE), torch.randn(256, SIDE)
    blocks = seeded[0].spec.blocks
    t = medians({"one": lambda k: seeded[k % SEED_COPIES].matmul(one), "many": lambda k: seeded[0].matmul(many)}, 9)
    read = 16 * blocks / t["one"]
    print(f"\nOne thread; memory streams {stream / 1e9:.1f} GB/s, {clock() / 1e9:.2f} GHz.")
    share = 100 * read / stream
    print(f"Batch 1 reads seeds at {read / 1e9:.2f} GB/s, {share:.0f} % of the stream: arithmetic limits it.")
    # 64 additions or subtractions of a number a block and row of x: eight vectors, two a cycle.
    for name, rows in (("one", 1), ("many", 256)):
        cycles = t[name] * clock() / blocks / rows
        about = f"{cycles:.1f} cycles a block and row of x; its eight vectors of additions take 4"
        print(f"Batch {rows}: {about}: {400 / cycles:.0f} %.")


def network(make: Callable[[int, int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(WIDTHS):
        layers += [make(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def training(threads: int) -> float:
    """A step of each network, its parts, and the bytes that it takes; returns the slower of ours over dense."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, wanted = torch.randn(256, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (256,))
    models = {
        "dense": network(nn.Linear),
        "ours": network(lambda i, o: Linear(i, o, format="outer128")),
        "streams": network(lambda i, o: StreamLinear(i, o)),
    }
    weights = sum(a * b for a, b in itertools.pairwise(WIDTHS))
    optimizers: dict[str, torch.optim.Optimizer] = {
        "dense": torch.optim.Adam(models["dense"].parameters(), lr=1e-3),
        "ours": HybridAdam(models["ours"], lr=1e-3),
        "streams": StreamAdam(models["streams"], bytes=weights // 16, steps=10_000, lr=1e-3),
    }

    def loss(name: str) -> Tensor:
        return nn.functional.cross_entropy(models[name](x), wanted)

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        loss(name).backward()
        optimizers[name].step()

    sides: dict[str, Callable[[int], object]] = {}
    for name in models:
        sides |= {
            f"{name} forward": lambda _, n=name: loss(n),
            f"{name} forward and backward": lambda _, n=name: loss(n).backward(),
            f"{name} optimizer": lambda _, n=name: optimizers[n].step(),
            f"{name} step": lambda _, n=name: step(n),
        }
    latents = [layer.latent for layer in models["streams"] if isinstance(layer, StreamLinear)]
    sides["prices"] = lambda _: [price(latent) for latent in latents]
    sides["packing"] = lambda _: [layer.pack() for layer in models["streams"] if isinstance(layer, StreamLinear)]
    with torch.enable_grad():
        t = {name: 1e3 * seconds for name, seconds in medians(sides, 15).items()}
    # A median does not see what every tenth step does, and every fiftieth of the last 60 % of a run.
    for part in ("optimizer", "step"):
        t[f"streams {part}"] += t["prices"] / 10 + 0.6 * t["packing"] / 50
    print(f"\n{'-'.join(map(str, WIDTHS))}, batch 256, {threads} thread(s); milliseconds.")
    table_head("", "dense, Adam", "outer128, HybridAdam", "ours / dense", "streams, StreamAdam", "streams / dense")
    for part in ("forward", "forward and backward", "optimizer", "step"):
        dense, ours, streams = (t[f"{name} {part}"] for name in models)
        table_row(
            part, f"{dense:.2f}", f"{ours:.2f}", f"{ours / dense:.2f}", f"{streams:.2f}", f"{streams / dense:.2f}"
        )
    if threads == 1:
        memories()
    held = {name: sum(4 * p.numel() for p in model.parameters()) for name, model in models.items()}
    print(
        f"Held while training, parameters, gradients and two moments: dense {4 * held['dense'] / 1e6:.1f} MB, ours "
        f"{4 * held['ours'] / 1e6:.1f} MB (64 latent float32 a seed). A backward pass adds one band of the dense "
        f"gradient, at most {4 * bands.TILE / 1e6:.1f} MB at a time, and no dense weight. Streams "
        f"{(4 * held['streams'] + 4 * weights) / 1e6:.1f} MB, the price of every weight included; a backward pass adds "
        f"the rounded matrices and their gradients, {8 * weights / 1e6:.1f} MB."
    )
    return max(t[f"{name} step"] for name in ("ours", "streams")) / t["dense step"]


def memories() -> None:
    """The peak of a process that trains, over what it had before there was a model."""
    imports = "import torch, rbe; from torch import nn; from rbe import nn as seeds, optim"
    weights = sum(a * b for a, b in itertools.pairwise(LARGE))
    print(f"\n{'-'.join(map(str, LARGE))}, batch 256, four steps in a process of its own: peak of resident memory.")
    table_head("", "MB", "bytes a weight")
    for kind in ("dense, Adam", "outer128, HybridAdam", "streams, StreamAdam"):
        found = memory(imports, SETUP, "[step() for _ in range(4)]", {"kind": kind.split(",")[0], "sides": LARGE})
        table_row(kind, f"{found.model / 1e6:.0f}", f"{found.model / weights:.1f}")


@torch.inference_mode()
def products(threads: int) -> float:
    check()
    compare(1)
    fastest = compare(threads)
    ratios()
    limits()
    return fastest


def main() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    fastest = products(threads)
    step = training(threads)
    torch.set_num_threads(threads)
    met = ["NOT met", "met"]
    print(
        f"\nBatch 1 at {SIDE}x{SIDE}: {fastest:.1f} times faster than dense float32; target {LEAST_SPEEDUP:.0f}: "
        f"{met[fastest >= LEAST_SPEEDUP]}."
    )
    print(
        f"Training step, the slower of ours: {step:.2f} times the dense step; target {MOST_STEP}: "
        f"{met[step <= MOST_STEP]}."
    )


if __name__ == "__main__":
    main()
