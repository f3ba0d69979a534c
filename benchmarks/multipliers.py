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

# (blocks, share of the candidates that go on)
ROUNDS = ((6, 1 / 10), (24, 1 / 6), (192, 1 / 5), (768, 0.0))
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
    """The least crowded of random multipliers; one for even and odd t, at odd rates also two."""
    rng = torch.Generator().manual_seed(CANDIDATE_SEED + w + 16 * window)

    def one() -> int:
        factor = 0x10001 if restricted else 1
        return int(torch.randint(1 << 8, 1 << 16 if restricted else 1 << 32, (), generator=rng)) * factor

    drawn = [one() for _ in range(DRAWN * count)]
    pairs = {(m, one() if w % 2 and k % 2 else m) for k, m in enumerate(drawn)}
    return sorted(pairs, key=lambda pair: (crowding(pair, window, w), pair))[:count]


def score(x: torch.Tensor, pair: Pair, window: int, w: int, threads: int, scale: float | None = None) -> float:
    """Relative squared error with the least-squares scale."""
    unit = (scale or SCALES[w]) / viterbi.CODE_RMS
    found = viterbi.search(x, unit, window, w, reach=OVERLAP, threads=threads, multipliers=pair)
    return found.error


def race(field: list[Pair], window: int, w: int, threads: int) -> Pair:
    """The winner of rounds of growing samples."""
    for blocks, share in ROUNDS:
        x = gaussian(blocks, SEARCH_SEED + blocks)
        field = sorted(field, key=lambda pair: score(x, pair, window, w, threads))
        field = field[: max(1, round(share * len(field)))]
    return field[0]


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
    parser.add_argument("--candidates", type=int, default=600)
    parser.add_argument("--families", nargs="+", default=["halves", "any"], choices=["halves", "any"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    test = gaussian(TEST_BLOCKS, TEST_SEED)
    for window in args.windows:
        for w in args.rates:
            start = time.perf_counter()
            result = {}
            for family in args.families:
                field = candidates(family == "halves", window, w, args.candidates)
                winner = race(field, window, w, args.threads)
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
