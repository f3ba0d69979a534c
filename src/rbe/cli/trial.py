"""A compressed folder beside its source: load either kind, run the same work through both, measure.

The command line, the demo and the benchmarks all measure through this file.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rbe import evaluate, profile
from rbe.errors import RbeError
from rbe.sampling import read_on
from rbe.source import architecture


@dataclass(frozen=True)
class Speed:
    """How long one piece of work takes in each model.

    Attributes:
        work: what was done, for people.
        unit: what is counted: "texts" or "tokens".
        amount: how many of them one call is.
        timings: by the name of the model.
    """

    work: str
    unit: str
    amount: int
    timings: Mapping[str, profile.Timing]

    def rate(self, name: str) -> float:
        """Units a second, by the median."""
        return self.amount / self.timings[name].median

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        rates = {f"{self.unit}_per_second": {name: self.rate(name) for name in self.timings}}
        return {"work": self.work, "median_seconds": {n: t.median for n, t in self.timings.items()}, **rates}


def quiet() -> None:
    """No progress bars and no advice from the libraries below: standard output belongs to our results."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError:
        return
    loud: Any = transformers.logging
    loud.set_verbosity_error()
    loud.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder, {} where there is none.

    Raises:
        RbeError: no such folder, or the file is damaged.
    """
    if not folder.exists():
        raise RbeError(f"{folder} does not exist; give a model folder")
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RbeError(f"{path} cannot be read ({cause}); the folder is damaged") from cause
    return config if isinstance(config, dict) else {}


def is_compressed(folder: Path) -> bool:
    """Whether a folder says that it holds seeds."""
    about = read_config(folder).get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == "rbe"


def is_model(folder: Path) -> bool:
    """Whether transformers can build the model of a folder (otherwise it only holds tensors)."""
    return folder.is_dir() and bool(read_config(folder).get("model_type"))


def name_of(folder: Path) -> str:
    """A name for people: what the configuration says, or the folder's own."""
    named = str(read_config(folder).get("_name_or_path") or "")
    return Path(named).name or folder.resolve().name


def require_transformers(what: str) -> Any:
    """The transformers module.

    Raises:
        RbeError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise RbeError(f"{what} needs transformers; install it with: pip install 'rbe[hf]'") from None
    return transformers


def load(folder: Path, activations: str = "float32") -> Any:
    """The model of a folder, dense or compressed, as the class it was saved as, in float32 and evaluation mode.

    Raises:
        RbeError: no such folder, not a transformers model, or int8 activations asked of a dense model.
    """
    transformers = require_transformers("running a model")
    config = read_config(folder)
    if not config.get("model_type"):
        raise RbeError(f"{folder} cannot be run: it has no config.json that names a transformers model_type")
    if is_compressed(folder):
        import rbe.hf

        return rbe.hf.load(folder, activations=activations, dtype=torch.float32).eval()
    if activations != "float32":
        raise RbeError(f"{folder} is a dense model; activations {activations!r} are for models in seeds")
    model_class = getattr(transformers, architecture(config) or "AutoModel", None) or transformers.AutoModel
    try:
        model = model_class.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as cause:
        raise RbeError(f"{folder} cannot be loaded as {model_class.__name__}: {cause}") from cause
    return model.eval()


def load_tokenizer(folder: Path, *others: Path) -> Any:
    """The tokenizer of the first folder that has one, or None."""
    transformers = require_transformers("reading text")
    for candidate in (folder, *others):
        if any((candidate / name).is_file() for name in _TOKENIZER_FILES):
            try:
                return transformers.AutoTokenizer.from_pretrained(candidate, local_files_only=True)
            except (OSError, ValueError) as cause:
                raise RbeError(f"the tokenizer in {candidate} cannot be loaded: {cause}") from cause
    return None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def read_lines(text: Path | None) -> list[str] | None:
    """The lines of a text file, line ends kept; None for None.

    Raises:
        RbeError: the file cannot be read as UTF-8 text.
    """
    if text is None:
        return None
    try:
        with text.open(encoding="utf-8", newline="") as file:
            # Only "\n" ends a line; str.splitlines would also cut at form feeds and the like.
            return list(file)
    except (OSError, UnicodeDecodeError) as cause:
        raise RbeError(f"--text {text} cannot be read: {cause}") from cause


def refuse_unfed(model: Any) -> None:
    """Refuse models that one text alone cannot run.

    Raises:
        RbeError: it is an encoder with a decoder, or reads no text.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise RbeError(
            f"{name} has an encoder and a decoder, which cannot be run on texts here; `rbe verify` can check it"
        )
    if not getattr(model.config.get_text_config(), "vocab_size", None):
        raise RbeError(f"{name} reads no text, so it cannot be run here; `rbe verify` can check its bytes")


def works(model: nn.Module, tokenizer: Any) -> dict[str, tuple[str, int, Callable[[Any], object]]]:
    """The pieces of work that a model of this kind is timed on: name -> (unit, amount, call of a model)."""
    refuse_unfed(model)
    kind = evaluate.kind_of(model)
    context = evaluate.context_of(model, tokenizer)
    if kind == "language model":
        return _language_works(model, context)
    texts = list(evaluate.SENTENCES)
    found: dict[str, tuple[str, int, Callable[[Any], object]]] = {}
    for count in (1, len(texts)):
        if tokenizer is None:
            ids = torch.randint(0, model.config.vocab_size, (count, min(16, context)))  # type: ignore[union-attr, arg-type]
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            cut = min(512, context)
            inputs = dict(tokenizer(texts[:count], padding=True, truncation=True, max_length=cut, return_tensors="pt"))
        name = "one text" if count == 1 else f"{count} texts at once"
        found[name] = ("texts", count, partial(_call, inputs))
    return found


def _call(inputs: dict[str, Any], model: Any) -> object:
    return model(**inputs)


def _language_works(model: Any, context: int) -> dict[str, tuple[str, int, Callable[[Any], object]]]:
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(0, vocabulary, (1, min(256, context)), generator=draw)
    start, steps = window[:, : min(16, context // 2)], min(16, context // 2 - 1)

    def write(m: Any) -> object:
        logits, cache = read_on(m, start)
        for _ in range(steps):
            logits, cache = read_on(m, logits[:, -1:].argmax(-1), cache)
        return logits

    return {
        f"write {steps} tokens": ("tokens", steps, write),
        f"read {window.shape[1]} tokens": ("tokens", window.shape[1], lambda m: m(input_ids=window)),
    }


def speed(models: Mapping[str, nn.Module], tokenizer: Any, repeats: int = 9, seconds: float = 15.0) -> list[Speed]:
    """Time the same work in every model, in turns."""
    first = next(iter(models.values()))
    found = []
    for name, (unit, amount, call) in works(first, tokenizer).items():
        calls = {label: partial(call, model) for label, model in models.items()}
        found.append(Speed(name, unit, amount, profile.time_each(calls, repeats=repeats, seconds=seconds)))
    return found


def peak_memory(folder: Path, activations: str = "float32") -> profile.Memory:
    """Peak resident memory of loading a folder and running it once, in a fresh process."""
    return profile.memory(
        imports="import rbe.hf\nfrom pathlib import Path\nfrom rbe.cli import trial\n"
        "folder = Path(arguments['folder'])\ntokenizer = trial.warm(folder)",
        setup="model = trial.load(folder, arguments['activations'])",
        statement="trial.run_once(model, tokenizer)",
        arguments={"folder": str(folder.resolve()), "activations": activations},
    )


def warm(folder: Path) -> Any:
    """Bring in what any model of this kind needs, so that it is not counted as the model's memory.

    That is the code of the architecture, the tokenizer, and the buffers of the matrix library.
    """
    quiet()
    transformers = require_transformers("running a model")
    getattr(transformers, architecture(read_config(folder)) or "AutoModel", None)
    x = torch.ones(64, 64)
    torch.nn.functional.gelu(x @ x).softmax(-1)
    return load_tokenizer(folder)


def run_once(model: nn.Module, tokenizer: Any) -> None:
    """Every piece of work once."""
    with torch.inference_mode():
        for _, _, call in works(model, tokenizer).values():
            call(model)


def operations(model: nn.Module, tokenizer: Any) -> dict[str, profile.Operations]:
    """Multiply-adds of every piece of work."""
    with torch.no_grad():
        return {
            name: profile.operations(partial(call, model)) for name, (_, _, call) in works(model, tokenizer).items()
        }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from rbe import kernels

    model = ""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    tier = getattr(kernels, "tier", None)
    return {
        "processor": model or "unknown",
        "threads": torch.get_num_threads(),
        "kernels": tier() if tier is not None else "reference",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def answers(folder: Path) -> Callable[[Path, dict[str, Any]], str | None] | None:
    """What compares a folder's answer with its stored one; None where no model can be run."""
    if not is_model(folder):
        return None
    try:
        import rbe.hf
    except ImportError:
        return None
    return rbe.hf.check_fingerprint


def compare_tensors(folder: Path, source: Path) -> list[dict[str, Any]]:
    """Every seed matrix beside its dense source: error, signal to noise, cosine of products with Gaussian vectors.

    Raises:
        RbeError: a matrix is missing in the source, or has another shape there.
    """
    from rbe import checkpoint, metrics
    from rbe.source import open_source

    opened = checkpoint.check_files(folder)
    dense = open_source(source).tensors
    found = []
    for module, (spec, entry) in checkpoint.specs(opened.config).items():
        stored, sides = dense.get(checkpoint.weight_name(module, entry)), checkpoint.weight_sides(spec, entry)
        if stored is None or stored.shape != sides:
            raise RbeError(f"{source} has no {'x'.join(map(str, sides))} weight {module}; is it the source?")
        weight = checkpoint.as_matrix(stored.read(copy=False).float(), spec, entry["transposed"])
        matrix = opened.matrix(module)
        error = checkpoint.measured_error(matrix, weight)
        x = torch.randn(8, spec.shape[1], generator=torch.Generator().manual_seed(0))
        cosine = metrics.cosine(matrix.matmul(x), x @ weight.T).mean().item()
        found.append(
            {"name": module, "shape": spec.shape, "error": error, "sqnr": metrics.sqnr(error), "cosine": cosine}
        )
    return found
