"""What the inputs of a model's layers look like: their second moments, from random tokens or from given inputs.

A token's part is weighted by how strongly the model's answer hangs on the layer's output there: the squared gradient of
a random direction of the outputs. Without it the few tokens with huge activations, which a normalisation behind the
layer makes harmless, would decide everything.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError

# Tokens read, and the lengths of the sequences they come in.
TOKENS = 20480
_LENGTHS = (16, 64)
_AT_ONCE = 2048
# Added to the moments, as a share of their mean diagonal: directions that random tokens never take must not be free.
DAMPING = 0.3
_LONGEST_LINE = 256
# Characters of a line that are looked at: far more than so many tokens have, far fewer than a file without line ends.
_LONGEST_TEXT = 64 * _LONGEST_LINE
_PLACEHOLDER = re.compile(r"[\[<].*(unused|reserved|extra_id).*[\]>]")


def random_tokens(
    vocabulary: int,
    tokenizer: Any = None,
    context: int = 64,
    tokens: int | None = None,
    seed: int = 0,
    together: int | None = None,
    uniform: float = 0.5,
) -> Iterator[dict[str, Tensor]]:
    """Random sequences: some of the tokens uniform, the others with a probability that falls like 1 / rank.

    Tokenizers number their tokens roughly from frequent to rare, so the rank stands for the frequency.

    >>> [tuple(b["input_ids"].shape) for b in random_tokens(100, tokens=4096)]
    [(128, 16), (32, 64)]

    Args:
        vocabulary: number of tokens the model knows.
        tokenizer: of transformers; its special tokens are put around every sequence, and not inside.
        context: the longest sequence.
        tokens: how many there are together, about; default `TOKENS`.
        seed: the same gives the same sequences.
        together: most tokens of a batch; default 2,048.
        uniform: share of the tokens that are uniform.

    Yields:
        {"input_ids", "attention_mask"}, both int64 (sequences, length).
    """
    start, end, known = _specials(tokenizer, vocabulary)
    g = torch.Generator().manual_seed(seed)
    count = len(known)
    tokens = TOKENS if tokens is None else tokens
    together = _AT_ONCE if together is None else together
    for length in sorted({max(1, min(length, context)) for length in _LENGTHS}):
        rows = max(1, tokens // len(_LENGTHS) // length)
        inside = max(1, length - len(start) - len(end))
        for first in range(0, rows, max(1, together // length)):
            shape = (min(rows - first, max(1, together // length)), inside)
            frequent = (float(count) ** torch.rand(shape, generator=g, dtype=torch.float64)).long() - 1
            even = torch.randint(count, shape, generator=g)
            rank = torch.where(torch.rand(shape, generator=g) < uniform, even, frequent).clamp_(0, count - 1)
            around = [torch.tensor(ids, dtype=torch.int64).expand(shape[0], len(ids)) for ids in (start, end)]
            ids = torch.cat((around[0], known[rank], around[1]), 1)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _specials(tokenizer: Any, vocabulary: int) -> tuple[list[int], list[int], Tensor]:
    """(tokens before a sequence, behind it, tokens that may be inside it)."""
    everything = torch.arange(vocabulary)
    if tokenizer is None:
        return [], [], everything
    ids = tokenizer("a")["input_ids"]
    special = set(tokenizer.all_special_ids)
    plain = [k for k, token in enumerate(ids) if token not in special]
    start, end = (ids[: plain[0]], ids[plain[-1] + 1 :]) if plain else ([], [])
    names = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    fit = [k for k, n in enumerate(names) if k not in special and n is not None and not _PLACEHOLDER.fullmatch(n)]
    return start, end, torch.tensor(fit) if fit else everything


def text_tokens(
    lines: Iterable[str], tokenizer: Any, context: int = 64, tokens: int | None = None, option: str = "calibrate"
) -> Iterator[dict[str, Tensor]]:
    """The lines of a text as a model reads them, one a batch, until there are enough tokens.

    Args:
        option: what a complaint is about.

    Raises:
        RbeError: there is no tokenizer, or no text.
    """
    if tokenizer is None:
        raise RbeError(f"{option}: text needs the model's tokenizer, and there is none; give 'random' instead")
    read = 0
    for line in lines:
        line = line.strip()[:_LONGEST_TEXT]
        ids = tokenizer(line, verbose=False)["input_ids"] if line else []
        ids = ids[: min(context, _LONGEST_LINE)]
        if len(ids) < 2:
            continue
        given = torch.tensor([ids])
        yield {"input_ids": given, "attention_mask": torch.ones_like(given)}
        read += len(ids)
        if read >= (TOKENS if tokens is None else tokens):
            return
    if read == 0:
        raise RbeError(f"{option}: the text has no line of two tokens or more; give sentences, one a line")


def longest(config: Any, most: int) -> int:
    """Tokens that a model of transformers reads at once, at most `most`."""
    known = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    # RoBERTa-like models start their positions behind the padding index, so two of the rows are no context.
    taken = 2 if "roberta" in str(getattr(config, "model_type", "")) else 0
    return int(min([most, *(k - taken for k in known if k)]))


def for_both_sides(batches: Iterable[dict[str, Tensor]], config: Any) -> Iterator[dict[str, Tensor]]:
    """The batches, whose tokens the decoder of a model with an encoder reads too."""
    for batch in batches:
        both = bool(getattr(config, "is_encoder_decoder", False))
        yield {**batch, "decoder_input_ids": batch["input_ids"]} if both else batch


def second_moments(
    model: nn.Module, layers: Collection[str], batches: Iterable[Any], damping: float = DAMPING
) -> dict[str, Tensor]:
    """E[x x^T] of the inputs x of layers, weighted by what each token's output is worth, with damping.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> moments = second_moments(model, ["0", "2"], [torch.randn(50, 8)])
    >>> moments["2"].shape
    torch.Size([16, 16])

    Args:
        model: runs forward and backward on one batch at a time; its weights are not changed.
        layers: paths of modules whose input is (..., columns).
        batches: what the model is called with: a mapping of arguments, a tuple of them, or one tensor.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        float64 (columns, columns) by path; layers that the answer does not hang on are missing.
        Memory: these matrices, the model, and the activations of one batch.

    Raises:
        RbeError: there are no inputs, the model cannot be run on a batch, or its activations are not finite.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    empty = True
    with ExitStack() as undo:
        undo.enter_context(still(model))
        for name in layers:
            hook = model.get_submodule(name).register_forward_hook(_watch(name, sums), with_kwargs=True)
            undo.callback(hook.remove)
        undo.enter_context(running(model, "calibrate"))
        for batch in batches:
            empty = False
            answer = answer_of(call(model, batch))
            if not bool(torch.isfinite(answer).all()):
                raise RbeError("calibrate: the model's outputs are NaN or infinite; the model is damaged")
            if answer.requires_grad:
                _objective(answer, generator).backward()  # type: ignore[no-untyped-call]
    if empty:
        raise RbeError("calibrate: there are no inputs; give some, or 'random'")
    for name, total in sums.items():
        mean = total.diagonal().mean()
        if not bool(torch.isfinite(total).all()):
            raise RbeError(f"calibrate: inputs of {name} are NaN or infinite; the model is damaged, or overflows")
        if mean > 0:
            total.div_(mean)
            total.diagonal().add_(damping)
    return {name: total for name, total in sums.items() if bool(total.any())}


def _watch(name: str, sums: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:
            # A copy, because what follows may change it in place, which a leaf of the graph does not allow.
            output = output.requires_grad_(True).clone()
        x = (given[0] if given else next(iter(named.values()))).detach()
        version = x._version

        def add(gradient: Tensor) -> None:
            if x._version != version:
                raise RbeError(
                    f"calibrate: the model changes the input of {name} in place after the layer has read it, so that "
                    "it is gone; exclude the layer, or leave calibrate out"
                )
            rows = x.reshape(-1, x.shape[-1]).double()
            weight = gradient.reshape(len(rows), -1).double().square().mean(1, keepdim=True)
            part = rows.T @ (rows * weight)
            sums[name] = part if name not in sums else sums[name].add_(part)

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    return hook


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """A model in evaluation, its parameters without gradients and gradients on; afterwards it is as it was."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for p in model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        model.eval()
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        yield


@contextmanager
def running(model: nn.Module, option: str) -> Iterator[None]:
    """Turn what a model raises on inputs, whatever it is, into a message.

    Raises:
        RbeError: the model raised something.
    """
    try:
        yield
    except (RbeError, MemoryError):
        raise
    except Exception as cause:
        raise RbeError(
            f"{option}: {type(model).__name__} cannot be run on the inputs ({type(cause).__name__}: {cause}); give "
            f"{option} inputs that it takes, or leave it out"
        ) from cause


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def answer_of(output: Any) -> Tensor:
    """The tensor that a model is asked for: logits, hidden states, or the first of what it returns."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    while isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns a {type(output).__name__}")
    return output


def _objective(answer: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the answer; its gradient says what every token is worth."""
    signs = 2 * torch.randint(0, 2, answer.shape, generator=generator).to(answer) - 1
    return (answer * signs).sum()
