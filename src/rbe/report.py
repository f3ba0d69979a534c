"""One self-contained HTML page of a compressed model or a training run: no script, nothing from outside, SVG plots."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rbe import metrics
from rbe.errors import RbeError
from rbe.profile import size


@dataclass(frozen=True)
class Entry:
    """One stored matrix or tensor.

    Attributes:
        name: of the module or tensor.
        kind: "linear", "embedding", "conv", "recurrent", "vector" or "keep".
        shape: as torch shows it.
        format: "trellis 2 bit", "float32", ...
        nbytes: stored bytes, scales counted.
        error: squared error relative to the source; None where nothing was lost or nothing is known.
        spectral_error: of the sorted singular values; None where no source was at hand.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    error: float | None = None
    spectral_error: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def rate(self) -> float:
        """Stored bits per weight."""
        return metrics.bits_per_weight(self.nbytes, self.weights) if self.weights else 0.0

    @property
    def floor(self) -> float:
        """Shannon floor of the error at the stored rate."""
        return metrics.shannon_floor(self.rate)

    @property
    def captured(self) -> float | None:
        """Share of the source's energy that is kept, 1 - error."""
        return None if self.error is None else 1.0 - self.error

    @property
    def efficiency(self) -> float | None:
        """eta: the rate that the error needs at least, of the rate that is stored."""
        return None if self.error is None else metrics.efficiency(self.error, self.rate)


@dataclass(frozen=True)
class Hits:
    """Answers to one query by both models: texts with their similarity, best first."""

    query: str
    dense: Sequence[tuple[str, float]]
    compressed: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Comparison:
    """One line of the comparison with the dense model.

    Attributes:
        what: what was measured, with its unit.
        dense, compressed: the values, as they should be read.
        remark: ratio or explanation.
    """

    what: str
    dense: str
    compressed: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: over it.
        names: of the columns; the first names the tensor, the others hold numbers.
        rows: of texts.
        note: what the columns mean.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything the page shows; what is empty is left out.

    Attributes:
        title: name of the model.
        entries: all stored tensors.
        parts: bytes by purpose (seeds, scales, biases, ...), headers included; they sum to `stored`.
        stored: bytes of all .safetensors files.
        weights: number of weights of the source model.
        comparisons: quality, speed and memory against dense.
        search: answers of both models, side by side.
        headlines: further (value, caption) pairs for the top of the page.
        facts: (name, value) pairs about the run: source, machine, settings.
        tables: what is known of the matrices beside their source.
    """

    title: str
    entries: Sequence[Entry]
    parts: dict[str, int]
    stored: int
    weights: int
    comparisons: Sequence[Comparison] = ()
    search: Sequence[Hits] = ()
    headlines: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    tables: Sequence[Table] = ()


def render(report: Report) -> str:
    """The page.

    >>> entry = Entry("w", "linear", (16, 16), "trellis 2 bit", 68, error=0.07)
    >>> page = render(Report("a <b>", [entry], parts={"seeds": 64}, stored=68, weights=256))
    >>> "a &lt;b&gt;" in page, "<script" in page
    (True, False)

    Raises:
        RbeError: matplotlib is not installed, or there is nothing to show.
    """
    if not report.entries or report.stored < 1 or report.weights < 1:
        raise RbeError("report: the folder holds no tensors; compress a model first")
    seeded = [e for e in report.entries if e.kind != "keep"]
    sections = [
        _section("Where the bytes go", _parts(report), "Every byte of the safetensors files, headers included."),
        _section(
            "Error of each matrix beside the Shannon floor",
            _figure(seeded),
            "The floor 2<sup>&minus;2R</sup> is the least squared error, relative to the weights, that any code of "
            "Gaussian weights can reach at the stored rate R, scales counted.",
        )
        if seeded
        else "",
        _section("Against the dense model", _comparisons(report.comparisons)) if report.comparisons else "",
        _section("Semantic search, side by side", _search(report.search), _agreement(report.search))
        if report.search
        else "",
        _section(
            "Every tensor",
            _tensors(report.entries),
            "Captured is the energy kept, 1 &minus; error; &eta; the rate that the error needs at least, of the rate "
            "that is stored; the spectral error is that of the sorted singular values.",
        ),
        *(_section(t.title[:1].upper() + t.title[1:], _folded(t), escape(t.note)) for t in report.tables),
        _section("About this run", _facts(report.facts)) if report.facts else "",
    ]
    cards = [
        (f"{metrics.ratio(report.stored, report.weights):.2f} : 1", "smaller than float32"),
        (f"{metrics.ratio(report.stored, report.weights, 2):.2f} : 1", "smaller than float16"),
        (size(report.stored), f"for {report.weights / 1e6:.1f} M weights"),
        *report.headlines,
    ]
    return _page(f"{report.title} in seeds", "rbe report", report.title, cards, sections)


@dataclass(frozen=True)
class Curves:
    """One plot over the epochs of a training run.

    Attributes:
        name: of what is plotted.
        lines: its label to one value for every epoch; None where there is none.
        log: whether the axis is logarithmic.
    """

    name: str
    lines: Mapping[str, Sequence[float | None]]
    log: bool = False


def render_training(
    title: str,
    cards: Sequence[tuple[str, str]],
    plots: Sequence[Curves],
    facts: Sequence[tuple[str, str]] = (),
    live: bool = False,
) -> str:
    """The page of a training run; a live one is read anew by the browser every half minute.

    >>> page = render_training("a run", [("98.1 %", "best")], [Curves("loss", {"training": [2.0, 1.0]}, log=True)])
    >>> "a run" in page, "<svg" in page, "<script" in page
    (True, True, False)

    Args:
        title: name of the run.
        cards: (value, caption) pairs for the top.
        plots: one for each thing to see.
        facts: (name, value) pairs for the end.

    Raises:
        RbeError: matplotlib is not installed.
    """
    kept = [plot for plot in plots if any(v is not None for line in plot.lines.values() for v in line)]
    figure = _figure_class()(figsize=(9.4, 2.6 * -(-len(kept) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(kept) // 2), 2, squeeze=False).flatten() if kept else []
    for axis in axes[len(kept) :]:
        axis.remove()
    for axis, plot in zip(axes, kept, strict=False):
        for (label, line), colour in zip(plot.lines.items(), _COLOURS, strict=False):
            points = [(k, v) for k, v in enumerate(line, 1) if v is not None]
            marker = "o" if len(points) < 2 else None
            axis.plot(*zip(*points, strict=True), marker=marker, color=colour, lw=1.4, label=label)
        axis.set_title(plot.name, fontsize=9.5, loc="left")
        axis.set_yscale("log" if plot.log else "linear")
        axis.grid(axis="y", color="#ddd", lw=0.6)
        if len(plot.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    sections = [_section("Epoch by epoch", _svg(figure, "curves of the run"))] if kept else []
    sections += [_section("About this run", _facts(facts))] if facts else []
    return _page(title, "rbe train", title, cards, sections, live)


def _page(
    name: str,
    over: str,
    title: str,
    cards: Sequence[tuple[str, str]],
    sections: Sequence[str],
    live: bool = False,
) -> str:
    refresh = '<meta http-equiv="refresh" content="30">' if live else ""
    head = "".join(f"<div class=card><b>{escape(v)}</b><span>{escape(c)}</span></div>" for v, c in cards)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f"<header><p class=over>{escape(over)}</p><h1>{escape(title)}</h1></header>"
        f"<div class=cards>{head}</div>\n{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{note}</p>' if note else ''}{body}</section>\n"


def _parts(report: Report) -> str:
    rows = sorted(((n, b) for n, b in report.parts.items() if b), key=lambda p: -p[1])
    rest = report.stored - sum(b for _, b in rows)
    if rest > 0:
        rows.append(("headers", rest))
    total = sum(b for _, b in rows)
    bar = "".join(
        f'<i style="width:{100 * b / total:.3f}%;background:{_COLOURS[k % len(_COLOURS)]}" title="{escape(n)}"></i>'
        for k, (n, b) in enumerate(rows)
    )
    lines = "".join(
        f'<tr><td><i class=dot style="background:{_COLOURS[k % len(_COLOURS)]}"></i>{escape(n)}</td>'
        f"<td class=n>{b:,}</td><td class=n>{100 * b / total:.2f} %</td></tr>"
        for k, (n, b) in enumerate(rows)
    )
    whole = f"<tr class=sum><td>all</td><td class=n>{total:,}</td><td class=n>100 %</td></tr>"
    return f"<div class=bar>{bar}</div>" + _table(("part", "bytes", "share"), lines + whole, numeric=(1, 2))


def _table(names: Sequence[str], rows: str, numeric: Sequence[int] = ()) -> str:
    head = "".join(f"<th{' class=n' if k in numeric else ''}>{escape(n)}</th>" for k, n in enumerate(names))
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _comparisons(lines: Sequence[Comparison]) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.what)}</td><td class=n>{escape(c.dense)}</td>"
        f"<td class=n>{escape(c.compressed)}</td><td>{escape(c.remark)}</td></tr>"
        for c in lines
    )
    return _table(("measured", "dense", "in seeds", ""), rows, numeric=(1, 2))


def _tensors(entries: Sequence[Entry]) -> str:
    spectral = any(e.spectral_error is not None for e in entries)
    names = ["tensor", "shape", "format", "bits / weight", "bytes", "error", "floor", "captured", "eta"]
    names += ["spectral error"] if spectral else []

    def cells(e: Entry) -> list[str]:
        if e.kind == "keep":
            return ["exact", "", "", "", ""]
        return [
            "?" if e.error is None else f"{e.error:.5f}",
            f"{e.floor:.5f}",
            "?" if e.captured is None else f"{100 * e.captured:.2f} %",
            "?" if e.efficiency is None else f"{e.efficiency:.3f}",
            "?" if e.spectral_error is None else f"{e.spectral_error:.4f}",
        ]

    rows = "".join(
        f"<tr><td class=name>{escape(e.name)}</td><td class=n>{' &times; '.join(map(str, e.shape)) or 'scalar'}</td>"
        f"<td>{escape(e.format)}</td><td class=n>{e.rate:.3f}</td><td class=n>{e.nbytes:,}</td>"
        + "".join(f"<td class=n>{cell}</td>" for cell in cells(e)[: len(names) - 5])
        + "</tr>"
        for e in entries
    )
    table = _table(names, rows, numeric=(1, *range(3, len(names))))
    return f"<details><summary>{len(entries)} tensors</summary>{table}</details>"


def _folded(table: Table) -> str:
    rows = "".join(
        f"<tr><td class=name>{escape(name)}</td>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in table.rows
    )
    body = _table(table.names, rows, numeric=range(1, len(table.names)))
    return f"<details><summary>{len(table.rows)} tensors</summary>{body}</details>"


def _search(hits: Sequence[Hits]) -> str:
    def column(answers: Sequence[tuple[str, float]], others: Sequence[tuple[str, float]]) -> str:
        known = {text for text, _ in others}
        return "".join(
            f"<li{'' if text in known else ' class=only'}>{escape(text)} <small>{score:.3f}</small></li>"
            for text, score in answers
        )

    return "".join(
        f"<div class=query><h3>{escape(h.query)}</h3><div class=two>"
        f"<div><h4>dense</h4><ol>{column(h.dense, h.compressed)}</ol></div>"
        f"<div><h4>in seeds</h4><ol>{column(h.compressed, h.dense)}</ol></div></div></div>"
        for h in hits
    )


def agreement(hits: Sequence[Hits]) -> tuple[int, int, int]:
    """(queries with the same best answer, answers found by both, answers in all).

    >>> agreement([Hits("q", [("a", 0.9), ("b", 0.8)], [("a", 0.9), ("c", 0.8)])])
    (1, 1, 2)
    """
    first = sum(bool(h.dense) and bool(h.compressed) and h.dense[0][0] == h.compressed[0][0] for h in hits)
    both = sum(len({t for t, _ in h.dense} & {t for t, _ in h.compressed}) for h in hits)
    return first, both, sum(len(h.dense) for h in hits)


def _agreement(hits: Sequence[Hits]) -> str:
    first, both, total = agreement(hits)
    return (
        f"{first} of {len(hits)} queries have the same best answer, {both} of {total} answers are found by both; "
        "an answer found by one model only is marked."
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return _table(("", ""), "".join(f"<tr><td>{escape(n)}</td><td>{escape(v)}</td></tr>" for n, v in facts))


def _figure_class() -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RbeError("report: the plots need matplotlib; install it with: pip install 'rbe[report]'") from None
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    return Figure


def _short(names: Sequence[str]) -> list[str]:
    """Names without the dotted words that all of them share at the front.

    >>> _short(["encoder.layer.0.query", "encoder.layer.1.query"])
    ['0.query', '1.query']
    """
    split = [n.split(".") for n in names]
    common = 0
    while all(len(s) > common + 1 for s in split) and len({s[common] for s in split}) == 1 and len(names) > 1:
        common += 1
    return [".".join(s[common:]) for s in split]


def _figure(entries: Sequence[Entry]) -> str:
    """Errors over rates, matrix by matrix; the names stand once, below."""
    known = [(k, e) for k, e in enumerate(entries) if e.error is not None]
    figure = _figure_class()(figsize=(9.4, 5.4 if known else 2.8), layout="constrained")
    if known:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _draw_errors(upper, known)
    else:
        lower = figure.add_subplot()
    for kind, colour in _KINDS.items():
        bars = [(k, e.rate) for k, e in enumerate(entries) if e.kind == kind]
        if bars:
            lower.bar(*zip(*bars, strict=True), color=colour, width=0.7, label=kind)
    lower.set_ylabel("bits per weight")
    names = _short([e.name for e in entries])
    step = max(1, -(-len(names) // 48))
    lower.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6.5)
    lower.set_xlim(-0.8, len(names) - 0.2)
    for axis in figure.axes:
        axis.grid(axis="y", color="#ddd", lw=0.6, which="major")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    unknown = "" if known else "<p class=note>The folder does not say how large the errors are.</p>"
    return unknown + _svg(figure, "errors and rates")


def _draw_errors(axis: Any, known: Sequence[tuple[int, Entry]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for (kind, colour), marker in zip(_KINDS.items(), "oDs^v", strict=True):
        points = [(k, e.error) for k, e in known if e.kind == kind]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, ms=4.5, label=kind, zorder=3)
    for number, (k, e) in enumerate(known):
        label = None if number else "Shannon floor at the stored rate"
        axis.plot([k - 0.42, k + 0.42], [e.floor] * 2, color="#444", lw=1.6, label=label, zorder=2)
    axis.set_yscale("log")
    values = [v for _, e in known for v in (e.error or 0.0, e.floor) if v > 0]
    axis.set_ylim(min(values) / 1.5, max(values) * 2.2)
    # Within one decade powers of ten say nothing: label some values between them too, as plain numbers.
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("relative squared error")
    axis.legend(loc="upper center", ncols=3, frameon=False, fontsize=8.5)


def _svg(figure: Any, name: str) -> str:
    """The figure as an inline element; names of its parts differ from those of other figures on the page."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", bbox_inches="tight", metadata=nothing)
    text = out.getvalue()
    return f'<figure role="img" aria-label="{escape(name)}">{text[text.index("<svg") :]}</figure>'


_COLOURS = ("#2f6f9f", "#d9822b", "#5b9a68", "#9b5fa5", "#b5495b", "#7a7a7a", "#c2a83e", "#3fa7a0")

_KINDS = dict(zip(("linear", "embedding", "conv", "recurrent", "vector"), _COLOURS, strict=False))

_STYLE = """
*{box-sizing:border-box}body{margin:0;background:#f4f4f1;color:#222}
body{font:15px/1.5 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1000px;margin:0 auto;padding:28px 20px 60px}h1{margin:0 0 18px;font-size:30px;line-height:1.2}
.over{margin:0;color:#777;letter-spacing:.08em;text-transform:uppercase;font-size:12px}
h2{font-size:19px;margin:0 0 6px}h3{font-size:15px;margin:0 0 6px}h4{margin:0;color:#777;font-size:12px;font-weight:600}
section{background:#fff;border:1px solid #e3e3de;border-radius:8px;padding:18px 20px;margin:16px 0}
.note{color:#666;font-size:13.5px;margin:0 0 12px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}
.card{background:#fff;border:1px solid #e3e3de;border-radius:8px;padding:14px 16px}
.card b{display:block;font-size:23px;line-height:1.25;white-space:nowrap}.card span{color:#666;font-size:13px}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{text-align:left;color:#777;font-weight:600;font-size:12.5px}
th,td{padding:4px 10px 4px 0;border-bottom:1px solid #eee;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.n+td:not(.n),th.n+th:not(.n){padding-left:18px}.sum td{font-weight:600;border-bottom:0}.name{overflow-wrap:anywhere}
.scroll{overflow-x:auto}
.bar{display:flex;height:22px;border-radius:4px;overflow:hidden;margin:0 0 12px}.bar i{display:block;height:100%}
.dot{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:8px}
figure{margin:10px 0 4px}figure svg{width:100%;height:auto;display:block}summary{cursor:pointer;color:#2f6f9f}
.query{border-top:1px solid #eee;padding:12px 0 4px}.query:first-of-type{border-top:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:22px}ol{margin:2px 0 6px;padding-left:20px;font-size:13.5px}
li.only{background:#fdf0df}small{color:#888;font-variant-numeric:tabular-nums}
@media(max-width:640px){.two{grid-template-columns:1fr}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
""".strip()
