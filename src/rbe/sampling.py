"""Text from a language model, piece by piece as it is made."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rbe.errors import RbeError


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    context: int = 1024,
) -> Iterator[str]:
    """Continue a prompt; yields pieces of text which, joined, are the continuation.

    A key-value cache makes every step one token long. When the context is full the second half of it is read again
    and the writing goes on.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue; may be empty where the tokenizer has a start token.
        max_new_tokens: stop after so many tokens (or at the model's end token).
        temperature: 0 always takes the likeliest token; higher is wilder.
        top_k: draw among so many likeliest tokens; 0 is all.
        seed: the same seed gives the same text.
        context: tokens the model can attend to.

    Raises:
        RbeError: nothing to continue, or a value out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 0:
        raise RbeError(
            f"generate: max_new_tokens {max_new_tokens}, temperature {temperature:g}, top_k {top_k}: "
            "ask for at least one token, and temperature and top_k not below 0"
        )
    ids: list[int] = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) if prompt else []
    start = getattr(model.config, "bos_token_id", None)
    if not ids:
        if start is None:
            raise RbeError("generate: the prompt is empty and the model has no start token; give --prompt some text")
        ids = [int(start)]
    return _stream(model, tokenizer, ids, max_new_tokens, temperature, top_k, seed, context)


def _stream(
    model: nn.Module,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    context: int,
) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    ends = getattr(model.config, "eos_token_id", None)
    stops = set(ends if isinstance(ends, list) else [ends]) - {None}
    made: list[int] = []
    shown = ""
    pending, cache, held = ids[-(context - 1) :], None, 0
    for _ in range(max_new_tokens):
        if held + len(pending) > context:
            pending, cache, held = (ids + made)[-context // 2 :], None, 0
        with torch.inference_mode():
            logits, cache = read_on(model, torch.tensor([pending]), cache)
        held += len(pending)
        token = draw(logits[0, -1].float(), temperature, top_k, generator)
        if token in stops:
            break
        made.append(token)
        pending = [token]
        text = tokenizer.decode(made, skip_special_tokens=True)
        # A character of several tokens decodes to the replacement sign until its last token is there.
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(made, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]


def read_on(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Let a causal language model read more tokens: (logits of these tokens, key-value cache for the next call).

    Args:
        ids: int64 (batch, tokens).
        cache: of the call before; None at the beginning.
    """
    # transformers is renaming its argument and output `past_key_values`; each model's own signature says which it has.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(input_ids=ids, use_cache=True, **{name: cache})
    return output.logits, getattr(output, name)


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from logits (vocabulary,).

    >>> draw(torch.tensor([0.0, 3.0, 1.0]), temperature=0, top_k=0, generator=torch.Generator())
    1
    """
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        values, index = logits.topk(min(top_k, len(logits)))
    else:
        values, index = logits, torch.arange(len(logits))
    chosen = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return int(index[chosen])
