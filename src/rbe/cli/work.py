"""What each command does: call the library, print the outcome."""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbe import checkpoint, convert, metrics
from rbe import evaluate as fidelity
from rbe import profile as measure
from rbe.cli import show, spectra, trial
from rbe.errors import RbeError

if TYPE_CHECKING:
    from rbe import report as page


def compress(source: Path, target: Path, as_json: bool, dry_run: bool, **settings: Any) -> convert.Conversion:
    """`rbe compress`."""
    trial.quiet()
    with show.Steps("encoding", "weights", silent=as_json and not sys.stderr.isatty()) as steps:
        done = convert.compress(source, target, dry_run=dry_run, progress=partial(_tell, steps), **settings)
    if as_json:
        show.machine(done.to_json())
    else:
        _show_conversion(source, done)
    return done


def _tell(steps: show.Steps, event: convert.Progress) -> None:
    if event.stage == "encode":
        steps(event.done, event.total, event.name)
    elif event.stage == "write":
        steps.say("writing", event.name)


def _show_conversion(source: Path, done: convert.Conversion) -> None:
    if done.dry_run:
        rows = []
        for entry in done.plan:
            shape = "x".join(map(str, entry.shape)) or "scalar"
            rows.append([entry.name, shape, entry.format, f"{entry.nbytes:,}", entry.reason])
        show.table(f"{source}: what would be done", ("tensor", "shape", "format", "bytes", "why"), rows, left=(0, 2, 4))
        show.line(
            f"{show.size(done.source_bytes)} become about {show.size(done.nbytes)}: {done.ratio:.2f}:1 against "
            f"float32, {done.ratio / 2:.2f}:1 against float16; {len(done.plan.seeded)} matrices to encode in about "
            f"{show.short(done.seconds)}; {show.size(done.needed_bytes)} of disk space needed; file headers not counted"
        )
        _explain(entry.format for entry in done.plan)
    else:
        weights = sum(math.prod(one.spec.shape) for one in done.encoded)
        error = sum(one.error * math.prod(one.spec.shape) for one in done.encoded) / max(weights, 1)
        again = f" ({done.resumed} from earlier work)" if done.resumed else ""
        show.line(
            f"{done.path}: {show.size(done.nbytes)} for {show.count(done.weights)} weights, "
            f"{done.ratio:.2f}:1 against float32, {done.ratio / 2:.2f}:1 against float16"
        )
        show.line(
            f"{len(done.encoded)} matrices{again} in {show.short(done.seconds)}, mean squared error "
            f"{error:.4f} of the weights"
        )
    for remark in done.remarks:
        show.line(f"note: {remark}")
    if not done.dry_run:
        show.line(f"look at it: rbe inspect {done.path}    compare: rbe eval {done.path} --against {source}")


def _explain(formats: Iterable[str]) -> None:
    """What is not plain in a column of formats."""
    if any(" + " in form for form in formats):
        show.line("+ x %: the share of the weights, the largest, that is kept beside the seeds")


@dataclass(frozen=True)
class Holding:
    """What a compressed folder holds.

    Attributes:
        rows: every matrix and kept tensor.
        parts: bytes by purpose; with the headers they are `stored`.
        stored: bytes of all .safetensors files.
        weights: elements of all of them.
    """

    rows: tuple[checkpoint.Row, ...]
    parts: dict[str, int]
    stored: int
    weights: int

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return metrics.ratio(self.stored, self.weights)


_OURS = {"seeds": "seeds", "scale": "scales", "row_scale": "row scales"}
_OURS |= {"outlier_index": "outliers", "outlier_values": "outliers"}
_PARTS = ("seeds", "scales", "row scales", "outliers", "norms", "biases", "other tensors", "headers")


def holding(folder: Path) -> Holding:
    """Read what a compressed folder holds, every byte checked.

    Raises:
        RbeError: it is not a compressed folder, or damaged.
    """
    require_seeds(folder)
    opened = checkpoint.check_files(folder)
    seeds = {
        name: _OURS[name.rpartition(".")[2]]
        for module, (spec, entry) in checkpoint.specs(opened.config).items()
        for name in checkpoint.expected(module, spec, entry["row_scale"], entry.get("outliers", 0))
    }
    for module in checkpoint.forms(opened.config):
        seed, scale = checkpoint.names(module)
        seeds |= {seed: "seeds", scale: "scales"}
    parts = dict.fromkeys(_PARTS, 0)
    for name, tensor in opened.tensors.items():
        parts[seeds.get(name) or _purpose(name)] += tensor.nbytes
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parts["headers"] = stored - sum(parts.values())
    rows = tuple(checkpoint.inspect(folder))
    return Holding(rows, {n: b for n, b in parts.items() if b}, stored, sum(row.weights for row in rows))


def require_seeds(folder: Path) -> None:
    """Tell a dense model folder, given by mistake, from a damaged compressed one.

    Raises:
        RbeError: it is a dense one, or a run of `rbe train`.
    """
    if (folder / "result.json").is_file() and any((folder / name).is_file() for name in ("model.rbe", "model.pt")):
        raise RbeError(
            f"{folder} is a run of rbe train, no compressed folder; make one of it in Python: "
            f"rbe.save(rbe.train.load({str(folder)!r}), 'NEW_FOLDER')"
        )
    if folder.is_file() or (trial.read_config(folder) and not trial.is_compressed(folder)):
        raise RbeError(f"{folder} is not compressed (no rbe quantization_config); first: rbe compress {folder} DST")


def _purpose(name: str) -> str:
    words = name.lower().replace("_", ".").split(".")
    if any("norm" in word or word in ("ln", "lnf") for word in words):
        return "norms"
    return "biases" if words[-1] == "bias" else "other tensors"


def inspect(folder: Path, everything: bool, as_json: bool, source: Path | None = None) -> None:
    """`rbe inspect`."""
    held = holding(folder)
    kept_of = {} if source is None else spectra.compare_shown(folder, source, as_json)
    if as_json:
        show.machine(
            {
                "folder": folder,
                "tensors": [
                    {**asdict(row), "rate": row.rate, **spectra.figures(row), **spectra.plain(kept_of.get(row.name))}
                    if row.kind != "keep"
                    else asdict(row)
                    for row in held.rows
                ],
                "bytes": held.stored,
                "parts": held.parts,
                "weights": held.weights,
                "bits_per_weight": metrics.bits_per_weight(held.stored, held.weights),
                "ratio_fp32": held.ratio,
                "ratio_fp16": held.ratio / 2,
            }
        )
        return
    rows, kept = [], [row for row in held.rows if row.kind == "keep"]
    for row in held.rows if everything else [row for row in held.rows if row.kind != "keep"]:
        seeded = row.kind != "keep"
        rows.append(
            [
                row.name,
                "x".join(map(str, row.shape)) or "scalar",
                row.format,
                f"{row.rate:.3f}",
                f"{row.nbytes:,}",
                ("?" if row.error is None else f"{row.error:.5f}") if seeded else "exact",
                *(spectra.columns(row) if seeded else ("", "", "")),
            ]
        )
    if kept and not everything:
        count, nbytes = sum(r.weights for r in kept), sum(r.nbytes for r in kept)
        rows.append(
            [f"{len(kept)} others, as they were (--all)", f"{count:,}", "", "", f"{nbytes:,}", "exact", "", "", ""]
        )
    columns = ("tensor", "shape", "format", "bits/weight", "bytes", "error", *spectra.COLUMNS)
    show.table(str(folder), columns, rows, left=(0, 2))
    show.line("")
    share = ", ".join(f"{name} {100 * b / held.stored:.1f} %" for name, b in held.parts.items())
    show.line(
        f"{show.size(held.stored)} ({held.stored:,} bytes) for {held.weights:,} weights, "
        f"{metrics.bits_per_weight(held.stored, held.weights):.3f} bits each: {share}"
    )
    show.line(f"{held.ratio:.2f}:1 against float32, {held.ratio / 2:.2f}:1 against float16")
    show.line(spectra.LEGEND)
    _explain(row.format for row in held.rows)
    if kept_of:
        spectra.show_kept(kept_of, str(source))


def verify(folder: Path, source: Path | None, as_json: bool) -> None:
    """`rbe verify`.

    Raises:
        RbeError: something is not as it was written.
    """
    trial.quiet()
    require_seeds(folder)
    found = checkpoint.verify(folder, source, answers=trial.answers(folder))
    stored = checkpoint.read_fingerprint(folder) if found.ok else None
    asked = found.ok and stored is not None and trial.answers(folder) is not None
    if as_json:
        whole = {"folder": folder, "ok": found.ok, **asdict(found), "fingerprint_checked": asked}
        show.machine({**whole, **({} if found.ok else {"error": "; ".join(found.problems)})})
    elif found.ok:
        against = f", {found.compared} tensors compared with {source}" if source is not None else ""
        answer = "the model answers as it did" if asked else "the model was not run"
        show.line(f"{folder} is sound: {found.tensors} tensors, {show.size(found.nbytes)}, {answer}{against}")
    if not found.ok:
        raise Unsound(folder, found.problems)


class Unsound(RbeError):
    """A folder did not pass; the problems have been said in JSON already where that was asked."""

    said = True

    def __init__(self, folder: Path, problems: tuple[str, ...]) -> None:
        shown = [f"  {problem}" for problem in problems[:20]]
        more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
        super().__init__("\n".join([f"{folder} is not sound: {len(problems)} problem(s)", *shown, *more]))


def decompress(folder: Path, target: Path, as_json: bool) -> None:
    """`rbe decompress`."""
    trial.quiet()
    require_seeds(folder)
    convert.decompress(folder, target)
    files = measure.files(target)
    if as_json:
        show.machine({"folder": folder, "path": target, "bytes": files.weights})
    else:
        show.line(f"{target}: {show.size(files.weights)} of dense weights")


def _evaluate_tensors(folder: Path, source: Path, as_json: bool) -> None:
    """`rbe eval` where there is no model to run: matrix by matrix."""
    require_seeds(folder)
    found = trial.compare_tensors(folder, source)
    if as_json:
        show.machine({"folder": folder, "against": source, "tensors": found})
        return
    rows = [
        [
            one["name"],
            "x".join(map(str, one["shape"])),
            f"{one['error']:.5f}",
            f"{one['sqnr']:.2f}",
            f"{one['cosine']:.5f}",
        ]
        for one in found
    ]
    show.table(f"{folder} against {source}", ("tensor", "shape", "error", "SQNR, dB", "output cosine"), rows)
    show.line("no model to run here: each matrix was multiplied with the same Gaussian vectors as its source")


def entries(held: Holding, kept: dict[str, spectra.Kept] | None = None) -> list["page.Entry"]:
    """The rows of a folder as the report shows them."""
    from rbe import report as page

    spectral = {name: one.spectral_error for name, one in (kept or {}).items()}
    return [page.Entry(r.name, r.kind, r.shape, r.format, r.nbytes, r.error, spectral.get(r.name)) for r in held.rows]


def report(
    folder: Path, output: Path | None, source: Path | None, text: Path | None, limit: int | None, as_json: bool
) -> None:
    """`rbe report`."""
    from rbe import report as page

    trial.quiet()
    output = output or folder.with_name(f"{folder.name}-report.html")
    # Pipes and devices hold nothing that could be lost.
    if (output.is_file() or output.is_dir()) and not _is_page(output):
        raise RbeError(f"{output} exists and is no HTML page; nothing was changed: choose another name")
    held = holding(folder)
    lines: list[page.Comparison] = []
    cards: list[tuple[str, str]] = []
    kept = {} if source is None else spectra.compare_shown(folder, source, as_json)
    facts = [("folder", str(folder)), ("written by", f"rbe report {folder}")]
    if source is not None:
        dense, model = trial.load(source), _load_seeds(folder)
        trial.refuse_unfed(model)
        tokenizer = trial.load_tokenizer(folder, source)
        with show.Steps("comparing", "texts", silent=as_json) as steps:
            found = fidelity.compare(model, dense, tokenizer, trial.read_lines(text), limit=limit, progress=steps)
        speeds = trial.speed({"dense": dense, "seeds": model}, tokenizer)
        lines = [
            *comparisons(found, speeds, "seeds"),
            memory_line(trial.peak_memory(source), trial.peak_memory(folder)),
        ]
        cards = [headline(found)]
        facts += [("compared with", str(source)), ("run on", _run_on(found, text, tokenizer))]
    elif text is not None or limit is not None:
        raise RbeError("--text and --limit compare two models; give the dense one with --against SRC")
    facts += [(name, str(value)) for name, value in trial.machine().items()]
    html = page.render(
        page.Report(
            trial.name_of(folder),
            entries(held, kept),
            held.parts,
            held.stored,
            held.weights,
            lines,
            (),
            cards,
            facts,
            spectra.tables(kept, str(source)) if kept else (),
        )
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")
    if as_json:
        show.machine({"folder": folder, "path": output, "bytes": len(html.encode())})
    else:
        show.line(f"{output}: one page, open it in a browser")


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9).lower() == b"<!doctype"


def headline(found: fidelity.Fidelity) -> tuple[str, str]:
    """The one figure that says most about fidelity."""
    if found.perplexity is not None and found.reference_perplexity is not None:
        return f"{found.perplexity:.2f}", f"perplexity, dense {found.reference_perplexity:.2f}"
    if found.kind == "encoder" and found.agreement is not None:
        return f"{100 * found.agreement:.0f} %", "same nearest text as dense"
    return f"{found.cosine:.3f}", "cosine with dense outputs"


def memory_line(dense: measure.Memory, seeds: measure.Memory) -> "page.Comparison":
    """Peak memory of both models."""
    from rbe import report as page

    ratio = dense.model / max(seeds.model, 1)
    remark = f"{ratio:.2f} times less; over an empty process with the same imports"
    return page.Comparison("peak memory, loading and running", show.size(dense.model), show.size(seeds.model), remark)


def evaluate(folder: Path, source: Path, text: Path | None, limit: int | None, activations: str, as_json: bool) -> None:
    """`rbe eval`."""
    trial.quiet()
    if not (trial.is_model(folder) and trial.is_model(source)):
        _evaluate_tensors(folder, source, as_json)
        return
    given = trial.read_lines(text)
    ours, theirs = (trial.read_config(one).get("model_type") for one in (folder, source))
    if ours != theirs:
        raise RbeError(f"{folder} is a {ours} and {source} a {theirs}; give the dense model that it was made from")
    dense, model = trial.load(source), _load_seeds(folder, activations)
    trial.refuse_unfed(model)
    tokenizer = trial.load_tokenizer(folder, source)
    with show.Steps(
        "comparing", "tokens" if fidelity.kind_of(dense) == "language model" else "texts", as_json
    ) as steps:
        found = fidelity.compare(model, dense, tokenizer, given, limit=limit, progress=steps)
    speeds = trial.speed({"dense": dense, "seeds": model}, tokenizer)
    memory = trial.peak_memory(source), trial.peak_memory(folder, activations)
    if as_json:
        show.machine(
            {
                "folder": folder,
                "against": source,
                "activations": activations,
                "text": None if tokenizer is None else text or "built in",
                "fidelity": found.to_json(),
                "speed": [s.to_json() for s in speeds],
                "peak_memory": {"dense": memory[0].model, "seeds": memory[1].model},
                "machine": trial.machine(),
            }
        )
        return
    lines = [*comparisons(found, speeds, "seeds"), memory_line(*memory)]
    rows = [[c.what, c.dense, c.compressed, c.remark] for c in lines]
    show.table(f"{folder} against {source}", ("", "dense", "in seeds", ""), rows, left=(0, 3))
    show.line(f"run on {_run_on(found, text, tokenizer)}")


def _run_on(found: fidelity.Fidelity, text: Path | None, tokenizer: Any) -> str:
    """What a comparison was made on, for people."""
    amount = f"{found.samples:,} {found.unit}"
    if tokenizer is None:
        return f"random tokens, {amount}: no tokenizer in the folders"
    return f"{text}, {amount}" if text is not None else f"built-in text, {amount}; give another with --text FILE"


def comparisons(found: fidelity.Fidelity, speeds: list[trial.Speed], name: str) -> list["page.Comparison"]:
    """A comparison of two models as lines for people."""
    from rbe import report as page

    what = "sentence embeddings" if found.kind == "encoder" else "logits"
    lines = [
        page.Comparison(
            f"cosine of the {what}",
            "1",
            f"{found.cosine:.4f}",
            f"mean over {found.samples:,} {found.unit}, least {found.cosine_min:.4f}",
        ),
        page.Comparison(f"squared error of the {what}", "0", f"{found.error:.4f}", "relative to the dense ones"),
    ]
    if found.similarity is not None:
        lines.append(
            page.Comparison(
                "order of similarities (Spearman)",
                "1",
                f"{found.similarity:.4f}",
                "over all pairs of texts",
            )
        )
    if found.perplexity is not None and found.reference_perplexity is not None:
        change = 100 * (found.perplexity / found.reference_perplexity - 1)
        lines.append(
            page.Comparison(
                "perplexity per token",
                f"{found.reference_perplexity:.2f}",
                f"{found.perplexity:.2f}",
                f"{change:+.1f} %",
            )
        )
    if found.kl is not None:
        lines.append(page.Comparison("KL divergence, nats", "0", f"{found.kl:.4f}", "from dense to seeds, mean"))
    if found.agreement is not None:
        same = "same nearest text" if found.kind == "encoder" else "same first choice"
        lines.append(page.Comparison(same, "100 %", f"{100 * found.agreement:.1f} %", ""))
    for s in speeds:
        faster = s.rate(name) / s.rate("dense")
        lines.append(
            page.Comparison(
                f"{s.unit} a second, {s.work}", f"{s.rate('dense'):.4g}", f"{s.rate(name):.4g}", f"{faster:.2f} times"
            )
        )
    return lines


def _load_seeds(folder: Path, activations: str = "float32") -> Any:
    require_seeds(folder)
    return trial.load(folder, activations)


def profile(folder: Path, activations: str, as_json: bool) -> None:
    """`rbe profile`."""
    trial.quiet()
    files = measure.files(folder)
    model = trial.load(folder, activations)
    tokenizer = trial.load_tokenizer(folder)
    speeds = trial.speed({"model": model}, tokenizer)
    work = trial.operations(model, tokenizer)
    resident = measure.tensor_bytes(model)
    peak = trial.peak_memory(folder, activations)
    if as_json:
        show.machine(
            {
                "folder": folder,
                "activations": activations,
                "files": measure.to_json(files),
                "tensor_bytes": resident,
                "memory": {**measure.to_json(peak), "model": peak.model},
                "speed": [s.to_json() for s in speeds],
                "operations": {name: measure.to_json(o) for name, o in work.items()},
                "machine": trial.machine(),
            }
        )
        return
    rows = [
        ["weight files", show.size(files.weights), f"of {show.size(files.total)} in {files.count} files"],
        ["tensors in memory", show.size(resident), "parameters and buffers"],
        ["peak memory", show.size(peak.model), "over an empty process, loading and running"],
    ]
    for s in speeds:
        timing = s.timings["model"]
        rows.append(
            [s.work, show.short(timing.median), f"{s.rate('model'):.4g} {s.unit}/s, median of {timing.repeats}"]
        )
        rows.append(
            ["", f"{show.count(work[s.work].macs)}MAC", f"{work[s.work].macs / timing.median / 1e9:.3g} GMAC/s"]
        )
    show.table(str(folder), ("", "", ""), rows, left=(0, 2))
    told = trial.machine()
    show.line(f"{told['processor']}, {told['threads']} threads, kernels: {told['kernels']}, torch {told['torch']}")
