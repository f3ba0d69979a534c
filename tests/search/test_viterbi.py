"""The C++ search against a plain Viterbi in numpy, and its laws."""

import signal

import numpy as np
import pytest
import torch

from rbe import _cpu
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis
from rbe.search.viterbi import CODE_RMS, SCALES, Found, default_threads, search

WINDOW = 12


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(w: int, window: int = WINDOW) -> float:
    return SCALES[window][w - 1] / CODE_RMS


def plain_pass(x: np.ndarray, codes: np.ndarray, w: int, first: int, seam: int) -> tuple[dict[int, int], float]:
    """States of the 256 weights from `first` on, by the textbook recursion over all states; seam -1 is open."""
    states = codes.shape[1]
    every = np.arange(states)
    cost = np.zeros(states, np.float32) if seam < 0 else np.where(every == seam, 0, np.inf).astype(np.float32)
    back = []
    for i in range(256):
        t = (first + i) % 256
        b = -(-w * (t + 1) // 2) - -(-w * t // 2)
        # All predecessors of state s: its older bits moved up by b, any b bits below.
        before = ((every & (states - 1 >> b)) << b)[:, None] | np.arange(1 << b)
        winner = cost[before].argmin(1)
        back.append(before[every, winner])
        cost = cost[back[-1]] + np.square(x[t] - codes[t % 2]).astype(np.float32)
    state = int(cost.argmin()) if seam < 0 else seam
    total = float(cost[state])
    path = {}
    for i in reversed(range(256)):
        path[(first + i) % 256] = state
        state = int(back[i][state])
    return path, total


def plain_search(x: np.ndarray, w: int, window: int) -> tuple[list[int], float]:
    codes = trellis.code_table(window, w).numpy().astype(np.float32)
    open_path, _ = plain_pass(x, codes, w, 128, -1)
    path, total = plain_pass(x, codes, w, 0, open_path[255])
    return [path[t] for t in range(256)], total


@pytest.mark.parametrize("w", range(1, 9))
def test_search_equals_a_plain_viterbi(w: int) -> None:
    x = gaussian(16, 16, seed=w)
    found = search(x, unit(w), WINDOW, w)
    stream = (x.T.reshape(-1) / torch.tensor(unit(w), dtype=torch.float32)).numpy()
    path, total = plain_search(stream, w, WINDOW)
    assert trellis.windows(found.seeds, WINDOW)[0].tolist() == path
    assert found.residual(unit(w)) / unit(w) ** 2 == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("w", range(1, 9))
def test_sums_are_those_of_the_definition(w: int) -> None:
    x = gaussian(32, 48, seed=w)
    found = search(x, unit(w), WINDOW, w)
    codes = trellis.generate(found.seeds, SeedSpec("trellis", (32, 48), bits=w / 2, window=WINDOW))
    dense = codes.reshape(2, 3, 16, 16).transpose(1, 2).reshape(32, 48).double()
    assert found.xx == pytest.approx(x.double().square().sum().item(), rel=1e-12)
    assert found.xc == pytest.approx((x.double() * dense).sum().item(), rel=1e-12)
    assert found.cc == dense.square().sum().item()


@pytest.mark.parametrize(
    ("window", "w", "blocks"), [(12, w, 3) for w in range(1, 9)] + [(14, 3, 1), (16, 4, 1), (16, 7, 1)]
)
def test_every_tier_gives_the_same_seeds(window: int, w: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(16, 16 * blocks, seed=w)
    importance = gaussian(16, 16 * blocks, seed=1).abs()
    results = []
    for tier in ("portable", "avx2", "avx512"):
        monkeypatch.setenv("RBE_TIER", tier)
        if _cpu.encoder_tier() == tier:
            results += [[search(x, unit(w), window, w, importance=i, reach=40).seeds for i in (None, importance)]]
    assert results
    for plain, weighted in results[1:]:
        assert torch.equal(plain, results[0][0]) and torch.equal(weighted, results[0][1])


def test_an_unknown_tier_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    best = _cpu.encoder_tier()
    monkeypatch.setenv("RBE_TIER", "abacus")
    assert _cpu.encoder_tier() == best


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_the_result(threads: int) -> None:
    x = gaussian(100, 70)
    one, many = (search(x, unit(4), WINDOW, 4, threads=n) for n in (1, threads))
    assert torch.equal(one.seeds, many.seeds)
    assert (one.xx, one.xc, one.cc) == (many.xx, many.xc, many.cc)


def test_more_starts_are_never_worse() -> None:
    x = gaussian(16, 16 * 20)
    errors = [search(x, unit(2), WINDOW, 2, starts=n).residual(unit(2)) for n in (1, 2, 4)]
    assert errors[0] >= errors[1] >= errors[2] and errors[0] > errors[2]


def test_unimportant_cells_do_not_count() -> None:
    x = gaussian(32, 32)
    importance = (gaussian(32, 32, seed=1) > 0).float()
    other = torch.where(importance > 0, x, 100.0 * gaussian(32, 32, seed=2))
    a, b = (search(values, unit(4), WINDOW, 4, importance=importance) for values in (x, other))
    assert torch.equal(a.seeds, b.seeds) and (a.xx, a.xc, a.cc) == (b.xx, b.xc, b.cc)
    # Half the cells to fit with all the bits: far better than 2 bits a weight allow.
    assert a.error < 0.03


def test_padding_is_like_unimportant_cells() -> None:
    x = gaussian(21, 35)
    padded, importance = torch.full((32, 48), 5.0), torch.zeros(32, 48)
    padded[:21, :35], importance[:21, :35] = x, 1.0
    assert torch.equal(
        search(x, unit(4), WINDOW, 4).seeds, search(padded, unit(4), WINDOW, 4, importance=importance).seeds
    )


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    x = gaussian(16, 160)
    importance = torch.where(torch.arange(16)[:, None] % 2 == 0, 9.0, 1.0).expand(16, 160).contiguous()
    plain, weighted = search(x, unit(4), WINDOW, 4), search(x, unit(4), WINDOW, 4, importance=importance)
    spec = SeedSpec("trellis", (16, 160), bits=2.0, window=WINDOW)

    def errors(found: Found) -> torch.Tensor:
        dense = trellis.generate(found.seeds, spec).transpose(0, 1).reshape(16, 160) * unit(4)
        return (dense - x).square().reshape(8, 2, 160).mean((0, 2))

    heavy, light = (errors(weighted) / errors(plain)).tolist()
    assert heavy < 0.8 and light > 1.2


def test_outliers_do_not_drown_their_block() -> None:
    x = gaussian(16, 16)
    x[3, 3] = 1e6
    found = search(x, unit(4), WINDOW, 4)
    codes = trellis.generate(found.seeds, SeedSpec("trellis", (16, 16), bits=2.0, window=WINDOW))[0]
    assert codes[3, 3] > 350
    far = torch.ones(16, 16, dtype=torch.bool)
    far[:, 2:5] = False  # the stream runs down the columns
    assert (codes * unit(4) - x)[far].square().mean() < 0.12


def test_progress_counts_up_and_its_exception_stops_the_search() -> None:
    x = gaussian(512, 1024)
    seen: list[int] = []
    search(x, unit(8), 14, 8, threads=1, progress=seen.append)
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] <= 32 * 64

    def interrupt(blocks: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(x, unit(8), 14, 8, progress=interrupt)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_signal_stops_the_search() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            search(gaussian(1024, 2048), unit(8), 14, 8, progress=seen.append)  # many seconds, undisturbed
        assert max(seen, default=0) < 64 * 128 / 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_default_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert default_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "bad", [torch.zeros(16, 16).double(), torch.zeros(16, 32).T, torch.zeros(16, 32, device="meta")], ids=str
)
def test_memory_that_cannot_be_read_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(RbeError, match="must be contiguous float32"):
        search(bad, 1.0, WINDOW, 4)
