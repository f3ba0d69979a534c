"""What the dense model of a source tells about its matrices: it is run on random tokens, or on a text."""

import hashlib
import importlib
import importlib.util
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbe import calibrate, formats, sensitivity
from rbe.allocate import Plan
from rbe.convert.encoding import Job
from rbe.errors import RbeError
from rbe.source import Names, Source, architecture

# Bytes of second moments held at a time; the layers of a larger model are taken in several turns.
AT_ONCE = 1 << 30
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


class Calibration:
    """The dense model of a folder with the inputs to run it on.

    Attributes:
        identity: what the result depends on, for the journal.
    """

    def __init__(self, dense: Source, how: str | Path, option: str = "calibrate") -> None:
        text = None if str(how) == "random" else Path(how)
        if dense.bare or importlib.util.find_spec("transformers") is None:
            raise RbeError(
                f"{option}: {dense.path} cannot be run (it needs a config.json, and transformers); leave {option} out"
            )
        if text is not None and not text.is_file():
            raise RbeError(f"{option}: {text} is no file; give 'random', or a text file with a sentence a line")
        self.dense, self.option = dense, option
        try:
            self.lines = None if text is None else text.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as cause:
            raise RbeError(f"{option}: {text} is no UTF-8 text ({cause})") from cause
        told = None if self.lines is None else hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        self.identity = "random" if told is None else f"text {told}"
        self._model: Any = None

    def _load(self) -> Any:
        if self._model is None:
            transformers: Any = importlib.import_module("transformers")
            kind = getattr(transformers, architecture(self.dense.config or {}), None) or transformers.AutoModel
            try:
                self._model = kind.from_pretrained(self.dense.path, local_files_only=True, dtype=torch.float32).eval()
                self.vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
            except (OSError, ValueError, RuntimeError, AttributeError, NotImplementedError) as cause:
                raise RbeError(
                    f"{self.option}: {self.dense.path} cannot be run as a model of tokens: {cause}"
                ) from cause
            self.tokenizer = None
            # Without these files transformers would make up a tokenizer that knows nothing.
            if not any((self.dense.path / name).is_file() for name in _TOKENIZER_FILES):
                return self._model
            try:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.dense.path, local_files_only=True)
            except (OSError, ValueError, ImportError, KeyError, AttributeError) as cause:
                raise RbeError(
                    f"{self.option}: the tokenizer in {self.dense.path} cannot be loaded: {cause}"
                ) from cause
        return self._model

    def _batches(self, tokens: int | None = None, **options: Any) -> Any:
        """Inputs of so many tokens; random ones with these options of `calibrate.random_tokens`."""
        config = self._model.config
        context = calibrate.longest(config, 2048)
        if self.lines is None:
            batches = calibrate.random_tokens(self.vocabulary, self.tokenizer, context, tokens, **options)
        else:
            batches = calibrate.text_tokens(self.lines, self.tokenizer, context, tokens, self.option)
        return calibrate.for_both_sides(batches, config)

    def moments(self, names: Collection[str]) -> dict[str, Tensor]:
        """Second moments by the tensors' names in the source."""
        model = self._load()
        translate = Names(model)
        paths = {name: translate.module(name) for name in names}
        found = calibrate.second_moments(model, sorted(set(paths.values())), self._batches())
        return {name: found[path] for name, path in paths.items() if path in found}

    def sensitivities(self, plan: Plan) -> dict[str, Tensor]:
        """How much the model's answer hangs on each matrix of a plan, by name in the source; layers alone are asked."""
        model = self._load()
        translate = Names(model)
        known = dict(model.named_parameters(remove_duplicate=False))
        paths = {e.name: f"{translate.module(e.name)}.weight" for e in plan.seeded if e.name.endswith(".weight")}
        weights = {paths[e.name]: e.row_scale for e in plan.seeded if paths.get(e.name) in known}
        inputs = self._batches(**sensitivity.INPUTS)
        found = sensitivity.sensitivities(model, weights, inputs)
        return {name: found[path] for name, path in paths.items() if path in found}

    def token_table(self, plan: Plan) -> list[str]:
        """The entry of the plan that is the table of input tokens, if there is one."""
        model = self._load()
        translate = Names(model)
        known = dict(model.named_parameters(remove_duplicate=False))
        table = model.get_input_embeddings().weight
        return [e.name for e in plan.seeded if known.get(f"{translate.module(e.name)}.weight") is table]

    def turns(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """The jobs, in order, in parts whose moments fit into memory together."""
        parts: list[list[Job]] = [[]]
        held = 0
        for job in jobs:
            need = moments_bytes(job)
            if held + need > AT_ONCE and parts[-1]:
                parts.append([])
                held = 0
            parts[-1].append(job)
            held += need
        return parts

    def prepared_turns(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """The jobs with their moments, so many at a time as fit into memory together."""
        return (self.prepared(part) for part in self.turns(jobs))

    def prepared(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with the moments that there are for them."""
        names = [job.entry.name for job in jobs if moments_bytes(job)]
        found = self.moments(names) if names else {}
        return [replace(job, moments=found.get(job.entry.name)) for job in jobs]


def moments_bytes(job: Job) -> int:
    """Bytes of the moments that a matrix can use; 0 where it uses none."""
    spec = job.entry.spec
    plain = job.entry.kind == "linear" and job.entry.name.endswith(".weight")
    if spec is None or formats.is_disk(spec.format) or not plain:
        return 0
    return 8 * int(spec.shape[1]) ** 2
