"""What the pages in docs/ say of the formats is what the code says."""

from pathlib import Path

import pytest

from rbe.formats import outer128, packed64, packed128, trellis

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "layout", [packed64.LAYOUT, packed128.LAYOUT, outer128.LAYOUT], ids=["packed64", "packed128", "outer128"]
)
def test_the_tables_of_fields_are_the_layouts(layout: object) -> None:
    assert layout.table() in (DOCS / "format.md").read_text()  # type: ignore[attr-defined]


def test_constants_in_words() -> None:
    text = (DOCS / "format.md").read_text()
    assert f"K = {packed128.GAIN:.6f}" in text
    assert f"0x{packed64.KEY:X}" in text
    assert f"- {trellis.OFFSET}" in text
