"""Streaming text: deterministic, beyond the context, and equal to generation without a cache."""

from pathlib import Path

import pytest
import torch

from rbe import sampling
from rbe.errors import RbeError

transformers = pytest.importorskip("transformers", reason="the models are transformers models")


def parts(folder: Path) -> tuple[torch.nn.Module, object]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.eos_token_id = None
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_greedy_equals_the_argmax_without_a_cache(gpt2: Path) -> None:
    model, tokenizer = parts(gpt2)
    text = "".join(sampling.stream(model, tokenizer, "the cat sat", 8, temperature=0))
    ids = tokenizer("the cat sat")["input_ids"]  # type: ignore[operator]
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)  # type: ignore[attr-defined]


def test_the_seed_decides(gpt2: Path) -> None:
    model, tokenizer = parts(gpt2)
    one, two, three = (list(sampling.stream(model, tokenizer, "the cat", 12, seed=s)) for s in (3, 3, 4))
    assert one == two and one != three


def test_writing_goes_on_beyond_the_context(gpt2: Path) -> None:
    model, tokenizer = parts(gpt2)
    text = "".join(sampling.stream(model, tokenizer, "the cat sat on the mat " * 9, 70, temperature=1.0, context=32))
    assert len(text.split()) > 20  # about half of the vocabulary has no word


def test_an_end_token_ends(gpt2: Path) -> None:
    model, tokenizer = parts(gpt2)
    first = next(iter(sampling.stream(model, tokenizer, "the cat", 8, temperature=0)))
    model.config.eos_token_id = tokenizer.convert_tokens_to_ids(first.strip())  # type: ignore[attr-defined, union-attr]
    assert list(sampling.stream(model, tokenizer, "the cat", 8, temperature=0)) == []


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.tensor([0.1, 5.0, 0.2])
    assert {sampling.draw(logits, 5.0, 1, torch.Generator().manual_seed(s)) for s in range(20)} == {1}
    assert len({sampling.draw(logits, 5.0, 0, torch.Generator().manual_seed(s)) for s in range(20)}) > 1


def test_nonsense_is_refused(gpt2: Path) -> None:
    model, tokenizer = parts(gpt2)
    with pytest.raises(RbeError, match="at least one token"):
        sampling.stream(model, tokenizer, "the", 0)
    model.config.bos_token_id = None
    with pytest.raises(RbeError, match="prompt is empty"):
        sampling.stream(model, tokenizer, "")
