"""Seed specifications survive JSON and refuse nonsense."""

import json
from typing import Any

import pytest

from rbe.errors import RbeError
from rbe.formats import SeedSpec, make_spec, seeds_shape
from rbe.kernels.ops import parsed


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


GRADES = ((32, 3.0), (64, 0.5), (75, 1.5))


def test_grades_survive_json_and_text() -> None:
    spec = make_spec("trellis", (75, 50), bits=GRADES)
    assert spec.bits == (2 * 3.0 + 2 * 0.5 + 1.5) / 5
    assert SeedSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert parsed(spec.text) == spec
    assert "grades" not in SeedSpec("trellis", (75, 50), bits=2.0).to_json()


def test_parts_cover_the_rows() -> None:
    spec = make_spec("trellis", (75, 50), bits=GRADES, rotation=(0, 5))
    assert [(rows.start, rows.stop, part.bits) for rows, part in spec.parts] == [
        (0, 32, 3.0),
        (32, 64, 0.5),
        (64, 75, 1.5),
    ]
    assert all(part.rotation == (0, 5) and part.shape[0] == rows.stop - rows.start for rows, part in spec.parts)
    # 2 and 2 and 1 block rows of 4 blocks, at 6, 1 and 3 half bits.
    assert seeds_shape(spec) == (4 * (2 * 6 + 2 * 1 + 1 * 3), 2)
    assert make_spec("trellis", (75, 50), bits=((75, 2.0),)) == make_spec("trellis", (75, 50), bits=2)


@pytest.mark.parametrize(
    "grades",
    [
        ((32, 3.0), (64, 1.0)),
        ((30, 3.0), (75, 1.0)),
        ((32, 3.0), (32, 2.0), (75, 1.0)),
        ((48, 3.0), (32, 2.0), (75, 1.0)),
        ((0, 3.0), (75, 1.0)),
        ((-16, 3.0), (75, 1.0)),
        ((32, 7.0), (75, 1.0)),
        ((32, float("nan")), (75, 1.0)),
        (("a", 3.0), (75, 1.0)),
        ((32, 3.0, 1), (75, 1.0)),
        ((32, "x"), (75, 1.0)),
        (),
    ],
)
def test_bad_grades_are_refused(grades: tuple) -> None:
    with pytest.raises(RbeError, match=r"grade|trellis"):
        make_spec("trellis", (75, 50), bits=grades)


def test_grades_need_rows_that_stand_alone() -> None:
    with pytest.raises(RbeError, match="stand alone"):
        make_spec("trellis", (75, 50), bits=GRADES, rotation=(3, 5))
    with pytest.raises(RbeError, match="not the mean"):
        SeedSpec("trellis", (75, 50), bits=2.0, grades=GRADES)
    with pytest.raises(RbeError, match="packed64: grades"):
        SeedSpec.check_rate(SeedSpec("packed64", (75, 50), bits=1.7, grades=GRADES), 1)
    with pytest.raises(RbeError, match="no seed specification"):
        SeedSpec.from_json({**SeedSpec("trellis", (75, 50), bits=2.0).to_json(), "grades": [[32, "x"]]})


@pytest.mark.parametrize("shape", [(16, 16, 7), (16.9, 16), (16,), 16, ("16", 16), None])
def test_a_shape_is_two_whole_numbers(shape: Any) -> None:
    with pytest.raises(RbeError, match="two whole numbers"):
        make_spec("packed128", shape)


def test_only_a_trellis_has_a_window() -> None:
    with pytest.raises(RbeError, match="window 12 belongs to a trellis"):
        make_spec("packed128", (16, 16), window=12)
