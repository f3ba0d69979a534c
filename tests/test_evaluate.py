"""Fidelity of two models: nothing lost is found as nothing lost, and a loss as a loss."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rbe import evaluate
from rbe.errors import RbeError

transformers = pytest.importorskip("transformers", reason="the models compared are transformers models")

LINES = ["the cat sat on the mat\n", "\n", "a small boat crossed the wide river before noon\n"] * 8


def load(folder: Path, kind: str) -> tuple[Any, Any]:
    return getattr(transformers, kind).from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(
        folder
    )


def disturbed(model: torch.nn.Module, relative: float) -> torch.nn.Module:
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * p.std() * relative if p.ndim == 2 else torch.zeros_like(p))
    return other


def test_a_model_equals_itself(bert: Path, gpt2: Path) -> None:
    model, tokenizer = load(bert, "AutoModel")
    same = evaluate.compare(model, model, tokenizer)
    assert (same.kind, same.unit, same.samples) == ("encoder", "texts", len(evaluate.SENTENCES))
    assert same.cosine == pytest.approx(1.0) and same.error == 0.0 and same.kl is None
    model, tokenizer = load(gpt2, "AutoModelForCausalLM")
    same = evaluate.compare(model, model, tokenizer, LINES)
    assert same.kind == "language model" and same.agreement == 1.0 and same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.perplexity == same.reference_perplexity


def test_more_noise_is_less_fidelity(bert: Path, gpt2: Path) -> None:
    for folder, kind in ((bert, "AutoModel"), (gpt2, "AutoModelForCausalLM")):
        model, tokenizer = load(folder, kind)
        little, much = (evaluate.compare(disturbed(model, s), model, tokenizer, LINES) for s in (0.05, 0.5))
        assert 0 < little.error < much.error and 1 > little.cosine > much.cosine
        assert little.cosine_min <= little.cosine
        if kind != "AutoModel":
            assert 0 < little.kl < much.kl  # type: ignore[operator]
            assert little.agreement > much.agreement  # type: ignore[operator]


def test_logits_of_a_masked_model_are_compared(bert: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(bert)
    model = transformers.BertForMaskedLM(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    found = evaluate.compare(disturbed(model, 0.1), model, tokenizer)
    assert found.kind == "model" and found.kl is not None and found.kl > 0 and found.perplexity is None


def test_without_a_tokenizer_random_tokens_serve(bert: Path, gpt2: Path) -> None:
    for folder, kind in ((bert, "AutoModel"), (gpt2, "AutoModelForCausalLM")):
        model, _ = load(folder, kind)
        assert evaluate.compare(model, model).error == 0.0
        with pytest.raises(RbeError, match="no tokenizer"):
            evaluate.compare(model, model, None, LINES)


def test_perplexity_is_that_of_the_windows_one_by_one(gpt2: Path) -> None:
    model, tokenizer = load(gpt2, "AutoModelForCausalLM")
    tokens = evaluate.tokens_of(tokenizer, LINES)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 32):
        ids = tokens[start : start + 32][: len(tokens) - 1 - start]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        following = tokens[start + 1 : start + 1 + len(ids)]
        total += torch.nn.functional.cross_entropy(logits, following, reduction="sum").item()
        count += len(ids)
    assert count == len(tokens) - 1
    found = evaluate.perplexity(model, tokens, 32)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    assert evaluate.compare(model, model, tokenizer, LINES).reference_perplexity == pytest.approx(found, rel=1e-6)


def test_line_ends_are_tokens(gpt2: Path) -> None:
    _, tokenizer = load(gpt2, "AutoModelForCausalLM")
    assert len(evaluate.tokens_of(tokenizer, ["the cat \n ", "the cat"])) == 5


def test_embeddings_do_not_depend_on_the_batch(bert: Path) -> None:
    model, tokenizer = load(bert, "AutoModel")
    texts = ["the rain", "a small boat crossed the wide river before noon", "the mill", "seven bakers sold bread"]
    together = evaluate.embed(model, tokenizer, texts, batch=3)
    alone = torch.cat([evaluate.embed(model, tokenizer, [t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))


def test_too_little_text_is_refused(bert: Path, gpt2: Path) -> None:
    model, tokenizer = load(gpt2, "AutoModelForCausalLM")
    with pytest.raises(RbeError, match="at least two"):
        evaluate.compare(model, model, tokenizer, ["the"])
    with pytest.raises(RbeError, match="at least two"):
        evaluate.perplexity(model, torch.tensor([1]), 32)
    model, tokenizer = load(bert, "AutoModel")
    with pytest.raises(RbeError, match="no line"):
        evaluate.compare(model, model, tokenizer, ["\n", " \n"])


def test_different_models_are_refused(bert: Path) -> None:
    model, tokenizer = load(bert, "AutoModel")
    config = transformers.BertConfig.from_pretrained(bert)
    config.hidden_size = 32
    with pytest.raises(RbeError, match="same model"):
        evaluate.compare(transformers.BertModel(config).eval(), model, tokenizer)


def test_long_text_is_cut_to_the_context(bert: Path) -> None:
    model, tokenizer = load(bert, "AutoModel")
    assert evaluate.context_of(model, tokenizer) == 32
    assert evaluate.embed(model, tokenizer, ["the cat " * 100]).shape == (1, 64)
