"""stream: products of frozen streams against torch's dense ones: linear layers and convolutions.

    python -m benchmarks.streams

Checks against float64 first, on every tier. Then the sides take turns within one run, medians of several. Matrices are
cycled over more copies than the last-level cache holds, as far as the streams' need no gigabytes for it.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels import CYCLE, clock, medians, table_head, table_row
from rbe import kernels
from rbe.kernels import cpu, stream
from rbe.kernels.sparse import Sparse

SIDE = 4096
BATCHES = (1, 4, 32, 256)
RATIOS = (64, 256)
# (channels, side of the image, images).
IMAGES = ((16, 32, 1), (16, 32, 100), (64, 8, 1), (64, 8, 100), (256, 8, 1), (256, 8, 100))
COPIES = 32


def levels(rows: int, columns: int, ratio: float) -> Tensor:
    """Rounded Gaussians, so many of them 0 that their stream is the ratio smaller than float32."""
    low, high = 0.05, 1.0
    sample = torch.randn(256, 1024)
    for _ in range(12):
        spread = (low + high) / 2
        size = len(stream.pack((sample * spread).round().to(torch.int16)))
        low, high = (spread, high) if 4 * sample.numel() / size > ratio else (low, spread)
    return (torch.randn(rows, columns) * low).round().to(torch.int16)


def check() -> None:
    """Every tier on this machine, at most twice the error of the dense product in float32."""
    some = levels(320, 576, 64)
    bias, weight = torch.randint(-3, 4, (320,)), some.view(320, 64, 3, 3)
    matrix = Sparse(some, bias)
    for tier in filter(cpu.tier_available, ("portable", "avx2", "avx512")):
        cpu.set_tier(tier)
        for batch in BATCHES:
            x, images = torch.randn(batch, 576), torch.randn(batch, 64, 9, 9)
            for ours, dense in (
                (matrix.matmul(x, 0.1), lambda t, x=x: functional.linear(x.to(t), some.to(t), bias.to(t)) * 0.1),
                (
                    matrix.conv2d(images, 0.1, (3, 3), (2, 2), (1, 1)),
                    lambda t, x=images: functional.conv2d(x.to(t), weight.to(t), bias.to(t), 2, 1) * 0.1,
                ),
            ):
                exact = dense(torch.float64)
                allowed = 2 * (dense(torch.float32).double() - exact).norm() + 1e-6 * exact.norm()
                assert (ours.double() - exact).norm() <= allowed, (tier, batch)
    cpu.set_tier("")
    print("Checked against float64 on every tier: linear layers and convolutions.")


def linear(threads: int) -> None:
    """Products of all batches."""
    torch.set_num_threads(threads)
    dense = [torch.randn(SIDE, SIDE) for _ in range(max(2, min(8, CYCLE // (4 * SIDE * SIDE))))]
    for ratio in RATIOS:
        made = Sparse(levels(SIDE, SIDE, ratio))
        ours = [copy.deepcopy(made) for _ in range(COPIES)]
        print(
            f"\n{SIDE}x{SIDE} at {ratio}:1, {100 * made.density:.1f} % not 0, {made.nbytes / 1e6:.1f} MB in memory; "
            f"{threads} thread(s), tier {kernels.tier()}; milliseconds."
        )
        table_head("rows of x", "torch float32", "stream", "dense / ours", "additions a cycle and thread")
        for batch in BATCHES:
            x = torch.randn(batch, SIDE)
            sides: dict[str, Callable[[int], object]] = {
                "dense": lambda k, x=x: functional.linear(x, dense[k % len(dense)]),
                "ours": lambda k, x=x, ours=ours: ours[k % COPIES].matmul(x, 0.1),
            }
            t = medians(sides, 33 if batch <= 4 else 9)
            rate = made.entries * batch / t["ours"] / clock() / threads
            times = (f"{1e3 * seconds:.3f}" for seconds in t.values())
            table_row(batch, *times, f"{t['dense'] / t['ours']:.1f}", f"{rate:.2f}")


def convolutions(threads: int) -> None:
    """3x3 kernels at 64:1, channels to as many channels."""
    torch.set_num_threads(threads)
    print(f"\n3x3 convolutions at 64:1, {threads} thread(s); milliseconds. Dense is the faster of both layouts.")
    table_head("channels", "image", "images", "torch float32", "stream", "dense / ours", "additions a cycle and thread")
    for channels, side, images in IMAGES:
        matrix = Sparse(levels(channels, 9 * channels, 64))
        weight, x = torch.randn(channels, channels, 3, 3), torch.randn(images, channels, side, side)
        last = x.contiguous(memory_format=torch.channels_last)
        sides: dict[str, Callable[[int], object]] = {
            "first": lambda _, x=x, weight=weight: functional.conv2d(x, weight, None, 1, 1),
            "last": lambda _, x=last, weight=weight: functional.conv2d(x, weight, None, 1, 1),
            "ours": lambda _, x=x, matrix=matrix: matrix.conv2d(x, 0.1, (3, 3), (1, 1), (1, 1)),
        }
        t = medians(sides, 33 if images == 1 else 9)
        dense = min(t["first"], t["last"])
        rate = matrix.entries * images * side * side / t["ours"] / clock() / threads
        times = f"{1e3 * dense:.3f}", f"{1e3 * t['ours']:.3f}"
        table_row(channels, f"{side}x{side}", images, *times, f"{dense / t['ours']:.1f}", f"{rate:.1f}")


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        check()
        for threads in (1, 2):
            linear(threads)
        convolutions(2)
    print(
        "\nThe limit of a thread is one vector of additions a cycle: 16 with AVX-512, 8 with AVX2; one of up to six "
        "rows of x, whose numbers lie apart."
    )


if __name__ == "__main__":
    main()
