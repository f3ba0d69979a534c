"""Seed specifications survive JSON and refuse nonsense."""

import json

import pytest

from rbe.errors import RbeError
from rbe.formats import SeedSpec


def test_round_trip_through_json() -> None:
    spec = SeedSpec("trellis", (30522, 384), bits=2.0, rotation=(0, 2**32 - 1))
    assert SeedSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_padding_counts_whole_blocks() -> None:
    spec = SeedSpec("trellis", (1, 17), bits=2.0)
    assert (spec.grid, spec.blocks, spec.padded) == ((1, 2), 2, (16, 32))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (0, 3)},
        {"shape": (3,)},
        {"block": 0},
        {"rotation": (-1, 0)},
        {"rotation": (0, 2**32)},
        {"rotation": (1,)},
        {"rotation": (0, 1.5)},
        {"shape": (2.5, 3)},
        {"shape": ("a", 3)},
        {"block": "abc"},
        {"block": 2.5},
        {"block": True},
        {"stages": 1.5},
        {"stages": "2"},
        {"precision": None},
        {"bits": "x"},
    ],
)
def test_nonsense_is_refused(change: dict) -> None:
    with pytest.raises(RbeError, match="spec:"):
        SeedSpec(**{"format": "trellis", "shape": (16, 16), "bits": 2.0, **change})


@pytest.mark.parametrize("damage", [{}, {"shape": 5}, {"shape": [2, 2], "format": "trellis", "bits": 2, "extra": 1}])
def test_damaged_json_is_refused(damage: dict) -> None:
    with pytest.raises(RbeError, match="no seed specification"):
        SeedSpec.from_json(damage)
