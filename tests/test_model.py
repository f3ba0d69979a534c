"""`save` and `load`: whole models, bit for bit, and nothing half written."""

import copy
from pathlib import Path

import pytest
import torch
from test_compress import Language, seeded
from torch import nn

import rbe
import rbe.hf
from rbe import convert
from rbe import model as model_module
from rbe.checkpoint import read_fingerprint
from rbe.errors import CorruptFile, RbeError

INDEX = torch.arange(12)[None]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = Language().eval()
    model.register_buffer("steps", torch.tensor(7))
    model.extra = nn.ModuleList([model.body[3], nn.Linear(2, 2)])  # a shared dense module, and a thin layer
    rbe.compress_(model, effort="fast")
    return model


def skeleton() -> Language:
    model = Language()
    model.register_buffer("steps", torch.tensor(0))
    model.extra = nn.ModuleList([model.body[3], nn.Linear(2, 2)])
    return model


@pytest.mark.parametrize("meta", [False, True])
def test_a_plain_model_comes_back(small: nn.Module, tmp_path: Path, meta: bool) -> None:
    folder = rbe.save(small, tmp_path / "out", max_shard_size=2000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with torch.device("meta" if meta else "cpu"):
        other = skeleton()
    if meta:  # what torch builds there is not tied by identity before it is told so
        other.head.weight = other.table.weight
    again = rbe.load(folder, model=other)
    assert again is other and seeded(again) == seeded(small)
    assert torch.equal(again(INDEX), small(INDEX))
    assert again.steps.item() == 7 and again.extra[0] is again.body[3]
    assert again.head.owner is again.table
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in small.state_dict().items())


def test_a_shared_seed_layer_comes_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(32, 32)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = build()
    rbe.compress_(model, effort="fast")
    again = rbe.load(rbe.save(model, tmp_path / "out"), model=build())
    assert again[0] is again[2] and torch.equal(again(torch.ones(32)), model(torch.ones(32)))


def test_dense_weights_stay_tied(tmp_path: Path) -> None:
    model = Language()
    rbe.compress_(model, effort="fast", exclude=["table"])
    other = Language()
    again = rbe.load(rbe.save(model, tmp_path / "out"), model=other)
    assert again.head.weight is again.table.weight and torch.equal(again(INDEX), model(INDEX))


def test_activations_are_a_load_option(small: nn.Module, tmp_path: Path) -> None:
    folder = rbe.save(small, tmp_path / "out")
    rough = rbe.load(folder, model=skeleton(), activations="int8")
    assert {m.activations for m in rough.modules() if isinstance(m, rbe.nn.Seeded)} == {"int8"}


def test_a_plain_model_needs_its_skeleton(small: nn.Module, tmp_path: Path) -> None:
    folder = rbe.save(small, tmp_path / "out")
    with pytest.raises(RbeError, match=r"seeds of a Language.*model="):
        rbe.load(folder)


def test_a_wrong_skeleton_is_refused_untouched(small: nn.Module, tmp_path: Path) -> None:
    folder = rbe.save(small, tmp_path / "out")
    other = skeleton()
    other.body[0] = nn.Linear(48, 32)
    with pytest.raises(RbeError, match=r"body\.0 is \(32, 48\) in the given model, but \(64, 48\)"):
        rbe.load(folder, model=other)
    assert seeded(other) == []
    other = skeleton()
    other.more = nn.Linear(3, 3)
    with pytest.raises(RbeError, match="same tensors"):
        rbe.load(folder, model=other)
    other = skeleton()
    other.extra[1].bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(RbeError, match=r"extra\.1\.bias is \(3,\)"):
        rbe.load(folder, model=other)
    with pytest.raises(RbeError, match=r"for table.*no such layer"):
        rbe.load(folder, model=nn.Sequential(nn.Linear(2, 2)))


def test_a_changed_byte_is_found(small: nn.Module, tmp_path: Path) -> None:
    folder = rbe.save(small, tmp_path / "out")
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    with pytest.raises(CorruptFile):
        rbe.load(folder, model=skeleton())


def test_nothing_is_overwritten_or_left_half_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rbe.save(small, tmp_path / "out")
    with pytest.raises(RbeError, match="exists"):
        rbe.save(small, tmp_path / "out")
    with pytest.raises(RbeError, match="holds no seeds"):
        rbe.save(nn.Linear(2, 2), tmp_path / "dense")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_module.checkpoint, "write_folder", full)
    with pytest.raises(OSError, match="No space"):
        rbe.save(small, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_transformers_model_comes_back(gpt2: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    rbe.compress_(model, effort="fast", bits=3)
    folder = rbe.save(model, tmp_path / "out", max_shard_size=20_000)
    again = rbe.load(folder)
    assert type(again) is type(model) and not again.training
    assert torch.equal(again(INDEX).logits, model(INDEX).logits)
    assert rbe.hf.check_fingerprint(folder, read_fingerprint(folder)) is None
    base = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(base(INDEX).last_hidden_state, model.transformer(INDEX).last_hidden_state)
    restored = copy.deepcopy(again)
    restored.dequantize()
    assert seeded(restored) == []


def test_a_compressed_transformers_model_saves_by_itself(gpt2: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    rbe.compress_(model, effort="fast")
    model.save_pretrained(tmp_path / "seeds")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seeds", output_loading_info=True)
    assert not any(info.values()) and torch.equal(again(INDEX).logits, model(INDEX).logits)
    for restored in (model, again):
        rbe.decompress_(restored).save_pretrained(tmp_path / "dense")
        plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
        assert not any(info.values()) and seeded(plain) == [] and not hasattr(plain.config, "quantization_config")
        assert torch.allclose(plain(INDEX).logits, restored(INDEX).logits)
        restored.float()


def test_save_pretrained_alone_is_told_apart(gpt2: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, quantization_config=rbe.hf.RbeConfig(effort="fast"))
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(RbeError, match=r"no checksums; load it with rbe\.hf\.load"):
        rbe.load(tmp_path / "out")
    with pytest.raises(RbeError, match="does not exist"):
        rbe.load(tmp_path / "absent")
    with pytest.raises(RbeError, match="not a compressed model"):
        rbe.load(gpt2)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_architecture_whose_files_have_older_names_comes_back(tmp_path: Path, loaded: bool) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    if loaded:
        model.save_pretrained(tmp_path / "dense")
        convert.compress(tmp_path / "dense", tmp_path / "seeds", effort="fast")
        model = rbe.load(tmp_path / "seeds")
    else:
        rbe.compress_(model, effort="fast")
    rbe.save(model, tmp_path / "again")
    assert torch.equal(rbe.load(tmp_path / "again")(x).logits, model(x).logits)
    convert.decompress(tmp_path / "again", tmp_path / "restored")
    restored = ViTForImageClassification.from_pretrained(tmp_path / "restored").eval()
    assert torch.allclose(restored(x).logits, model(x).logits, atol=1e-4)


@pytest.mark.parametrize("format", ["packed64", "packed128", "outer128"])
@pytest.mark.parametrize("skeleton", [nn.Linear, rbe.nn.Linear])
def test_open_seeds_are_saved_packed(tmp_path: Path, format: str, skeleton: type[nn.Module]) -> None:
    model = nn.Sequential(rbe.nn.Linear(32, 40, format=format), nn.ReLU(), nn.Linear(40, 2))
    folder = rbe.save(model, tmp_path / "out")
    layer = nn.Linear(32, 40) if skeleton is nn.Linear else rbe.nn.Linear(32, 40, format=format)
    again = rbe.load(folder, model=nn.Sequential(layer, nn.ReLU(), nn.Linear(40, 2)))
    x = torch.randn(3, 32)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    assert not again[0].trainable and model[0].trainable


def test_a_convolution_with_a_bias_of_seeds_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(rbe.nn.Conv2d(4, 9, 3, bias="seed", format="packed64", block=8))
    again = rbe.load(rbe.save(model, tmp_path / "out"), model=nn.Sequential(nn.Conv2d(4, 9, 3)))
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_alone_is_refused(tmp_path: Path) -> None:
    for layer in (rbe.nn.Linear(32, 32, format="packed64"), rbe.nn.StreamLinear(8, 8)):
        with pytest.raises(RbeError, match=r"save nn\.Sequential"):
            rbe.save(layer, tmp_path / "out")
