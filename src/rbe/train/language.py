"""The next token of a text: perplexity per token in windows that do not overlap."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.train.config import Config, Model
from rbe.train.networks import dense
from rbe.train.reading import find
from rbe.train.task import TOKENIZER, Batch, Split, Subwords, check_symbols, checksum, device_of


def tokenizers() -> Any:
    """The package `tokenizers`.

    Raises:
        RbeError: it is not installed.
    """
    try:
        import tokenizers as package
    except ImportError:
        raise RbeError("train: subwords need tokenizers; install it with: pip install 'rbe[train]'") from None
    return package


def read_tokenizer(path: Path) -> Any:
    """A tokenizer.json.

    Raises:
        RbeError: it cannot be read, or the package `tokenizers` is not installed.
    """
    try:
        return tokenizers().Tokenizer.from_file(str(path))
    except RbeError:
        raise
    except Exception as cause:  # the package raises plain Exception
        raise RbeError(f"train: the tokenizer {path} cannot be read ({cause})") from cause


class Language(Subwords):
    """Windows of texts in the tokens of a given tokenizer."""

    metric, rises = "perplexity", False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.data.tokenizer is not None
        folder, path = find(config, config.data.path), find(config, config.data.tokenizer) / TOKENIZER
        self.tokenizer = read_tokenizer(path)
        check_symbols(config, self.tokenizer.get_vocab_size())
        self.parts = {part: _tokens(self.tokenizer, folder / f"{part}.txt") for part in ("train", "valid", "test")}
        for part, tokens in self.parts.items():
            if len(tokens) < 2 * config.data.length:
                raise RbeError(f"train: {folder / part}.txt has only {len(tokens)} tokens; shorten [data] length")

    @property
    def examples(self) -> int:
        """Windows to train on."""
        return len(self.parts["train"]) // self.config.data.length - 1

    @property
    def check(self) -> int:
        """Of the tokens."""
        return checksum(self.parts["train"])

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Windows in a random order, at offsets that change from epoch to epoch."""
        length, tokens = self.config.data.length, self.parts["train"]
        start = int(torch.randint(0, length, (), generator=generator))
        windows = start + length * torch.arange(self.examples)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(windows[order], self.config.train.batch):
            cells = chosen[:, None] + torch.arange(length)
            yield Batch((tokens[cells][:, :-1],), tokens[cells][:, 1:])

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split) -> float:
        """Perplexity; the first token of a window is not counted, as nothing comes before it."""
        length = self.config.data.length
        tokens = self.parts["valid" if split == "validation" else "test"]
        windows = tokens[: len(tokens) // length * length].view(-1, length)
        if split == "validation":
            windows = windows[: self.config.data.validation]
        windows = windows.to(device_of(model))
        training = model.training
        model.eval()
        total = 0.0
        for batch in torch.split(windows, 8):
            out = model(batch[:, :-1])
            total += float(functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        model.train(training)
        return math.exp(min(total / windows[:, 1:].numel(), 700.0))

    def foreign(self, folder: str) -> nn.Module:
        """The model of a GPT-2 folder of transformers, of whatever size."""
        path = find(self.config, folder)
        network = dense(replace(self.config, model=named_sizes(self.config.model, path)))
        adopt(network, path)
        return network.eval().requires_grad_(False)


def _tokens(tokenizer: Any, path: Path) -> Tensor:
    """All tokens, line by line, with line ends."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as cause:
        raise RbeError(
            f"train: {path} cannot be read as text ({cause}); the folder needs train, valid and test"
        ) from cause
    return torch.tensor([code for one in tokenizer.encode_batch(lines) for code in one.ids])


# What a GPT-2 folder may ask for, what it asks for without saying so first.
COMPUTED: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# Numbers of a folder are below it.
MOST = 1 << 24


def named_sizes(model: Model, folder: Path) -> Model:
    """The sizes that a GPT-2 folder of transformers names.

    Raises:
        RbeError: it names none, or another architecture than `Gpt` computes.
    """
    path = folder / "config.json"
    try:
        named = json.loads(path.read_bytes())
        size, wide = named["n_embd"], named.get("n_inner")
        inner = 4 * size if wide is None else wide
        vocabulary, layers, heads = (named[key] for key in ("vocab_size", "n_layer", "n_head"))
        settings = {key: named.get(key, usual) for key, (usual, *_) in COMPUTED.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise RbeError(f"train: {path} cannot be read ({cause!r}); name a GPT-2 folder of transformers") from cause
    numbers = {"n_embd": size, "n_inner": inner, "vocab_size": vocabulary, "n_layer": layers, "n_head": heads}
    for key, number in numbers.items():
        if type(number) is not int or not 0 < number < MOST:
            raise RbeError(f"train: {path}: {key} is {number!r}, which is no GPT-2 model; name another folder")
    if size % heads:
        raise RbeError(
            f"train: {path}: {heads} heads do not divide {size}, which is no GPT-2 model; name another folder"
        )
    for key, value in settings.items():
        if value not in COMPUTED[key]:
            offered = " or ".join(map(str, COMPUTED[key]))
            raise RbeError(
                f"train: {path}: {key} is {value!r}, but only {offered} is computed here; name another folder"
            )
    return replace(model, vocabulary=vocabulary, layers=layers, size=size, heads=heads, inner=inner)


def adopt(model: nn.Module, folder: Path) -> None:
    """Copy what a GPT-2 folder of transformers has into the dense tensors of a `Gpt`; seeds stay as they are.

    Of places, as many as the windows are long.

    Raises:
        RbeError: the folder holds another architecture or other sizes.
    """
    path = folder / "model.safetensors"
    try:
        stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as cause:
        raise RbeError(f"train: {path} cannot be read ({cause}); name a GPT-2 folder of transformers") from cause
    own = dict(model.named_parameters())
    layers = {int(name.split(".")[1]) for name in stored if name.startswith("h.") and name.split(".")[1].isdigit()}
    blocks = {int(name.split(".")[1]) for name in own if name.startswith("blocks.")}
    if more := sorted(layers - blocks):
        raise RbeError(
            f"train: {folder} has a layer {more[0]}, which its config.json does not count; name another folder"
        )
    for name, parameter in own.items():
        part, _, kind = name.rpartition(".")
        source = _names(part)
        if source is None or kind not in ("weight", "bias"):
            continue
        tensor = stored.get(f"{source}.{kind}")
        if tensor is None:
            raise RbeError(f"train: {folder} has no {source}.{kind}; it must be a GPT-2 folder of transformers")
        tensor = tensor.float()
        tensor = tensor.T if kind == "weight" and ".c_" in f".{source}" else tensor
        tensor = tensor[: len(parameter)] if part == "place" else tensor
        if tensor.shape != parameter.shape:
            told = "; shorten [data] length" if part == "place" else "; name another folder"
            raise RbeError(
                f"train: {folder}: {source}.{kind} is {tuple(tensor.shape)}, here it is {tuple(parameter.shape)}{told}"
            )
        if not tensor.isfinite().all():
            raise RbeError(f"train: {folder}: {source}.{kind} has numbers that are not finite; fetch the model again")
        parameter.data.copy_(tensor)


_PARTS = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "inner": "mlp.c_fc",
    "outer": "mlp.c_proj",
}


def _names(part: str) -> str | None:
    """What GPT-2 calls a part of a `Gpt`."""
    whole = {"embed": "wte", "place": "wpe", "norm": "ln_f"}
    if part in whole:
        return whole[part]
    if not part.startswith("blocks."):
        return None
    _, number, rest = part.split(".", 2)
    return f"h.{number}.{_PARTS[rest]}" if rest in _PARTS else None
