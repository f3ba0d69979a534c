"""How faithful a model is to another: the same text through both, outputs compared.

The models are ordinary `transformers` models or anything that is called like them; nothing here imports transformers,
loads a file or knows about seeds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe import metrics
from rbe.calibrate import longest
from rbe.errors import RbeError

# Used where the user gives no text: two sentences on each of several matters, so that an encoder has something to find.
SENTENCES = (
    "The ferry leaves the harbour at seven and reaches the island before breakfast.",
    "The first boat to the island sails early in the morning.",
    "A hard frost in April can destroy the whole apple blossom in one night.",
    "Fruit growers fear cold nights in spring.",
    "The committee postponed its decision because two members were ill.",
    "The vote was delayed until everybody could attend.",
    "Bats find moths in the dark by listening to the echo of their own calls.",
    "Some animals hunt at night with the help of sound.",
    "She paid the plumber in cash and asked for a receipt.",
    "The tradesman got his money for repairing the pipe.",
    "Bread dough rises faster in a warm kitchen than in a cold one.",
    "Yeast works slowly when it is cool.",
    "The orchestra tuned while the last guests looked for their seats.",
    "The musicians prepared for the concert as the hall filled.",
    "Our train was cancelled, so we walked the last three miles.",
    "Because of a railway strike they had to go on foot.",
    "Interest on the loan is charged at the end of every month.",
    "The bank takes its fee for borrowed money monthly.",
    "The goalkeeper guessed the right corner and saved the penalty.",
    "A football match was decided by a stopped shot.",
    "The doctor advised rest, plenty of water and no sport for a week.",
    "The patient was told to stay in bed and drink a lot.",
    "Astronomers measured the age of the star from the light it sends.",
    "A telescope showed how old a distant sun is.",
)

# Logits of both models are held at once; 2^24 of them are 64 MiB each.
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Fidelity:
    """What a comparison of two models found.

    Attributes:
        kind: "encoder" (sentence embeddings), "language model" or "model" (any other logits).
        samples: number of texts or of tokens compared.
        unit: "texts" or "tokens".
        cosine: mean cosine of the two models' outputs.
        cosine_min: the smallest cosine seen.
        error: squared error of the outputs relative to the reference outputs.
        kl: mean KL(reference || model) in nats, where there are logits.
        agreement: share of positions where both models prefer the same class; of encoders, share of texts whose
            nearest other text is the same under both.
        perplexity: of the model, per token, language models only.
        reference_perplexity: of the reference.
        similarity: rank correlation of the two models' similarities between all pairs of texts, encoders only.
    """

    kind: str
    samples: int
    unit: str
    cosine: float
    cosine_min: float
    error: float
    kl: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    similarity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain numbers; nothing that was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Sums:
    """Running sums over batches of outputs."""

    def __init__(self) -> None:
        self.count, self.cosine, self.cosine_min = 0, 0.0, 1.0
        self.error = self.power = self.kl = self.agreement = 0.0

    def add(self, output: Tensor, reference: Tensor, logits: bool) -> None:
        """Take in outputs (n, features) of the model and of the reference."""
        cosine = metrics.cosine(output, reference)
        self.count += len(output)
        self.cosine += cosine.sum().item()
        self.cosine_min = min(self.cosine_min, cosine.min().item())
        self.error += (output.double() - reference.double()).square().sum().item()
        self.power += reference.double().square().sum().item()
        if logits:
            self.kl += metrics.kl_divergence(output, reference).sum().item()
            self.agreement += (output.argmax(-1) == reference.argmax(-1)).sum().item()

    def fidelity(self, kind: str, unit: str, samples: int, logits: bool, **more: float) -> Fidelity:
        """The means."""
        n = self.count
        return Fidelity(
            kind,
            samples,
            unit,
            cosine=self.cosine / n,
            cosine_min=self.cosine_min,
            error=self.error / self.power if self.power else 0.0,
            kl=self.kl / n if logits else None,
            **({"agreement": self.agreement / n} if logits else {}),
            **more,
        )


def kind_of(model: nn.Module) -> str:
    """ "language model" (generates text), "encoder" (hidden states only) or "model" (other logits).

    Decided by the class of the head, as transformers names it.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate() and not getattr(model.config, "is_encoder_decoder", False):
        return "language model"
    return "model" if "For" in type(model).__name__ else "encoder"


def context_of(model: nn.Module, tokenizer: Any = None, most: int = 2048) -> int:
    """Number of tokens the model reads at once, at most `most`."""
    told = getattr(tokenizer, "model_max_length", None)
    return longest(getattr(model, "config", None), most if not told else int(min(most, told)))


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sentence embeddings: mean of the last hidden states over the attention mask, scaled to length 1: (texts, width).

    Texts are sorted by length first so that a batch pads little; the order of the result is that of `texts`.
    """
    most = context_of(model, tokenizer, 512)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    rows: list[Tensor] = []
    for start in range(0, len(order), batch):
        chunk = [texts[k] for k in order[start : start + batch]]
        tokens = tokenizer(chunk, padding=True, truncation=True, max_length=most, return_tensors="pt")
        rows.append(pooled(model, tokens))
        if progress is not None:
            progress(min(start + batch, len(order)), len(order))
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(rows)[inverse]


def pooled(model: nn.Module, tokens: Any) -> Tensor:
    """Mean over the attention mask of the last hidden states, scaled to length 1: tokens (n, length) -> (n, width)."""
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1.0), dim=-1)


def tokens_of(tokenizer: Any, lines: Iterable[str]) -> Tensor:
    """Token ids of a text given line by line, line ends kept, concatenated: (tokens,) int64."""
    ids: list[int] = []
    for line in lines:
        if line:
            ids.extend(tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def windows(tokens: Tensor, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows of `context` tokens with the token that follows each: two (n, context), in batches.

    Every token but the very first is predicted once; a last shorter window comes alone.

    >>> [tuple(ids.shape) for ids, _ in windows(torch.arange(24), context=5, batch=3)]
    [(3, 5), (1, 5), (1, 3)]
    >>> next(windows(torch.arange(24), context=3, batch=2))[1].tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    predicted = max(len(tokens) - 1, 0)
    whole = predicted // context
    end = whole * context
    ids, following = tokens[:end].reshape(whole, context), tokens[1 : end + 1].reshape(whole, context)
    for start in range(0, whole, batch):
        yield ids[start : start + batch], following[start : start + batch]
    if predicted > end:
        yield tokens[end:predicted].unsqueeze(0), tokens[end + 1 :].unsqueeze(0)


def perplexity(
    model: nn.Module, tokens: Tensor, context: int, progress: Callable[[int, int], None] | None = None
) -> float:
    """Perplexity per token of a language model over non-overlapping windows of `context` tokens."""
    total, count = 0.0, 0
    for ids, following in windows(tokens, context, _batch(model, context)):
        loss = metrics.negative_log_likelihood(_logits(model, ids), following)
        total, count = total + loss.sum().item(), count + loss.numel()
        if progress is not None:
            progress(count, len(tokens) - 1)
    if count == 0:
        raise RbeError(f"perplexity: the text has {len(tokens)} token(s); at least two are needed")
    return math.exp(total / count)


def compare(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any = None,
    lines: Sequence[str] | None = None,
    context: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Send the same text through both models and compare their outputs.

    Encoders are compared by sentence embeddings, one text a line; language models by their next-token distributions
    over non-overlapping windows of the context; other models by their logits, one text a line.

    Args:
        model: the model in question.
        reference: the model it should equal.
        tokenizer: turns text into tokens; without one, seeded random token ids are used.
        lines: the text, line ends kept; a few built-in sentences by default.
        context: tokens a window (default: what the model reads at once).
        limit: use at most so many tokens (language models) or texts.
        progress: called with (done, total) tokens or texts.

    Raises:
        RbeError: the text is too short to measure anything, or the models' outputs do not have one shape.
    """
    if tokenizer is None and lines is not None:
        raise RbeError("compare: text was given but the model folder has no tokenizer; copy its tokenizer files there")
    kind = kind_of(reference)
    context = context or context_of(reference, tokenizer)
    texts = list(SENTENCES) if lines is None else list(lines)
    if kind == "language model":
        if tokenizer is None:
            tokens = _random_tokens(reference, (4 * context,))
        else:
            tokens = tokens_of(tokenizer, texts if lines is not None else [t + "\n" for t in texts])
        return _compare_language_models(model, reference, tokens[:limit], context, progress)
    texts = [t.strip() for t in texts if t.strip()][:limit]
    if not texts:
        raise RbeError("compare: the text has no line with anything in it; give a file with one text a line")
    sums = _Sums()
    embeddings: list[tuple[Tensor, Tensor]] = []
    done = 0
    for inputs in _inputs(reference, tokenizer, texts, context):
        if kind == "encoder":
            pairs = pooled(model, inputs), pooled(reference, inputs)
            embeddings.append(pairs)
        else:
            with torch.inference_mode():
                mask = inputs["attention_mask"].bool()
                pairs = _rows(model(**inputs).logits, mask), _rows(reference(**inputs).logits, mask)
        _same_shape(*pairs)
        sums.add(*pairs, logits=kind == "model")
        done += len(inputs["input_ids"])
        if progress is not None:
            progress(done, len(texts))
    more: dict[str, float] = {}
    if len(embeddings) and done > 2:
        ours, theirs = (torch.cat(side) for side in zip(*embeddings, strict=True))
        more = {"similarity": similarity(ours, theirs), "agreement": neighbours(ours, theirs)}
    return sums.fidelity(kind, "texts", done, logits=kind == "model", **more)


def similarity(ours: Tensor, theirs: Tensor, most: int = 1024) -> float:
    """Rank correlation of the cosines between all pairs of texts under two models: (texts, width) twice, of length 1.

    >>> x = functional.normalize(torch.randn(9, 4), dim=-1)
    >>> similarity(x, -x)
    1.0

    Args:
        most: take the first so many texts; the number of pairs grows with the square.
    """
    rows, columns = torch.triu_indices(min(len(ours), most), min(len(ours), most), offset=1).unbind()
    return metrics.spearman(*(metrics.cosine(e[rows], e[columns]) for e in (ours, theirs)))


def neighbours(ours: Tensor, theirs: Tensor, most: int = 4096) -> float:
    """Share of texts whose nearest other text is the same under both models: (texts, width) twice, of length 1.

    >>> x = functional.normalize(torch.randn(9, 4), dim=-1)
    >>> neighbours(x, -x)
    1.0

    Args:
        most: look at the first so many texts; memory grows with the square.
    """
    nearest = [(e[:most] @ e[:most].T).fill_diagonal_(-math.inf).argmax(-1) for e in (ours.float(), theirs.float())]
    return (nearest[0] == nearest[1]).double().mean().item()


def _compare_language_models(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    context: int,
    progress: Callable[[int, int], None] | None,
) -> Fidelity:
    sums, losses, count = _Sums(), [0.0, 0.0], 0
    for ids, following in windows(tokens, context, _batch(reference, context)):
        ours, theirs = _logits(model, ids), _logits(reference, ids)
        _same_shape(ours, theirs)
        sums.add(ours.flatten(0, 1), theirs.flatten(0, 1), logits=True)
        for k, logits in enumerate((ours, theirs)):
            losses[k] += metrics.negative_log_likelihood(logits, following).sum().item()
        count += following.numel()
        if progress is not None:
            progress(count, len(tokens) - 1)
    if count == 0:
        raise RbeError(f"compare: the text has {len(tokens)} token(s); at least two are needed")
    return sums.fidelity(
        "language model",
        "tokens",
        count,
        logits=True,
        perplexity=math.exp(losses[0] / count),
        reference_perplexity=math.exp(losses[1] / count),
    )


def _batch(model: nn.Module, context: int) -> int:
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 50_000)
    return max(1, min(16, _LOGITS_AT_ONCE // (context * vocabulary)))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(input_ids=ids).logits
    return output


def _random_tokens(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0)
    if vocabulary < 1:
        raise RbeError("compare: no tokenizer, and the model's configuration names no vocab_size to draw tokens from")
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _inputs(model: nn.Module, tokenizer: Any, texts: list[str], context: int) -> Iterator[Any]:
    for start in range(0, len(texts), 16):
        chunk = texts[start : start + 16]
        if tokenizer is None:
            ids = _random_tokens(model, (len(chunk), min(32, context)))
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            yield tokenizer(chunk, padding=True, truncation=True, max_length=min(512, context), return_tensors="pt")


def _rows(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits at real tokens (n, classes), or one row a text where the head gives one."""
    return logits[mask] if logits.ndim == 3 and logits.shape[:2] == mask.shape else logits.flatten(0, -2)


def _same_shape(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise RbeError(
            f"compare: outputs are {tuple(ours.shape)} and {tuple(theirs.shape)}; "
            "the two folders do not hold the same model, compare a compressed model with its own source"
        )
