"""How much a sentence encoder's figures depend on the draw of its rotations: `python -m benchmarks.rotations`.

Two encodings of the same settings differ by their random rotations alone, and so do their STS-B figures: by more than
most settings differ. This prints 15:1, the bits spread by sensitivity to random tokens, for several rotations, and the
mean. `--mixed` takes rates chosen by hand in place of that, and `--calibrate random` encodes with second moments from
random tokens.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.models import ALLOCATED, sentence_pairs, sentence_source
from rbe import convert, evaluate, metrics
from rbe.cli import trial

# Rates chosen among eight such mixtures on the very sentence pairs: what hands can do.
MIXED = {"bits": 2.5, "embeddings_bits": 1.5, "rates": {"*.attention.*": 3.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--effort", default="fast", choices=["fast", "balanced", "best"])
    parser.add_argument("--calibrate", default=None)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--rotations", type=int, default=6)
    args = parser.parse_args()
    rates = MIXED if args.mixed else {"bits": ALLOCATED, "allocate": "random"}
    trial.quiet()
    source = sentence_source()
    tokenizer, (texts, gold) = trial.load_tokenizer(source), sentence_pairs()

    def measure(folder: Path) -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            found = evaluate.embed(trial.load(folder), tokenizer, texts)
        half = len(texts) // 2
        return found, metrics.spearman(metrics.cosine(found[:half], found[half:]), gold)

    wanted, dense = measure(source)
    print(f"dense: Spearman {dense:.4f}\n\n| rotation | bytes | Spearman | of dense, % | cosine to dense |")
    print("|---|---|---|---|---|")
    shares = []
    with tempfile.TemporaryDirectory() as parent:
        for seed in range(args.rotations):
            folder = Path(parent) / "seeds"
            convert.compress(source, folder, effort=args.effort, calibrate=args.calibrate, seed=seed, **rates)
            found, rank = measure(folder)
            shares.append(100 * rank / dense)
            nbytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            cosine = metrics.cosine(found, wanted).mean().item()
            print(f"| {seed} | {nbytes:,} | {rank:.4f} | {shares[-1]:.2f} | {cosine:.4f} |", flush=True)
            shutil.rmtree(folder)
    spread = torch.tensor(shares).std().item() if len(shares) > 1 else 0.0
    print(f"\nmean {sum(shares) / len(shares):.2f} % of dense, standard deviation {spread:.2f}")


if __name__ == "__main__":
    main()
