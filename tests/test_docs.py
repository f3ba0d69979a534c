"""What the pages in docs/ say of the formats is what the code says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rbe.formats import outer128, packed64, packed128, trellis
from rbe.train.config import PARTS

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "layout", [packed64.LAYOUT, packed128.LAYOUT, outer128.LAYOUT], ids=["packed64", "packed128", "outer128"]
)
def test_the_tables_of_fields_are_the_layouts(layout: object) -> None:
    assert layout.table() in (DOCS / "format.md").read_text()  # type: ignore[attr-defined]


@pytest.mark.parametrize("section", PARTS)
def test_the_page_of_configurations_has_every_key_with_its_default(section: str) -> None:
    text = (DOCS / "configuration.md").read_text().partition(f"## [{section}]\n")[2].partition("\n## ")[0]
    said = {}
    for line in re.findall(r"^\| (`.*)$", text, flags=re.M):
        names, defaults, _ = (cell.strip() for cell in line.split("|", 2))
        keys = re.findall(r"`(\w+)`", names)
        if not defaults or len(keys) == 1:
            said |= dict.fromkeys(keys, defaults.strip("`"))
        else:
            said |= dict(zip(keys, (value.strip("` ") for value in defaults.split(",")), strict=True))
    fields = PARTS[section].__dataclass_fields__
    assert said.keys() == fields.keys() - {"layer"}
    for name, value in said.items():
        default = fields[name].default
        if name in ("latent_lr", "dense_lr"):
            continue  # that of lr
        shown = json.loads(value) if value else None
        assert shown == (list(default) if isinstance(default, tuple) else default) or name == "path", name


def test_constants_in_words() -> None:
    text = (DOCS / "format.md").read_text()
    assert f"K = {packed128.GAIN:.6f}" in text
    assert f"0x{packed64.KEY:X}" in text
    assert f"- {trellis.OFFSET}" in text


def test_the_example_of_searches_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "conformance.md").read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["tree"].decode().shape == names["both"].decode().shape == (64, 96)
    assert names["starts"].probability(8).min() > 0 and names["fit"].loss.shape == (24,)
