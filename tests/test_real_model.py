"""The main job on a real language model: perplexity survives, bytes shrink, and the way back gives a dense model."""

from pathlib import Path

import pytest
import torch

from rbe import convert, evaluate, profile

pytestmark = pytest.mark.data


def test_language_model_at_three_bits(RBE_DATA: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import rbe.hf

    source = RBE_DATA / "models" / "wikitext2-gpt"
    result = convert.compress(source, tmp_path / "seeds", bits=3, effort="fast")
    assert 32 / 3 * 0.95 < result.fp32_bytes / profile.files(tmp_path / "seeds").weights < 32 / 3

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = (RBE_DATA / "data" / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)[:200]
    tokens = evaluate.tokens_of(tokenizer, text)[: 16 * 256 + 1]
    dense = transformers.AutoModelForCausalLM.from_pretrained(source)
    seeds = rbe.hf.load(tmp_path / "seeds")
    reference, ours = (evaluate.perplexity(model.eval(), tokens, 256) for model in (dense, seeds))
    # Simulated noise of this size raises perplexity by 4 %; random or transposed weights raise it to thousands.
    assert reference < ours < 1.1 * reference

    convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.inference_mode():
        ids = tokens[None, :64]
        torch.testing.assert_close(back(ids).logits, seeds(ids).logits, atol=1e-3, rtol=1e-3)
