"""The page shows what it is given, escapes it, and needs nothing but itself."""

import re
from html.parser import HTMLParser

import pytest

from rbe import report
from rbe.errors import RbeError

pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib")

ENTRIES = [
    report.Entry("encoder.layer.0.query", "linear", (64, 64), "trellis 2 bit", 1028, 0.069),
    report.Entry("encoder.layer.1.query", "linear", (64, 64), "trellis 4 bit", 2052, 0.0044),
    report.Entry("encoder.words", "embedding", (100, 64), "trellis 2 bit", 2000, 0.071),
    report.Entry("encoder.norm.weight", "keep", (64,), "float32", 256),
]


def page(**more: object) -> str:
    given = {"parts": {"seeds": 5000, "norms": 256}, "stored": 6000, "weights": 14656, **more}
    return report.render(report.Report("tiny", ENTRIES, **given))  # type: ignore[arg-type]


class Strict(HTMLParser):
    """Fails on a tag closed out of turn."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "rect", "stop"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_well_formed_and_self_contained() -> None:
    text = page(
        comparisons=[report.Comparison("sentences / s", "10", "20", "2.0 times")],
        search=[report.Hits("q", [("a", 0.5)], [("b", 0.4)])],
        facts=[("source", "here")],
    )
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and "script" not in parser.tags and "link" not in parser.tags and "img" not in parser.tags
    # The two names of the SVG namespace identify a vocabulary, nobody fetches them.
    outside = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert outside == set() and "@import" not in text
    assert parser.tags >= {"svg", "table", "details"}


def test_the_figures_are_there() -> None:
    text = page()
    assert "9.77 : 1" in text and "4.89 : 1" in text and "6 kB" in text
    assert "headers" in text and "744" in text, "bytes that no part explains are shown as headers"
    assert "0.06900" in text and f"{ENTRIES[0].floor:.5f}" in text
    assert ENTRIES[0].rate == pytest.approx(2.0078, abs=1e-4)


def test_energy_efficiency_and_spectral_error_are_shown_where_known() -> None:
    text = page()
    assert "93.10 %" in text and "0.961" in text and "spectral error</th>" not in text
    assert ENTRIES[0].efficiency == pytest.approx(0.961, abs=1e-3) and ENTRIES[0].captured == pytest.approx(0.931)
    known = report.Entry("w", "linear", (16, 16), "trellis 2 bit", 68, 0.07, 0.0213)
    text = report.render(report.Report("t", [known, *ENTRIES], {}, 68, 256))
    assert "spectral error</th>" in text and "0.0213" in text
    rows = re.findall(r"<tr><td class=name>.*?</tr>", text)
    assert {row.count("<td") for row in rows} == {10}


def test_text_is_escaped() -> None:
    evil = "<script>alert('x')</script> & \"more\""
    entry = report.Entry(evil, "linear", (16, 16), evil, 64, 0.1)
    text = report.render(
        report.Report(
            evil,
            [entry],
            {evil: 10},
            68,
            256,
            [report.Comparison(evil, evil, evil, evil)],
            [report.Hits(evil, [(evil, 1.0)], [(evil, 1.0)])],
            [(evil, evil)],
            [(evil, evil)],
        )
    )
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_same_model_gives_the_same_page() -> None:
    assert page() == page()


def test_no_identifier_stands_twice() -> None:
    identifiers = re.findall(r' id="([^"]+)"', page())
    assert len(identifiers) == len(set(identifiers)) > 10


def test_unknown_errors_are_said_and_a_zero_error_drawn() -> None:
    unknown = report.Entry("w", "linear", (16, 16), "trellis 2 bit", 68)
    assert "does not say" in report.render(report.Report("t", [unknown], {}, 68, 256))
    zero = report.Entry("w", "linear", (16, 16), "trellis 2 bit", 68, 0.0)
    assert "<svg" in report.render(report.Report("t", [zero], {}, 68, 256))


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(RbeError, match="no tensors"):
        report.render(report.Report("t", [], {}, 0, 0))


def test_a_missing_plotting_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RbeError, match="rbe\\[report\\]"):
        page()
