"""The rates of a conversion, spread over its matrices; an interrupted run goes on with those it found."""

import json
from collections.abc import Mapping
from pathlib import Path

from rbe import __version__, shards
from rbe.allocate import Plan
from rbe.budget import allocate_bits, fixed_rates
from rbe.convert.calibration import Calibration

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
        given: Mapping[str, float],
    ) -> None:
        self.asked, self.plan, self.bits = asked, plan, bits
        self.embeddings_bits, self.given = embeddings_bits, dict(given)
        self.identity = asked.identity
        self._rates: dict[str, float] = {}

    def rates(self, work: Path) -> dict[str, float]:
        """Rates by pattern, for `make_plan`: those of an earlier, interrupted run where there are some.

        Sums of gradients are rounded differently by another number of threads: found anew, a rate could differ.

        Raises:
            RbeError: the model cannot be run, or the mean rate is out of range.
        """
        allocate_bits(self.plan, {}, self.bits)  # refuses a mean out of range before the long work
        try:
            known = json.loads((work / _FILE).read_text(encoding="utf-8"))
            found = known["rates"] if known["key"] == self._key() else None
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found is None:
            fixed = fixed_rates(self.embeddings_bits, self.given)
            found = allocate_bits(self.plan, self.asked.sensitivities(self.plan), self.bits, fixed)
        self._rates = found
        return {**found, **self.given}

    def keep(self, work: Path) -> None:
        """Write the rates into the work folder."""
        shards.write_atomic(work / _FILE, shards.to_json({"key": self._key(), "rates": self._rates}))

    def _key(self) -> str:
        about = {"source": self.asked.dense.fingerprint(), "plan": self.plan.to_json(), "bits": self.bits}
        about |= {"embeddings_bits": self.embeddings_bits, "rates": self.given}
        return shards.canonical_digest({**about, "inputs": self.identity, "version": __version__})
