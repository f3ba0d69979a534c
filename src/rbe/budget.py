"""How many bits each matrix gets, when all of them together have so many bytes.

Errors of different matrices add up in the model's answer, each with its own weight, its sensitivity, and every half bit
makes an error about half as large. So the bits go where the next one takes most off the sum, until none are left.
"""

import glob
import heapq
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

from rbe import formats
from rbe.allocate import LEAST_GAIN, Entry, Plan
from rbe.errors import RbeError
from rbe.formats import Rate, SeedSpec, is_disk
from rbe.nn.swap import matches

# Squared error relative to Gaussian weights by rate, encoder `balanced` (benchmarks/encoder.py).
ERRORS = {0.5: 0.529, 1.0: 0.268, 1.5: 0.136, 2.0: 0.0687, 2.5: 0.0350, 3.0: 0.0175, 3.5: 0.0088, 4.0: 0.0045}

# Bits a weight where nothing else is said, and of a plan whose rates are still to be found.
MIDDLE = 2.0

# Tokenizers number their tokens roughly from frequent to rare. The grades of their table end at this row and at every
# doubling of it; where their frequencies fall like 1 / rank, each holds about the same share of a text.
_FIRST_GRADE = 2048
# Half a bit leaves little of a row, and first order no longer tells what that does to an answer.
_LEAST_GRADE = 1.0

Key = TypeVar("Key")


def spread(
    sensitivities: Mapping[Key, float],
    nbytes: Mapping[Key, Mapping[float, int]],
    total: float,
    errors: Mapping[float, float] = ERRORS,
) -> dict[Key, float]:
    """The rate of each matrix that makes the sum of sensitivity times error small, within a number of bytes.

    Greedy along each matrix's convex hull: optimal but for what is left over in the end, less than one step.

    >>> sizes = {name: {1.0: 100, 2.0: 200, 3.0: 300} for name in ("a", "b")}
    >>> spread({"a": 9.0, "b": 0.1}, sizes, total=400)
    {'a': 3.0, 'b': 1.0}

    Args:
        sensitivities: what a relative squared error of 1 of each matrix would do to the answer; not negative.
        nbytes: bytes of each matrix at every rate it can have.
        total: bytes they may have together.
        errors: relative squared error at every rate.

    Raises:
        RbeError: the smallest rates already need more.
    """
    chosen = {name: min(sizes) for name, sizes in nbytes.items()}
    left = total - sum(nbytes[name][rate] for name, rate in chosen.items())
    if left < 0:
        raise RbeError(
            f"allocate: {round(total):,} bytes are asked for, and at the lowest rates the matrices take "
            f"{round(total - left):,}; ask for more bits"
        )

    def step(name: Any) -> tuple[float, Any, float] | None:
        """(minus the gain a byte, name, rate) of the best next rate of a matrix that still fits."""
        now, sizes = chosen[name], nbytes[name]
        found = []
        for rate in sizes:
            cost = sizes[rate] - sizes[now]
            if rate > now and cost <= left:
                gain = sensitivities[name] * (errors[now] - errors[rate])
                found.append((-gain / max(cost, 1), name, rate))
        return min(found, default=None)

    queue = [one for name in nbytes if (one := step(name))]
    heapq.heapify(queue)
    while queue:
        _, name, rate = heapq.heappop(queue)
        cost = nbytes[name][rate] - nbytes[name][chosen[name]]
        if cost <= left:
            left -= cost
            chosen[name] = rate
        # Where it no longer fitted, a smaller step of the same matrix may.
        if one := step(name):
            heapq.heappush(queue, one)
    return chosen


def allocate_bits(
    plan: Plan,
    sensitivities: Mapping[str, Tensor],
    bits: float,
    fixed: Callable[[Entry], bool] = lambda entry: False,
    graded: Collection[str] = (),
) -> dict[str, Rate]:
    """Rates for the matrices of a plan that together take what `bits` bits for each weight would take.

    Args:
        plan: of trellis seeds, at any rates.
        sensitivities: by the names of the plan's entries, as `rbe.sensitivity` finds them; entries without one keep
            their rate, and so do those with 0: the answer that was looked at may not be the one that a user wants.
        bits: mean rate of the entries that are given new ones; need not be a rate that is offered.
        fixed: entries that keep their rate and are not counted.
        graded: entries, tables of tokens, whose rows may have several rates.

    Returns:
        rates by pattern, each of one module path, as `rates` of `make_plan` takes them.

    Raises:
        RbeError: the mean is below the lowest rate or above the highest, or not a number.
    """
    if isinstance(bits, bool) or not isinstance(bits, Real) or not min(ERRORS) <= bits <= max(ERRORS):
        raise RbeError(f"allocate: {bits!r} bits a weight on average; give {min(ERRORS):g} to {max(ERRORS):g}")
    known = {name: float(found.sum()) for name, found in sensitivities.items()}
    free = {e.name: e for e in plan.seeded if known.get(e.name, 0.0) > 0 and not fixed(e)}
    parts: dict[tuple[str, int], float] = {}
    sizes: dict[tuple[str, int], dict[float, int]] = {}
    total = 0.0
    for name, entry in free.items():
        assert entry.spec is not None and not is_disk(entry.spec.format), "only a trellis has rates to choose from"
        seeds = math.prod(formats.seeds_shape(entry.spec)) * 8
        for begin, end in _ranges(entry.spec, name in graded):
            at = {rate: _seed_bytes(entry.spec, end - begin, rate) for rate in ERRORS}
            total += at[1.0] + (at[2.0] - at[1.0]) * (bits - 1.0)
            share = (end - begin) / entry.spec.shape[0]
            beside, most = (entry.nbytes - seeds) * share, entry.source_bytes * share / LEAST_GAIN
            least = _LEAST_GRADE if name in graded else 0.0
            sizes[name, end] = {rate: size for rate, size in at.items() if size + beside <= most and rate >= least}
            found = sensitivities[name]
            parts[name, end] = known[name] if found.ndim == 0 else float(found[begin:end].sum())
    chosen = spread(parts, sizes, total)
    by_end: dict[str, dict[int, float]] = {name: {} for name in free}
    for (name, end), rate in chosen.items():
        by_end[name][end] = rate
    return {glob.escape(free[name].module): _rate(rates) for name, rates in by_end.items()}


def _ranges(spec: SeedSpec, graded: bool) -> list[tuple[int, int]]:
    """The row ranges that may have rates of their own."""
    ends = []
    end = _FIRST_GRADE
    while graded and end < spec.shape[0]:
        ends.append(end)
        end *= 2
    ends.append(spec.shape[0])
    return list(zip([0, *ends], ends, strict=False))


def _seed_bytes(spec: SeedSpec, rows: int, rate: float) -> int:
    part = replace(spec, shape=(rows, spec.shape[1]), bits=rate, grades=())
    return 8 * math.prod(formats.seeds_shape(part))


def _rate(by_end: Mapping[int, float]) -> Rate:
    """One rate, or grades, neighbours of the same rate made one."""
    grades: list[tuple[int | None, float]] = []
    for end, bits in sorted(by_end.items()):
        if grades and grades[-1][1] == bits:
            grades.pop()
        grades.append((end, bits))
    return grades[0][1] if len(grades) == 1 else tuple(grades)


def fixed_rates(embeddings_bits: float | None, given: Mapping[str, Rate]) -> Callable[[Entry], bool]:
    """Whether an entry has a rate that the user chose for it: by pattern, or for embeddings."""

    def fixed(entry: Entry) -> bool:
        embedding = entry.kind == "embedding" and embeddings_bits is not None
        return embedding or matches(entry.module, list(given))

    return fixed
