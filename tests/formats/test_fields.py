"""Bit-field tables pack and unpack every value, and refuse what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rbe import formats
from rbe.errors import RbeError
from rbe.formats.fields import Field, Layout

LAYOUT = Layout(
    (
        (Field("quadrant", 2, "which"), Field("frequency", 12, "how fast"), Field("rest", 50, "the rest")),
        (Field("whole", 64, "a word of its own"),),
    )
)


@given(st.integers(0, 3), st.integers(0, 2**12 - 1), st.integers(0, 2**50 - 1), st.integers(-(2**63), 2**63 - 1))
def test_unpack_inverts_pack(quadrant: int, frequency: int, rest: int, whole: int) -> None:
    values = {"quadrant": quadrant, "frequency": frequency, "rest": rest, "whole": whole}
    seeds = LAYOUT.pack({name: torch.tensor([v]) for name, v in values.items()})
    assert seeds.shape == (1, 2)
    assert {name: v.item() for name, v in LAYOUT.unpack(seeds).items()} == values


def test_values_out_of_range_are_refused() -> None:
    values = {"quadrant": 4, "frequency": 0, "rest": 0, "whole": 0}
    with pytest.raises(RbeError, match="field quadrant has a value outside"):
        LAYOUT.pack({name: torch.tensor([v]) for name, v in values.items()})


def test_missing_fields_are_refused() -> None:
    with pytest.raises(RbeError, match="exactly"):
        LAYOUT.pack({"quadrant": torch.tensor([0])})


def test_words_of_another_layout_are_refused() -> None:
    with pytest.raises(RbeError, match=r"int64 \(blocks, 2\)"):
        LAYOUT.unpack(torch.zeros(3, 1, dtype=torch.int64))


def test_a_word_must_be_full() -> None:
    with pytest.raises(AssertionError):
        Layout(((Field("short", 63, "one bit missing"),),))


def test_table_names_every_field() -> None:
    assert "| 0 | [61:50] | frequency | how fast |" in LAYOUT.table()


@pytest.mark.parametrize("format", formats.DISK_FORMATS)
def test_parts_of_different_shapes_are_not_joined(format: str) -> None:
    spec = formats.make_spec(format, (32, 16), stages=2)
    definition = formats.disk(format)
    code = torch.zeros(2, definition.code_words(spec), dtype=torch.int64)
    half = torch.full((2, 2), 0.5)
    assert definition.join(code, half, half, spec).shape == formats.seeds_shape(spec)
    for radius, angle in ((half, half[:, :1]), (half[:1], half), (half[:, :1], half[:, :1]), (half[0], half[0])):
        with pytest.raises(RbeError, match=f"{format}: .* are of shapes"):
            definition.join(code, radius, angle, spec)
    if code.numel():
        for wrong in (code.float(), code[:, :1]):
            with pytest.raises(RbeError, match=f"{format}: .* code"):
                definition.join(wrong, half, half, spec)


def test_fields_are_integers_of_one_shape() -> None:
    one = torch.ones(3, dtype=torch.int64)
    with pytest.raises(RbeError, match=r"geo_amp is torch\.float32"):
        formats.packed128.code_of(one, one, one.float(), one, one)
    with pytest.raises(RbeError, match=r"basis_sel is .*\(2,\)"):
        formats.packed128.code_of(one, one, one, one[:2], one)
