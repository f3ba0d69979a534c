"""The transformers plug-in: what is saved loads again bit for bit, in every class, dtype and process."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rbe.hf
import rbe.nn
from rbe import convert
from rbe.errors import RbeError
from rbe.nn import swap

IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers' chatter about tiny models is not ours."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=1, **more
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=40, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=40,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


MODELS = {
    "gpt2": (gpt2, transformers.AutoModelForCausalLM),
    "llama": (llama, transformers.AutoModelForCausalLM),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), transformers.AutoModelForCausalLM),
    "gemma": (gemma, transformers.AutoModelForCausalLM),
    "bert": (bert, transformers.AutoModelForMaskedLM),
    "t5": (t5, transformers.AutoModelForSeq2SeqLM),
}
# BERT is an encoder; "llama" has a head of its own.
GENERATING = [name for name in MODELS if name != "bert"]
TIED = [name for name in MODELS if name != "llama"]
CONFIG = {"bits": 2, "effort": "fast"}


def dense_folder(make: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    make().eval().save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        out: Tensor = model(IDS, **more).logits
    return out


def clean(info: dict[str, Any]) -> bool:
    return not any(info.values())


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(a model encoded while loading, its auto class, its folder, saved in small shards)."""
    make, auto = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = rbe.hf.RbeConfig(**CONFIG)
    dense = dense_folder(make, folder / "dense")
    model, info = auto.from_pretrained(dense, quantization_config=config, output_loading_info=True)
    assert clean(info)
    model.save_pretrained(folder / "seeds", max_shard_size="4KB")
    return model, auto, folder


def test_encoding_while_loading_leaves_nothing_dense(case: tuple[Any, Any, Path]) -> None:
    model, _, folder = case
    kept = [site.module for site in swap.find(model)]
    # T5's relative positions and BERT's token types are thin: seeds would not be smaller.
    assert all("relative_attention_bias" in name or "token_type" in name for name in kept)
    assert not model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    dense = load_file(folder / "dense" / "model.safetensors")
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, rbe.nn.Linear) and m.owner is m)
    error = (layer.weight - dense[f"{name}.weight"]).norm() / dense[f"{name}.weight"].norm()
    assert error < 0.32


def test_saved_shards_load_again_bit_for_bit(case: tuple[Any, Any, Path]) -> None:
    model, auto, folder = case
    again, info = auto.from_pretrained(folder / "seeds", output_loading_info=True)
    assert clean(info)
    assert len(list((folder / "seeds").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(folder / "one")
    third, info = auto.from_pretrained(folder / "one", output_loading_info=True)
    assert clean(info) and torch.equal(logits(third), logits(model))


def test_every_header_says_what_it_holds(case: tuple[Any, Any, Path]) -> None:
    _, _, folder = case
    config = json.loads((folder / "seeds" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rbe"
    for shard in (folder / "seeds").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt" and metadata["rbe.format_version"] == str(config["format_version"])
        assert json.loads(metadata["rbe.tensors"]) == {name: e["spec"] for name, e in config["modules"].items()}


def test_bfloat16_and_device_map_leave_what_is_stored(case: tuple[Any, Any, Path]) -> None:
    model, auto, folder = case
    cast, info = auto.from_pretrained(
        folder / "seeds", dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert clean(info) and cast.dtype == torch.bfloat16
    state = model.state_dict()
    stored = {name: t for name, t in cast.state_dict().items() if name.endswith((".seeds", ".scale", ".row_scale"))}
    assert stored and all(t.dtype == state[n].dtype and torch.equal(t, state[n]) for n, t in stored.items())
    exact = logits(model)
    assert (logits(cast).float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("case", GENERATING, indirect=True)
def test_generate_with_and_without_cache(case: tuple[Any, Any, Path]) -> None:
    model, _, _ = case
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **more), model.generate(IDS, use_cache=False, **more))


def test_base_models_and_heads_load_each_other(case: tuple[Any, Any, Path]) -> None:
    model, auto, folder = case
    base, info = transformers.AutoModel.from_pretrained(folder / "seeds", output_loading_info=True)
    assert all(name.startswith("pooler") for name in info["missing_keys"])
    assert all(name.startswith(("lm_head", "cls")) for name in info["unexpected_keys"])
    base.save_pretrained(folder / "base")
    head, info = auto.from_pretrained(folder / "base", output_loading_info=True)
    assert all(name.startswith(("lm_head", "cls")) for name in info["missing_keys"])
    if not info["missing_keys"]:
        assert torch.equal(logits(head), logits(model))


def test_dequantize_gives_an_ordinary_model(case: tuple[Any, Any, Path]) -> None:
    model, auto, folder = case
    plain = auto.from_pretrained(folder / "seeds")
    plain.dequantize()
    assert not any(isinstance(m, rbe.nn.Seeded) for m in plain.modules())
    plain.save_pretrained(folder / "plain")
    assert "quantization_config" not in json.loads((folder / "plain" / "config.json").read_text())
    again, info = auto.from_pretrained(folder / "plain", output_loading_info=True)
    assert clean(info)
    exact = logits(model)
    assert (logits(again) - exact).abs().max() < 1e-4 * exact.abs().max()
    if plain.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("case", TIED, indirect=True)
def test_a_tied_head_is_stored_once(case: tuple[Any, Any, Path]) -> None:
    model, _, folder = case
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, rbe.nn.Linear) and head.owner.seeds is table.owner.seeds
    model.tie_weights()
    assert model.get_output_embeddings() is head
    names = set(json.loads((folder / "seeds" / "model.safetensors.index.json").read_text())["weight_map"])
    assert sum(name.endswith((".wte.seeds", "embed_tokens.seeds", "word_embeddings.seeds", "shared.seeds",
                              "decoder.seeds", "lm_head.seeds")) for name in names) == 1  # fmt: skip


def test_the_fingerprint_tells_seeds_from_random_weights(case: tuple[Any, Any, Path]) -> None:
    _, _, folder = case
    stored = json.loads(json.dumps(rbe.hf.fingerprint(folder / "seeds")))
    assert len(stored["values"]) == 32 and stored == rbe.hf.fingerprint(folder / "seeds")
    assert rbe.hf.check_fingerprint(folder / "seeds", stored) is None
    assert "differ" in str(rbe.hf.check_fingerprint(folder / "seeds", {**stored, "values": stored["values"][::-1]}))
    assert "class" in str(rbe.hf.check_fingerprint(folder / "seeds", {**stored, "class": "Other"}))


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense_folder(gpt2, tmp_path / "dense"), quantization_config=rbe.hf.RbeConfig(**CONFIG)
    )
    model.save_pretrained(tmp_path / "seeds", max_shard_size="4KB")
    script = (
        "import sys, torch, transformers, rbe.hf\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(3, 15)[None]).logits.detach(), sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "seeds"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model))


def test_include_exclude_and_embeddings(tmp_path: Path) -> None:
    dense = dense_folder(gpt2, tmp_path / "dense")
    config = rbe.hf.RbeConfig(**CONFIG, exclude=["*.mlp.*"], embeddings_bits=0)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, output_loading_info=True
    )
    seeded = {name for name, module in model.named_modules() if isinstance(module, rbe.nn.Seeded)}
    assert clean(info) and seeded == {f"transformer.h.{k}.attn.{part}" for k in (0, 1) for part in ("c_attn", "c_proj")}
    assert model.lm_head.weight is model.transformer.wte.weight
    config = rbe.hf.RbeConfig(**CONFIG, include=["transformer.wte"], embeddings_bits=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert [(n, e["spec"]["bits"]) for n, e in swap.describe(model).items()] == [("transformer.wte", 4.0)]
    model.save_pretrained(tmp_path / "seeds")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seeds", output_loading_info=True)
    assert clean(info) and torch.equal(logits(again), logits(model))


def test_a_source_that_stores_both_tied_weights(tmp_path: Path) -> None:
    dense = dense_folder(gpt2, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = rbe.hf.RbeConfig(**CONFIG)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, output_loading_info=True
    )
    assert clean(info) and model.lm_head.owner.seeds is model.transformer.wte.owner.seeds
    model.save_pretrained(tmp_path / "seeds")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seeds", output_loading_info=True)
    assert clean(info) and torch.equal(logits(again), logits(model))


def test_a_compressed_table_with_a_dense_head_of_its_own(tmp_path: Path) -> None:
    """The configuration ties, the file does not: the file counts, and no seeds are mistaken for the head's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense_folder(gpt2, tmp_path / "dense"), quantization_config=rbe.hf.RbeConfig(**CONFIG)
    )
    model.save_pretrained(tmp_path / "seeds")
    file = tmp_path / "seeds" / "model.safetensors"
    head = torch.randn(96, 32)
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seeds", output_loading_info=True)
    assert clean(info)
    assert isinstance(again.lm_head, torch.nn.Linear) and torch.equal(again.lm_head.weight, head)
    assert isinstance(again.transformer.wte, rbe.nn.Embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings_multiply_as_before(dtype: torch.dtype) -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    for kind in (BartScaledWordEmbedding, Gemma2TextScaledWordEmbedding):
        model = torch.nn.Sequential(kind(96, 40, 0, 40**0.5)).to(dtype)
        rbe.compress_(model, effort="fast")
        assert isinstance(model[0], rbe.nn.Embedding)
        rows = model(IDS)
        assert torch.equal(rows, torch.nn.functional.embedding(IDS, model[0].weight) * model[0].multiplier) or (
            dtype == torch.bfloat16 and kind is Gemma2TextScaledWordEmbedding
        )
        restored = rbe.decompress_(model)
        assert type(restored[0]) is kind and torch.equal(restored.to(dtype)(IDS), rows)


def test_load_chooses_the_class_and_the_activations(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense_folder(llama, tmp_path / "dense"), quantization_config=rbe.hf.RbeConfig(**CONFIG)
    )
    model.save_pretrained(tmp_path / "seeds")
    exact = rbe.hf.load(tmp_path / "seeds")
    assert type(exact).__name__ == "LlamaForCausalLM" and not exact.training
    rough = rbe.hf.load(tmp_path / "seeds", activations="int8")
    assert {m.activations for m in rough.modules() if isinstance(m, rbe.nn.Seeded)} == {"int8"}
    error = (logits(rough) - logits(exact)).norm() / logits(exact).norm()
    assert 0 < error < 0.05
    base = rbe.hf.load(tmp_path / "seeds", model_class=transformers.AutoModel)
    assert type(base).__name__ == "LlamaModel"


def test_what_is_not_a_compressed_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RbeError, match=r"there is no .*config\.json"):
        rbe.hf.load(tmp_path)
    with pytest.raises(RbeError, match="not a compressed model"):
        rbe.hf.load(dense_folder(llama, tmp_path / "dense"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RbeError, match="cannot be read"):
        rbe.hf.load(tmp_path)


def test_a_version_from_the_future_is_refused(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense_folder(llama, tmp_path / "dense"), quantization_config=rbe.hf.RbeConfig(**CONFIG)
    )
    model.save_pretrained(tmp_path / "seeds")
    file = tmp_path / "seeds" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(RbeError, match="format version 99"):
        transformers.AutoModel.from_pretrained(tmp_path / "seeds")


def test_disk_offload_is_refused(tmp_path: Path) -> None:
    dense = dense_folder(llama, tmp_path / "dense")
    with pytest.raises(RbeError, match="disk"):
        transformers.AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=rbe.hf.RbeConfig(**CONFIG), device_map={"": "disk"}
        )


def test_a_model_swapped_by_hand_saves_like_a_loaded_one(tmp_path: Path) -> None:
    model = gpt2().eval()
    for site in swap.find(model):
        embedding = site.kind == "embedding"
        swap.replace(
            model, site, rbe.encode(swap.dense(model, site), effort="fast",
                                           rotate="in" if embedding else True, row_scale=embedding)
        )  # fmt: skip
    rbe.hf.attach(model)
    model.save_pretrained(tmp_path / "seeds")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seeds", output_loading_info=True)
    assert clean(info) and torch.equal(logits(again), logits(model))


def test_importing_again_registers_once() -> None:
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = importlib.reload(rbe.hf)
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["rbe"] is module.RbeQuantizer


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "bert", "t5"])
@pytest.mark.parametrize("more", [{}, {"outliers": 0.01}, {"outliers": 0.0, "embeddings_bits": 4}])
def test_encoding_while_loading_is_what_compress_writes(tmp_path: Path, name: str, more: dict[str, float]) -> None:
    make, auto = MODELS[name]
    dense = dense_folder(make, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for tensor in tensors.values():
        if tensor.ndim == 2 and min(tensor.shape) >= 32:
            tensor[3, 4] = 20 * tensor.std()  # extreme
    save_file(tensors, tmp_path / "with.safetensors", metadata={"format": "pt"})
    (tmp_path / "with.safetensors").replace(dense / "model.safetensors")
    done = convert.compress(dense, tmp_path / "seeds", fingerprint=lambda _: {}, **CONFIG, **more)
    assert bool(sum(e.outliers for e in done.plan.seeded)) == (more.get("outliers") != 0.0)
    written = rbe.load(tmp_path / "seeds")
    config = rbe.hf.RbeConfig(**CONFIG, **more)
    model, info = auto.from_pretrained(dense, quantization_config=config, output_loading_info=True)
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").state_dict()
    assert clean(info)
    for state in (model.state_dict(), again):
        assert state.keys() == written.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in written.state_dict().items())


@pytest.mark.parametrize("unknown", [{"allocate": "random"}, {"calibrate": "random"}, {"seed": 3}])
def test_what_encoding_while_loading_does_not_offer_is_refused(tmp_path: Path, unknown: dict[str, Any]) -> None:
    config = rbe.hf.RbeConfig(**CONFIG, **unknown)
    with pytest.raises(RbeError, match=f"{next(iter(unknown))} cannot be asked"):
        transformers.GPT2LMHeadModel.from_pretrained(dense_folder(gpt2, tmp_path / "d"), quantization_config=config)


@pytest.mark.parametrize("kind", ["seeds", "scale", "outlier_index", "outlier_values"])
def test_a_tensor_that_is_not_there_is_not_made_up(tmp_path: Path, kind: str) -> None:
    config = rbe.hf.RbeConfig(**CONFIG, outliers=0.01)
    model = transformers.GPT2LMHeadModel.from_pretrained(dense_folder(gpt2, tmp_path / "d"), quantization_config=config)
    model.save_pretrained(tmp_path / "seeds")
    tensors = load_file(tmp_path / "seeds" / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(f".{kind}"))
    del tensors[lost]
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    (tmp_path / "other.safetensors").replace(tmp_path / "seeds" / "model.safetensors")
    with pytest.raises(RbeError, match=f"does not hold {lost}"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "seeds")


WITHOUT = """
import sys, transformers
for name in sys.argv[2:]:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except RuntimeError as error:
        print("raised", name)
assert "rbe" not in sys.modules
"""


@pytest.mark.parametrize(
    ("name", "writer", "part"),
    [
        ("gpt2", "compress", "AutoModel"),
        ("llama-tied", "save_pretrained", "AutoModel"),
        ("bert", "save", "AutoModelForTokenClassification"),
        ("t5", "compress", "T5EncoderModel"),
    ],
)
def test_without_the_plug_in_transformers_raises(tmp_path: Path, name: str, writer: str, part: str) -> None:
    """In classes that have the whole model or a part of it; and with the plug-in nothing is unexpected."""
    make, auto = MODELS[name]
    source = dense_folder(make, tmp_path / "dense")
    small = tmp_path / "small"
    if writer == "compress":
        convert.compress(source, small, effort="fast")
    else:
        model = auto.from_pretrained(source, quantization_config=rbe.hf.RbeConfig(effort="fast"))
        rbe.save(model, small) if writer == "save" else model.save_pretrained(small)
    classes = (auto.__name__, part)
    told = subprocess.run([sys.executable, "-c", WITHOUT, str(small), *classes], capture_output=True, text=True)
    assert told.stdout.split() == ["raised", classes[0], "raised", classes[1]], told.stderr
    guards = set(guards_of(small))
    _, info = auto.from_pretrained(small, output_loading_info=True)
    assert not guards & set(info["unexpected_keys"])


def guards_of(folder: Path) -> list[str]:
    return rbe.checkpoint.guard_names(
        json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    )


def test_folders_of_before_the_guard_still_load(tmp_path: Path) -> None:
    small = tmp_path / "small"
    convert.compress(dense_folder(gpt2, tmp_path / "dense"), small, effort="fast")
    wanted = rbe.load(small)
    shard = next(small.glob("*.safetensors"))
    tensors = load_file(shard)
    assert all(tensors.pop(guard).shape == (0,) for guard in guards_of(small))
    with safe_open(shard, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, shard, metadata)
    rbe.checkpoint.seal(small)
    assert torch.equal(logits(rbe.load(small)), logits(wanted))
    assert rbe.checkpoint.verify(small, tmp_path / "dense").ok
