"""Golden vectors of packed64, packed128 and outer128: exact fields of exact bits, and their weights to twelve digits.

Weights come from sines and exponentials, whose last bits are the platform's; the bits and the integers are exact.
`python -m tests.test_golden_packed` writes them anew; allowed only together with a new format name (design 3).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rbe import formats
from rbe.formats import packed64, packed128
from rbe.mixing import fmix32

GOLDEN = Path(__file__).parent / "golden" / "packed.json"
CASES = [
    {"format": "packed64", "shape": [16, 16], "block": 16},
    {"format": "packed64", "shape": [16, 16], "block": 16, "precision": 64, "stages": 2},
    {"format": "packed64", "shape": [5, 9], "block": None},
    {"format": "packed128", "shape": [16, 16], "block": 16, "mode": "faithful"},
    {"format": "packed128", "shape": [16, 16], "block": 16, "mode": "radial"},
    {"format": "packed128", "shape": [7, 4], "block": None, "mode": "radial", "stages": 3},
    {"format": "outer128", "shape": [16, 16], "block": 16},
    {"format": "outer128", "shape": [8, 8], "block": 8, "stages": 2},
    {"format": "outer128", "shape": [32, 32], "block": 32},
    {"format": "outer128", "shape": [64, 64], "block": 64},
]
SEEDS = 6  # of a case; a block of 64 has many weights, so one of them must do


def make(case: dict[str, Any]) -> formats.SeedSpec:
    options = {key: value for key, value in case.items() if key not in ("format", "shape")}
    return formats.make_spec(case["format"], tuple(case["shape"]), **options)


def seeds_of(case: int, spec: formats.SeedSpec) -> torch.Tensor:
    """Seeds from nothing but integers; what has float32 points gets radii in [0.25, 1) and angles of every sign."""
    seeds = SEEDS if spec.block != 64 else 1
    count = seeds * formats.get(spec.format).words(spec)
    mixed = fmix32(torch.arange(2 * count) + 1000 * case)
    high, low = mixed[::2], mixed[1::2]
    if spec.format != "packed64":
        odd = torch.arange(count) % 2 == 1  # the words of points: float32 patterns of r and theta
        high = torch.where(odd, (0x3E800000 | (high & 0x7FFFFF)) + ((high >> 24) & 1 << 23), high)
        low = torch.where(odd, (0x40000000 | (low & 0x7FFFFF)) | (low & 0x80000000), low)
    return ((high << 32) | low).reshape(seeds, -1)


def describe() -> list[dict[str, Any]]:
    """Everything that is frozen, computed anew."""
    found = []
    for number, case in enumerate(CASES):
        spec = make(case)
        definition = formats.disk(spec.format)
        seeds = seeds_of(number, spec)
        code, radius, angle = definition.split(seeds, spec)
        weights = definition.values(code, radius.double(), angle.double(), spec)
        fields = (
            {name: value.tolist() for name, value in packed128.fields(code).items()}
            if spec.format == "packed128"
            else {}
        )
        found.append(
            {
                "case": case,
                "version": definition.VERSION,
                "bits": spec.bits,
                "seeds": seeds.tolist(),
                "fields": fields,
                "radius": radius.tolist(),
                "angle": angle.tolist(),
                "weights": [[float(f"{v:.15g}") for v in block] for block in weights.flatten(1).tolist()],
            }
        )
    return found


@pytest.mark.parametrize("number", range(len(CASES)))
def test_seeds_give_the_frozen_fields_and_weights(number: int) -> None:
    frozen, now = json.loads(GOLDEN.read_text())[number], describe()[number]
    assert {key: frozen[key] for key in ("case", "version", "bits", "seeds", "fields", "radius")} == {
        key: now[key] for key in ("case", "version", "bits", "seeds", "fields", "radius")
    }
    assert torch.allclose(torch.tensor(frozen["angle"]).double(), torch.tensor(now["angle"]).double(), rtol=1e-15)
    old, new = (torch.tensor(d["weights"], dtype=torch.float64) for d in (frozen, now))
    assert ((old - new).abs() <= 1e-12 * (1 + old.abs().amax())).all()
    assert old.std() > 0.01, "the vectors must see something"


def test_modulation_is_frozen() -> None:
    phi = packed64.modulation(2, 3, 0)
    assert [round(v, 12) for v in phi.flatten().tolist()] == PHI


PHI = [0.913921322579, 1.040426294313, 1.074803684623, 0.941904545545, 1.094557632795, 1.093486659008]


if __name__ == "__main__":
    text = json.dumps(describe(), separators=(",", ":")).replace('{"case"', '\n{"case"')
    GOLDEN.write_text(text + "\n")
