"""docs/conformance.md names tests and functions that exist, and nothing twice or wrongly."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
DEFAULT = re.compile(r"Tests without a file are in `([\w/.]+)`")
TEST = re.compile(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`")
NAME = re.compile(r"`(rbe(?:\.\w+)+)")


def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named_tests(page: str) -> set[tuple[str, str]]:
    """(file, test) of all tests that a page names; a section says where those without a file are."""
    found = set()
    for section in re.split(r"^## ", page, flags=re.M):
        default = DEFAULT.search(section)
        for file, test in TEST.findall(section):
            assert file or default, f"{test} has no file"
            found.add((file or default[1], test))  # type: ignore[index]
    return found


def test_every_test_on_the_page_exists() -> None:
    named = named_tests(PAGE)
    assert len(named) > 100
    missing = [f"{file}::{test}" for file, test in sorted(named) if test not in defined_in(file)]
    assert missing == []


@pytest.mark.parametrize("paper", ["000", "001", "003"])
def test_every_test_of_a_paper_stands_on_the_page(paper: str) -> None:
    file = f"tests/conformance/test_paper_{paper}.py"
    assert defined_in(file) == {test for other, test in named_tests(PAGE) if other == file}


def test_every_name_on_the_page_can_be_imported() -> None:
    names = set(NAME.findall(PAGE))
    assert len(names) > 40
    for name in sorted(names):
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for part in parts[cut:]:
                assert hasattr(value, part), f"{name} does not exist"
                value = getattr(value, part)
            break


def test_every_row_has_as_many_cells_as_its_table() -> None:
    width = 0
    for line in PAGE.splitlines():
        if line.startswith("|---"):
            width = line.count("|")
        elif line.startswith("|") and width:
            assert line.count("|") == width, line
        elif not line.startswith("|"):
            width = 0


def test_the_checks_notice() -> None:
    with pytest.raises(AssertionError, match="has no file"):
        named_tests("## a\n`test_x`")
    assert named_tests("## a\nTests without a file are in `tests/b.py`.\n`test_x` `tests/c.py::test_y`") == {
        ("tests/b.py", "test_x"),
        ("tests/c.py", "test_y"),
    }
