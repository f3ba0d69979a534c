"""What `rbe generate` does."""

import sys
import time
from pathlib import Path

from rbe import evaluate as fidelity
from rbe import sampling
from rbe.cli import show, trial
from rbe.errors import RbeError


def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    activations: str,
    as_json: bool,
) -> None:
    """`rbe generate`."""
    trial.quiet()
    model = trial.load(folder, activations)
    if fidelity.kind_of(model) != "language model":
        raise RbeError(f"{folder} holds a {type(model).__name__}, which does not write text; give a language model")
    tokenizer = trial.load_tokenizer(folder)
    if tokenizer is None:
        raise RbeError(f"{folder} has no tokenizer; copy the tokenizer files of the source model there")
    context = fidelity.context_of(model, tokenizer, most=1 << 16)
    pieces = sampling.stream(model, tokenizer, prompt, max_new_tokens, temperature, top_k, seed, context)
    start, text = time.perf_counter(), ""
    if not as_json:
        print(prompt, end="", flush=True)
    for piece in pieces:
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    taken = time.perf_counter() - start
    made = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if as_json:
        show.machine({"prompt": prompt, "text": text, "tokens": made, "seconds": taken, "activations": activations})
        return
    print()
    if sys.stderr.isatty():
        show.err().print(f"{made} tokens, {made / taken:.1f} a second", style="dim")
