"""How near the encoder comes to the best that its code can do: `python -m benchmarks.rings [--bits 1 2 3 4]`.

Whoever finds a ring has found a path that walks through it as often as one likes, at the same cost each round. So the
cheapest path of K rounds, which need not close, costs at most K times the best ring: no encoder of this code can do
better than 1 / K of it. The bound is sharper as the growth from round to round, which settles after two or three: it is
then the mean cost of the cheapest cycle, whatever its length. Exact search over all states, so for a few blocks only.
"""

import argparse

import torch
from torch import Tensor

from rbe.formats import trellis
from rbe.search.viterbi import CODE_RMS, EFFORTS, SCALES, search

WINDOW = 16


def rounds_cost(stream: Tensor, w: int, rounds: int) -> Tensor:
    """Cost of the cheapest open path after each round, float64 (rounds,), of targets (blocks, 256) in code units."""
    table = trellis.code_table(WINDOW, w).float()
    blocks = len(stream)
    # New bits enter at the top of the window: ceil(w (t + 1) / 2) - ceil(w t / 2) of them at weight t.
    ends = [-(-w * t // 2) for t in range(trellis.WEIGHTS + 1)]
    cost = torch.zeros(blocks, 1 << WINDOW)  # of the windows before
    offset = torch.zeros(blocks, dtype=torch.float64)
    marks = []
    for _ in range(rounds):
        for t in range(trellis.WEIGHTS):
            b = ends[t + 1] - ends[t]
            if b:
                # Windows that share all but their oldest b bits lead to the same ones.
                best = cost.view(blocks, 1 << (WINDOW - b), 1 << b).amin(2)
                cost = best.repeat(1, 1 << b)
            cost = cost + (stream[:, t, None] - table[t & 1]).square_()
            least = cost.amin(1)
            cost -= least[:, None]
            offset += least.double()
        marks.append(offset.sum())
    return torch.stack(marks)


def main() -> None:
    """Print one row a rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    x = torch.randn(16, 16 * args.blocks, generator=torch.Generator().manual_seed(7))
    energy = float(x.double().square().sum())
    stream = x.reshape(16, args.blocks, 16).permute(1, 2, 0).reshape(args.blocks, trellis.WEIGHTS)
    print(f"Relative squared error at one fixed scale, {args.blocks} Gaussian blocks, {args.rounds} rounds.\n")
    print("| bits | encoder, best | 256 starts | cheapest cycle | best above it | open path / rounds |")
    print("|---|---|---|---|---|---|")
    for bits in args.bits:
        w = trellis.rate(bits)
        unit = SCALES[WINDOW][w - 1] / CODE_RMS
        chosen = EFFORTS["best"]
        options = {"reach": chosen.reach(WINDOW, w), "threads": None}
        found, many = (
            search(x, unit, WINDOW, w, starts=starts, **options).residual(unit) / energy
            for starts in (chosen.starts(w), 256)
        )
        costs = rounds_cost(stream / unit, w, args.rounds) * unit**2 / energy
        # Two rounds together: some cheapest cycles are two rounds long.
        cycle = float(costs[-1] - costs[-3]) / 2
        above = 100 * (found / cycle - 1)
        print(f"| {bits:g} | {found:.6f} | {many:.6f} | {cycle:.6f} | {above:.2f} % | {costs[-1] / args.rounds:.6f} |")


if __name__ == "__main__":
    main()
