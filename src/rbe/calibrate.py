"""What the inputs of a model's layers look like: their second moments, from random tokens or from given inputs.

A token's part is weighted by how strongly the model's answer hangs on the layer's output there: the squared gradient of
a random direction of the outputs. Without it the few tokens with huge activations, which a normalisation behind the
layer makes harmless, would decide everything.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
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
    lines: Iterable[str], tokenizer: Any, context: int = 64, tokens: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The lines of a text as a model reads them, one a batch, until there are enough tokens.

    Raises:
        RbeError: there is no tokenizer, or no text.
    """
    if tokenizer is None:
        raise RbeError(
            "calibrate: text needs the model's tokenizer, and there is none; calibrate with 'random' instead"
        )
    read = 0
    for line in lines:
        ids = tokenizer(line.strip(), verbose=False)["input_ids"] if line.strip() else []
        ids = ids[: min(context, _LONGEST_LINE)]
        if len(ids) < 2:
            continue
        given = torch.tensor([ids])
        yield {"input_ids": given, "attention_mask": torch.ones_like(given)}
        read += len(ids)
        if read >= (TOKENS if tokens is None else tokens):
            return
    if read == 0:
        raise RbeError("calibrate: the text has no line of two tokens or more; give sentences, one a line")


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
        RbeError: the model cannot be run on a batch, or its activations are not finite.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    with ExitStack() as undo:
        undo.callback(lambda: [p.requires_grad_(was) for p, was in frozen])
        undo.callback(model.train, training)
        model.eval()
        for p, _ in frozen:
            p.requires_grad_(False)
        for name in layers:
            undo.callback(model.get_submodule(name).register_forward_hook(_watch(name, sums)).remove)
        undo.enter_context(torch.enable_grad())
        for batch in batches:
            try:
                answer = answer_of(call(model, batch))
            except (TypeError, ValueError, RuntimeError, IndexError) as cause:
                raise RbeError(
                    f"calibrate: {type(model).__name__} cannot be run on the inputs ({cause}); give calibrate= inputs "
                    "that it takes, or leave it out"
                ) from cause
            if not bool(torch.isfinite(answer).all()):
                raise RbeError("calibrate: the model's outputs are NaN or infinite; the model is damaged")
            if answer.requires_grad:
                _objective(answer, generator).backward()  # type: ignore[no-untyped-call]
    for name, total in sums.items():
        mean = total.diagonal().mean()
        if not bool(torch.isfinite(total).all()):
            raise RbeError(f"calibrate: inputs of {name} are NaN or infinite; the model is damaged, or overflows")
        if mean > 0:
            total.div_(mean)
            total.diagonal().add_(damping)
    return {name: total for name, total in sums.items() if bool(total.any())}


def _watch(name: str, sums: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        x = given[0].detach()

        def add(gradient: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1]).double()
            weight = gradient.reshape(len(rows), -1).double().square().mean(1, keepdim=True)
            part = rows.T @ (rows * weight)
            sums[name] = part if name not in sums else sums[name].add_(part)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook


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
