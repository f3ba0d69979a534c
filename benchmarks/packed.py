"""Products with packed64 and packed128 matrices, forward and backward, against torch's dense ones.

    python -m benchmarks.packed

Checks every product and every gradient against float64 first. Then the sides take turns within one run, medians of
several. Dense matrices are cycled over more copies than the last-level cache holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import CYCLE, clock, medians, table_head, table_row
from rbe import kernels
from rbe.formats import make_spec
from rbe.kernels import Tensors, bands, cpu, ops, packed
from rbe.kernels.reference import Definition

SIDE = 4096
BATCHES = (1, 4, 32, 128)
KINDS: dict[str, dict[str, Any]] = {
    "packed64": {"format": "packed64"},
    "packed128 faithful": {"format": "packed128", "mode": "faithful"},
    "packed128 radial": {"format": "packed128", "mode": "radial"},
}
# Generated and multiplied, one thread, batch 1, 10^9 weights a second.
TARGETS = {"packed64": 10, "packed128 faithful": 6, "packed128 radial": 3}
# A backward product, by x and by the seeds, takes at most so many forward ones.
BACKWARD = 2.0
# A dense product takes at least so many of ours.
FORWARD = {1: 1.0, 32: 1 / 1.1}
# Floats of a vector.
LANES = {"amx": 16, "avx512": 16, "zen4": 16, "avx2": 8}


def random_matrix(name: str, side: int) -> packed.Packed:
    spec = make_spec(shape=(side, side), **KINDS[name])
    code = torch.randint(-(2**63), 2**63 - 1, (spec.blocks, 0 if spec.format == "packed64" else 1))
    tensors = Tensors(code, torch.tensor(0.01), None, 0.9 * torch.rand(spec.blocks, 1), torch.rand(spec.blocks, 1) * 6)
    source = ops.source(spec, tensors)
    assert isinstance(source, packed.Packed)
    return source


def backward(source: packed.Packed, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    d_x, gradients = packed.backward(source, x, y, True)
    assert d_x is not None and gradients is not None
    return d_x, *gradients


def check() -> None:
    """Every tier on this machine, at most twice the error of the same computation in plain float32."""
    for name in KINDS:
        source = random_matrix(name, 256)
        exact, naive = (Definition(source.spec, source.tensors, dtype) for dtype in (torch.float64, torch.float32))
        for tier in filter(cpu.tier_available, ("portable", "avx2", "avx512")):
            cpu.set_tier(tier)
            for batch in BATCHES:
                x, y = torch.randn(batch, 256), torch.randn(batch, 256)
                sides = [
                    (bands.matmul(s, a), bands.matmul_transposed(s, b), *bands.gradient(s, a, b)[:2])
                    for s, a, b in ((naive, x, y), (exact, x.double(), y.double()))
                ]
                mine = (packed.matmul(source, x), *backward(source, x, y)[:3])
                for ours, plain, right in zip(mine, *sides, strict=True):
                    allowed = 2 * (plain.double() - right).norm() + 1e-6 * right.norm()
                    assert (ours.double() - right).norm() <= allowed, (name, tier, batch)
    cpu.set_tier("")
    print("Checked against float64 on every tier: products, and derivatives by x, radius and angle.")


def dense_sides(copies: int) -> dict[str, Callable[[int, Tensor, Tensor], object]]:
    weights = [torch.randn(SIDE, SIDE) for _ in range(copies)]

    def forward(k: int, x: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weights[k % copies])

    def back(k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y @ weights[k % copies], y.T @ x

    return {"dense": forward, "dense backward": back}


def judged(value: float, at_least: float = 0.0, at_most: float = float("inf")) -> str:
    """The value, and whether it is what it should be."""
    target = f"at least {at_least:.2g}" if at_least else f"at most {at_most:g}"
    return f"{value:.2f} ({target}: {'met' if at_least <= value <= at_most else 'missed'})"


def compare(threads: int) -> None:
    torch.set_num_threads(threads)
    print(f"\n{SIDE}x{SIDE}, blocks of 16, {threads} thread(s), tier {kernels.tier()}; milliseconds.")
    ratios = ("dense / ours", "dense / ours, backward", "backward / forward", "G weights/s a thread, forward")
    table_head("format", "batch", "dense", "ours", "dense backward", "ours backward", *ratios)
    copies = max(2, min(8, CYCLE // (4 * SIDE * SIDE)))
    dense = dense_sides(copies)
    for name in KINDS:
        sources = [random_matrix(name, SIDE) for _ in range(copies)]
        for batch in BATCHES:
            x, y = torch.randn(batch, SIDE), torch.randn(batch, SIDE)
            # Both of ours follow a dense product, which reads other memory: the dense derivatives, as large as the
            # matrix, would have to leave the caches before anything else comes in.
            sides: dict[str, Callable[[int], object]] = {
                "dense backward": lambda k, x=x, y=y: dense["dense backward"](k, x, y),
                "dense": lambda k, x=x, y=y: dense["dense"](k, x, y),
                "ours": lambda k, x=x, s=sources: packed.matmul(s[k % copies], x),
                "between": lambda k, x=x, y=y: dense["dense"](k + 1, x, y),
                "ours backward": lambda k, x=x, y=y, s=sources: backward(s[k % copies], x, y),
            }
            t = medians(sides, 25)
            shown = ("dense", "ours", "dense backward", "ours backward")
            table_row(
                name,
                batch,
                *(f"{1e3 * t[side]:.2f}" for side in shown),
                judged(t["dense"] / t["ours"], at_least=FORWARD[batch])
                if batch in FORWARD
                else f"{t['dense'] / t['ours']:.2f}",
                f"{t['dense backward'] / t['ours backward']:.2f}",
                judged(t["ours backward"] / t["ours"], at_most=BACKWARD),
                f"{SIDE * SIDE / t['ours'] / 1e9 / threads:.1f}",
            )


def warm(threads: int) -> None:
    """Backward against forward on one matrix over and over, with nothing in between that empties the caches."""
    torch.set_num_threads(threads)
    print(f"\nThe same matrix again and again, {threads} thread(s): backward / forward by batch.")
    table_head("format", *map(str, BATCHES))
    for name in KINDS:
        source, cells = random_matrix(name, SIDE), []
        for batch in BATCHES:
            x, y = torch.randn(batch, SIDE), torch.randn(batch, SIDE)
            sides: dict[str, Callable[[int], object]] = {
                "forward": lambda _, x=x, s=source: packed.matmul(s, x),
                "backward": lambda _, x=x, y=y, s=source: backward(s, x, y),
            }
            t = medians(sides, 51)
            cells.append(judged(t["backward"] / t["forward"], at_most=BACKWARD))
        table_row(name, *cells)


def limits() -> None:
    """One thread, batch 1 and 32: rates, targets, and the share of what the vector ports can do."""
    torch.set_num_threads(1)
    lanes = LANES.get(kernels.tier(), 4)
    print(f"\nOne thread. A multiply-add handles {lanes} weights of a dense product; two can start a cycle.")
    table_head("format", "G weights/s, batch 1", "of two dense multiply-adds a cycle, batch 32", "decode, G weights/s")
    for name, target in TARGETS.items():
        source = random_matrix(name, SIDE)
        one, many, out = torch.randn(1, SIDE), torch.randn(32, SIDE), torch.empty(SIDE, SIDE)
        sides: dict[str, Callable[[int], object]] = {
            "one": lambda _, s=source, x=one: packed.matmul(s, x),
            "many": lambda _, s=source, x=many: packed.matmul(s, x),
            "decode": lambda _, s=source, w=out: s.native.decode(0, SIDE, w.data_ptr(), 1),
        }
        t = medians(sides, 25)
        share = 32 * SIDE * SIDE / lanes / 2 / t["many"] / clock()
        rates = [SIDE * SIDE / t[side] / 1e9 for side in ("one", "decode")]
        table_row(name, judged(rates[0], at_least=target), f"{100 * share:.0f} %", f"{rates[1]:.1f}")


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    check()
    compare(1)
    warm(1)
    if threads > 1:
        compare(threads)
        warm(threads)
    limits()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
