"""The transformers plug-in in the packed formats: encoded while loading, saved, opened, saved again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import rbe.hf
from rbe import RbeError, checkpoint, convert, shards

IDS = torch.arange(3, 15)[None]
FORMS: dict[str, dict[str, Any]] = {
    "radial": {"format": "packed128", "block": 8, "stages": 2, "embeddings_bits": 0},
    "faithful": {"format": "packed128", "block": None, "mode": "faithful"},
    "packed64": {"format": "packed64", "block": 4, "precision": 32, "outliers": 0.02},
}
STORED = (".seeds", ".scale", ".row_scale", ".outlier_index", ".outlier_values")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(IDS).logits
    return out


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


def read(folder: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module", params=list(FORMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    """(settings, a model encoded while loading, the folder with its source and its save)."""
    folder = tmp_path_factory.mktemp("hf")
    form = FORMS[request.param]
    model = read(gpt2(folder / "dense"), quantization_config=rbe.hf.RbeConfig(effort="fast", **form))
    model.save_pretrained(folder / "seeds")
    return form, model, folder


def test_what_was_encoded_while_loading_loads_again(case: tuple[dict[str, Any], Any, Path]) -> None:
    form, model, folder = case
    again = read(folder / "seeds")
    assert torch.equal(logits(again), logits(model))
    about = json.loads((folder / "seeds" / "config.json").read_text())["quantization_config"]
    assert {name: about[name] for name in form} == form
    spec = again.transformer.h[0].mlp.c_fc.spec
    assert (spec.format, spec.block, spec.stages) == (form["format"], form["block"], form.get("stages", 1))
    cast, state = read(folder / "seeds", dtype=torch.bfloat16), model.state_dict()
    kept = {name: t for name, t in cast.state_dict().items() if name.endswith(STORED)}
    assert len(kept) >= 8 and all(t.dtype == state[n].dtype and torch.equal(t, state[n]) for n, t in kept.items())


def test_the_converter_makes_the_same_model(case: tuple[dict[str, Any], Any, Path], tmp_path: Path) -> None:
    form, model, folder = case
    done = convert.compress(folder / "dense", tmp_path / "seeds", effort="fast", threads=1, **form)
    assert done.fingerprint is not None and not done.remarks
    assert torch.equal(logits(rbe.load(tmp_path / "seeds")), logits(model))
    assert checkpoint.verify(tmp_path / "seeds", folder / "dense", rbe.hf.check_fingerprint).ok
    convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    dense = read(tmp_path / "dense")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)


def test_open_seeds_are_saved_packed(case: tuple[dict[str, Any], Any, Path], tmp_path: Path) -> None:
    _, model, folder = case
    opened = read(folder / "seeds")
    for module in opened.modules():
        if isinstance(module, rbe.nn.Seeded):
            module.unfreeze()
    opened(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in opened.named_parameters():
            if name.endswith("radius"):
                assert parameter.grad is not None
                parameter *= 0.9
    opened.save_pretrained(tmp_path / "plain")
    rbe.save(opened, tmp_path / "sealed")
    for again in (read(tmp_path / "plain"), rbe.load(tmp_path / "sealed")):
        assert torch.allclose(logits(again), logits(opened), atol=1e-5)
        assert not torch.allclose(logits(again), logits(model), atol=1e-5)
    assert checkpoint.read_fingerprint(tmp_path / "sealed") is not None


def test_a_live_model_remembers_how_it_was_encoded(tmp_path: Path) -> None:
    model = read(gpt2(tmp_path / "dense"))
    rbe.compress_(model, effort="fast", format="packed128", block=8, stages=2, outliers=0.01)
    rbe.save(model, tmp_path / "seeds")
    again = rbe.load(tmp_path / "seeds", activations="int8")
    assert (logits(again) - logits(model)).norm() < 0.05 * logits(model).norm()
    about = again.config.quantization_config
    assert (about.format, about.block, about.stages, about.outliers, about.bits) == ("packed128", 8, 2, 0.01, 4.0)


def test_a_radius_outside_of_the_disk_is_named_while_loading(tmp_path: Path) -> None:
    config = rbe.hf.RbeConfig(format="packed128", effort="fast", include=["*c_fc"])
    read(gpt2(tmp_path / "dense"), quantization_config=config).save_pretrained(tmp_path / "seeds")
    shard = next((tmp_path / "seeds").glob("*.safetensors"))
    state, metadata = load_file(shard), shards.read_header(shard)[1]
    name = next(name for name in state if name.endswith(".seeds"))
    state[name][0, 1] = 0x3F800000 << 32
    save_file(state, shard, metadata)
    with pytest.raises(RbeError, match=r"mlp\.c_fc: packed128: radius is 1 at \[0, 0\]"):
        read(tmp_path / "seeds")


def test_a_weight_that_is_not_finite_is_named_while_loading(tmp_path: Path) -> None:
    gpt2(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    state["transformer.h.0.mlp.c_fc.weight"][3, 4] = torch.nan
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RbeError, match=r"h\.0\.mlp\.c_fc\.weight: encode: entry \(4, 3\)"):
        read(tmp_path / "dense", quantization_config=rbe.hf.RbeConfig(effort="fast"))


def test_a_picture_model_has_its_kernel_in_seeds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).eval().save_pretrained(tmp_path / "dense")
    done = convert.compress(tmp_path / "dense", tmp_path / "seeds", bits=4, effort="fast", threads=1)
    kinds = {one.name: entry.kind for one in done.encoded for entry in done.plan if entry.name == one.name}
    assert kinds["vit.embeddings.patch_embeddings.projection.weight"] == "conv"
    x = torch.randn(2, 3, 32, 32)
    model = rbe.load(tmp_path / "seeds")
    dense = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    with torch.inference_mode():
        assert (model(x).logits - dense(x).logits).norm() < 0.3 * dense(x).logits.norm()
    convert.decompress(tmp_path / "seeds", tmp_path / "back")
    shapes = [{n: t.shape for n, t in load_file(f / "model.safetensors").items()}
              for f in (tmp_path / "back", tmp_path / "dense")]  # fmt: skip
    assert shapes[0] == shapes[1]
