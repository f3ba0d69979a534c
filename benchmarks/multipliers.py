"""Search for the multipliers of the trellis code: smallest ring-closed error on Gaussian blocks, per window and rate.

    python -m benchmarks.multipliers [--windows 16 14 12] [--rates 1 2 3 4 5 6 7 8] [--candidates 1500] [...]

Two families compete: multipliers with equal halves, m * 0x10001, which spare every CPU kernel one 16-bit multiply in
three, and any 32-bit ones. Rounds of growing samples thin the field out; the winners are measured on a sample that no
round has seen, and the best code scale of the winner is fitted there. One JSON line per window and rate.
"""

import argparse
import json
import time

import torch

from rbe.formats import trellis
from rbe.search import viterbi

# Rounds: blocks, share of the field that goes on. The last one leaves the parents of the next generation.
ROUNDS = ((6, 1 / 8), (48, 1 / 4), (384, 1.0))
PARENTS = 3
GENERATIONS = 4
# Multipliers drawn for each that enters the first round.
DRAWN = 10
TEST_BLOCKS = 1024
SEARCH_SEED, TEST_SEED, CANDIDATE_SEED = 1, 2, 3
# Code scales that suit every code well enough to rank them, by rate.
SCALES = {1: 0.72, 2: 0.87, 3: 0.94, 4: 0.985, 5: 1.02, 6: 1.04, 7: 1.07, 8: 1.10}
# Weights on either side of the seam that the open pass walks.
OVERLAP = 96
# As good as the best of the other family, given that the kernels are faster.
TOLERANCE = 1.003

Pair = tuple[int, int]


def gaussian(blocks: int, seed: int) -> torch.Tensor:
    """A row of unit Gaussian blocks."""
    return torch.randn(16, 16 * blocks, generator=torch.Generator().manual_seed(seed))


def centred(multiplier: int, window: int) -> bool:
    """Whether the mean of the code is small: its square adds to the error of every weight."""
    code = trellis.code(torch.arange(1 << window), torch.tensor(multiplier)).double()
    return bool(code.mean().abs() < 0.015 * code.std())


def crowding(pair: Pair, window: int, w: int) -> float:
    """A cheap forecast of a code's error, good to about 2 %: the lower, the better.

    Windows that differ only in the bits about to leave compete for the same future: they should have different codes.
    And neighbours in the stream, which share most of their window, should not be correlated.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.special.ndtri((torch.arange(16) + 0.5) / 16)
    total = 0.0
    for parity in (0, 1):
        leaving = (w * (parity + 2) + 1) // 2 - (w * (parity + 1) + 1) // 2
        here, after = (torch.tensor(m) for m in (pair[parity], pair[1 - parity]))
        group = torch.randint(0, 1 << (window - leaving), (1024, 1), generator=rng)
        codes = trellis.code(group << leaving | torch.arange(1 << leaving), here) * (SCALES[w] / viterbi.CODE_RMS)
        nearest = (x - codes[:, :, None]).square().amin(1).mean().log().item()
        bits = torch.randint(0, 1 << (window + leaving), (1 << 14,), generator=rng)
        two = torch.stack([trellis.code(bits & ((1 << window) - 1), here), trellis.code(bits >> leaving, after)])
        total += nearest + 5 * abs(two.double().corrcoef()[0, 1].item())
    return total


def candidates(restricted: bool, window: int, w: int, count: int) -> list[Pair]:
    """The least crowded of random multipliers with centred codes; one for even and odd t, at odd rates also two."""
    rng = torch.Generator().manual_seed(CANDIDATE_SEED + w + 16 * window)

    def one() -> int:
        factor = 0x10001 if restricted else 1
        return int(torch.randint(1 << 8, 1 << 16 if restricted else 1 << 32, (), generator=rng)) * factor

    drawn = [one() for _ in range(DRAWN * count)]
    pairs = {(m, one() if w % 2 and k % 2 else m) for k, m in enumerate(drawn)}
    least = sorted(pairs, key=lambda pair: (crowding(pair, window, w), pair))
    return [pair for pair in least if all(centred(m, window) for m in pair)][:count]


def score(x: torch.Tensor, pair: Pair, window: int, w: int, threads: int, scale: float | None = None) -> float:
    """Relative squared error with the least-squares scale."""
    unit = (scale or SCALES[w]) / viterbi.CODE_RMS
    found = viterbi.search(x, unit, window, w, reach=OVERLAP, threads=threads, multipliers=pair)
    return found.error


def race(field: list[Pair], window: int, w: int, threads: int) -> list[Pair]:
    """The best few after rounds of growing samples, best first."""
    for blocks, share in ROUNDS:
        x = gaussian(blocks, SEARCH_SEED + blocks)
        field = sorted(field, key=lambda pair: score(x, pair, window, w, threads))
        field = field[: max(PARENTS, round(share * len(field)))]
    return field[:PARENTS]


def neighbours(pair: Pair, restricted: bool, w: int) -> list[Pair]:
    """All pairs with one bit flipped: in both multipliers, and at odd rates in either one."""
    flips = [0x10001 << k for k in range(16)] if restricted else [1 << k for k in range(32)]
    a, b = pair
    found = [(a ^ f, b ^ f) for f in flips]
    if w % 2:
        found += [(a ^ f, b) for f in flips] + [(a, b ^ f) for f in flips]
    return [pair for pair in found if min(pair) > 0]


def climb(field: list[Pair], restricted: bool, window: int, w: int, threads: int) -> Pair:
    """The winner after some generations of neighbours: what makes a code good survives the flip of most single bits."""
    parents = race(field, window, w, threads)
    for _ in range(GENERATIONS):
        children = {child for parent in parents for child in neighbours(parent, restricted, w)} - set(parents)
        least = sorted(children, key=lambda pair: (crowding(pair, window, w), pair))[: len(children) * 2 // 3]
        least = [pair for pair in least if all(centred(m, window) for m in pair)]
        winners = race(parents + least, window, w, threads)
        if winners == parents:
            break
        parents = winners
    return parents[0]


def best_scale(x: torch.Tensor, pair: Pair, window: int, w: int, threads: int) -> float:
    """The code scale, relative to the weights, where the error is smallest (a parabola through five points)."""
    factors = torch.tensor([0.94, 0.97, 1.0, 1.03, 1.06], dtype=torch.float64)
    errors = torch.tensor([score(x, pair, window, w, threads, SCALES[w] * f) for f in factors.tolist()]).double()
    _, b, a = (
        torch.linalg.lstsq(torch.stack([factors**k for k in range(3)], 1), errors[:, None]).solution[:, 0].tolist()
    )
    top = -b / (2 * a) if a > 0 else 1.0
    return round(SCALES[w] * min(max(top, 0.94), 1.06), 3)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 14, 12])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 6, 8, 2, 3, 5, 7, 1])
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--families", nargs="+", default=["halves", "any"], choices=["halves", "any"])
    parser.add_argument(
        "--start", type=lambda v: int(v, 0), nargs="*", default=[], help="multipliers to start from too"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    test = gaussian(TEST_BLOCKS, TEST_SEED)
    for window in args.windows:
        for w in args.rates:
            start = time.perf_counter()
            result = {}
            for family in args.families:
                field = candidates(family == "halves", window, w, args.candidates)
                field += [(m, m) for m in args.start if family == "any" or m >> 16 == m & 0xFFFF]
                winner = climb(field, family == "halves", window, w, args.threads)
                result[family] = (winner, score(test, winner, window, w, args.threads))
            least = min(error for _, error in result.values())
            family = next(f for f in args.families if result[f][1] <= TOLERANCE * least)
            pair = result[family][0]
            line = {
                "window": window,
                "w": w,
                "multipliers": [f"0x{m:08X}" for m in pair],
                "scale": best_scale(test[:, : 16 * 512].contiguous(), pair, window, w, args.threads),
                **{f: {"multipliers": [f"0x{m:08X}" for m in p], "error": round(e, 6)} for f, (p, e) in result.items()},
                "seconds": round(time.perf_counter() - start),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
