"""How many bits each matrix gets, when all of them together have so many bytes.

Errors of different matrices add up in the model's answer, each with its own weight, its sensitivity, and every half bit
makes an error about half as large. So the bits go where the next one takes most off the sum, until none are left.
"""

import glob
import heapq
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real

from rbe.allocate import LEAST_GAIN, Entry, Plan, seed_bytes
from rbe.errors import RbeError
from rbe.formats import is_disk
from rbe.nn.swap import matches

# Squared error relative to Gaussian weights by rate, encoder `balanced` (benchmarks/encoder.py).
ERRORS = {0.5: 0.529, 1.0: 0.268, 1.5: 0.136, 2.0: 0.0687, 2.5: 0.0350, 3.0: 0.0175, 3.5: 0.0088, 4.0: 0.0045}

# Bits a weight where nothing else is said, and of a plan whose rates are still to be found.
MIDDLE = 2.0


def spread(
    sensitivities: Mapping[str, float],
    nbytes: Mapping[str, Mapping[float, int]],
    total: float,
    errors: Mapping[float, float] = ERRORS,
) -> dict[str, float]:
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

    def step(name: str) -> tuple[float, str, float] | None:
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
    sensitivities: Mapping[str, float],
    bits: float,
    fixed: Callable[[Entry], bool] = lambda entry: False,
) -> dict[str, float]:
    """Rates for the matrices of a plan that together take what `bits` bits for each weight would take.

    Args:
        plan: of trellis seeds, at any rates.
        sensitivities: by the names of the plan's entries; entries without one keep their rate, and so do those with 0:
            the answer that was looked at may not be the one that a user wants of the model.
        bits: mean rate of the entries that are given new ones; need not be a rate that is offered.
        fixed: entries that keep their rate and are not counted.

    Returns:
        rates by pattern, each of one module path, as `rates` of `make_plan` takes them.

    Raises:
        RbeError: the mean is below the lowest rate or above the highest, or not a number.
    """
    if isinstance(bits, bool) or not isinstance(bits, Real) or not min(ERRORS) <= bits <= max(ERRORS):
        raise RbeError(f"allocate: {bits!r} bits a weight on average; give {min(ERRORS):g} to {max(ERRORS):g}")
    free = {e.name: e for e in plan.seeded if sensitivities.get(e.name, 0.0) > 0 and not fixed(e)}
    sizes: dict[str, dict[float, int]] = {}
    total = 0.0
    for name, entry in free.items():
        assert entry.spec is not None and not is_disk(entry.spec.format), "only a trellis has rates to choose from"
        at = {rate: seed_bytes(replace(entry.spec, bits=rate), entry.row_scale, entry.outliers) for rate in ERRORS}
        # What lies beside the seeds is the same at every rate.
        total += at[1.0] + (at[2.0] - at[1.0]) * (bits - 1.0)
        sizes[name] = {rate: size for rate, size in at.items() if LEAST_GAIN * size <= entry.source_bytes}
    chosen = spread({name: sensitivities[name] for name in free}, sizes, total)
    return {glob.escape(free[name].module): rate for name, rate in chosen.items()}


def fixed_rates(embeddings_bits: float | None, given: Mapping[str, float]) -> Callable[[Entry], bool]:
    """Whether an entry has a rate that the user chose for it: by pattern, or for embeddings."""

    def fixed(entry: Entry) -> bool:
        embedding = entry.kind == "embedding" and embeddings_bits is not None
        return embedding or matches(entry.module, list(given))

    return fixed
