"""The rates of a conversion, spread over its matrices; an interrupted run goes on with those it found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbe import __version__, shards
from rbe.allocate import Plan
from rbe.budget import allocate_bits, fixed_rates
from rbe.convert.calibration import Calibration
from rbe.formats import Rate

_FILE = "allocation.json"


class Allocation:
    """Which rates the matrices of a plan get.

    Attributes:
        identity: what they depend on beside the source and the plan.
    """

    def __init__(
        self,
        asked: Calibration,
        plan: Plan,
        bits: float,
        embeddings_bits: float | None,
        given: Mapping[str, Rate],
    ) -> None:
        self.asked, self.plan, self.bits = asked, plan, bits
        self.embeddings_bits, self.given = embeddings_bits, dict(given)
        self.identity = asked.identity
        self._rates: dict[str, Rate] = {}

    def rates(self, work: Path) -> dict[str, Rate]:
        """Rates by pattern, for `make_plan`: those of an earlier, interrupted run where there are some.

        Sums of gradients are rounded differently by another number of threads: found anew, a rate could differ.

        Raises:
            RbeError: the model cannot be run, or the mean rate is out of range.
        """
        allocate_bits(self.plan, {}, self.bits)  # refuses a mean out of range before the long work
        try:
            known = json.loads((work / _FILE).read_text(encoding="utf-8"))
            found = {k: _rate(v) for k, v in known["rates"].items()} if known["key"] == self._key() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found = None
        if found is None:
            fixed = fixed_rates(self.embeddings_bits, self.given)
            sensitivities, graded = self.asked.sensitivities(self.plan), self.asked.token_table(self.plan)
            found = allocate_bits(self.plan, sensitivities, self.bits, fixed, graded)
        self._rates = found
        return {**found, **self.given}

    def keep(self, work: Path) -> None:
        """Write the rates into the work folder."""
        shards.write_atomic(work / _FILE, shards.to_json({"key": self._key(), "rates": self._rates}))

    def _key(self) -> str:
        about = {"source": self.asked.dense.fingerprint(), "plan": self.plan.to_json(), "bits": self.bits}
        about |= {"embeddings_bits": self.embeddings_bits, "rates": self.given}
        return shards.canonical_digest({**about, "inputs": self.identity, "version": __version__})


def _rate(known: Any) -> Rate:
    """A rate from JSON, which knows no tuples."""
    return tuple((end, float(bits)) for end, bits in known) if isinstance(known, list) else float(known)
