"""Search for the multipliers of the trellis code: smallest ring-closed error on Gaussian blocks, per window and rate.

    python -m benchmarks.multipliers [--windows 16 14 12] [--rates 1 ... 8] [--candidates 400] [--threads 1]

Two families compete: multipliers with equal halves, m * 0x10001, which spare every CPU kernel one 16-bit multiply in
three, and any 32-bit ones. Rounds of growing samples thin the field out; the winners are measured on a sample that no
round has seen, and the best code scale of the winner is fitted there. One JSON line per window and rate.
"""

import argparse
import json
import time
from collections.abc import Iterator

import torch

from rbe.formats import trellis
from rbe.search import viterbi

# (blocks, share of the candidates that go on)
ROUNDS = ((12, 1 / 10), (96, 1 / 8), (768, 0.0))
TEST_BLOCKS = 1024
SEARCH_SEED, TEST_SEED, CANDIDATE_SEED = 1, 2, 3
# Code scales that suit every code well enough to rank them, by rate.
SCALES = {1: 0.72, 2: 0.87, 3: 0.94, 4: 0.985, 5: 1.02, 6: 1.04, 7: 1.07, 8: 1.10}
# As good as the best of the other family, given that the kernels are faster.
# Weights on either side of the seam that the open pass walks.
OVERLAP = 96
TOLERANCE = 1.003

Pair = tuple[int, int]


def gaussian(blocks: int, seed: int) -> torch.Tensor:
    """A row of unit Gaussian blocks."""
    return torch.randn(16, 16 * blocks, generator=torch.Generator().manual_seed(seed))


def candidates(restricted: bool, w: int, seed: int) -> Iterator[Pair]:
    """Random multipliers whose codes are centred; the same one for even and odd t, at odd rates also two."""
    rng = torch.Generator().manual_seed(seed)
    every = torch.arange(1 << 16, dtype=torch.int64)

    def one() -> int:
        while True:
            m = int(torch.randint(1 << 8, 1 << 16 if restricted else 1 << 32, (), generator=rng)) * (
                0x10001 if restricted else 1
            )
            code = trellis.code(every, torch.tensor(m)).double()
            if code.mean().abs() < 0.01 * code.std() and code.unique().numel() > 400:
                return m

    while True:
        m = one()
        yield m, m
        if w % 2:
            yield m, one()


def score(x: torch.Tensor, pair: Pair, window: int, w: int, threads: int, scale: float | None = None) -> float:
    """Relative squared error with the least-squares scale."""
    unit = (scale or SCALES[w]) / viterbi.CODE_RMS
    found = viterbi.search(x, unit, window, w, reach=OVERLAP, threads=threads, multipliers=pair)
    return found.error(found.scale)


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
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    test = gaussian(TEST_BLOCKS, TEST_SEED)
    for window in args.windows:
        for w in args.rates:
            start = time.perf_counter()
            result = {}
            for family, count in (("halves", args.candidates), ("any", args.candidates // 3)):
                source = candidates(family == "halves", w, CANDIDATE_SEED + w + 16 * window)
                winner = race([next(source) for _ in range(count)], window, w, args.threads)
                result[family] = (winner, score(test, winner, window, w, args.threads))
            family = "halves" if result["halves"][1] <= TOLERANCE * result["any"][1] else "any"
            pair = result[family][0]
            line = {
                "window": window,
                "w": w,
                "multipliers": [f"0x{m:08X}" for m in pair],
                "scale": best_scale(test[:, : 16 * 512], pair, window, w, args.threads),
                **{name: round(error, 6) for name, (_, error) in result.items()},
                "any_multipliers": [f"0x{m:08X}" for m in result["any"][0]],
                "seconds": round(time.perf_counter() - start),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
