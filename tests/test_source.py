import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rbe import source
from rbe.errors import CorruptFile, RbeError


@pytest.fixture
def folder(tmp_path, bert):
    """A copy of the tiny BERT that a test may damage."""
    return shutil.copytree(bert, tmp_path / "bert")


def sharded(folder):
    """The same folder in two shards with an index."""
    tensors = load_file(folder / source.SINGLE)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / source.INDEX).write_text(json.dumps(index))
    (folder / source.SINGLE).unlink()
    return folder


def test_a_folder_is_read_the_same_whole_or_in_shards(folder):
    whole = {name: stored.read() for name, stored in source.open_source(folder).tensors.items()}
    parts = {name: stored.read() for name, stored in source.open_source(sharded(folder)).tensors.items()}
    assert list(whole) == list(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_layers_come_in_counting_order(tmp_path):
    save_file({f"layer.{k}.weight": torch.zeros(1) for k in range(12)}, tmp_path / "a.safetensors")
    assert list(source.open_source(tmp_path / "a.safetensors").tensors) == [f"layer.{k}.weight" for k in range(12)]


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(RbeError, match="does not exist"):
        source.open_source(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(RbeError, match=r"no \.safetensors file"):
        source.open_source(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RbeError, match=r"no config\.json$"):
        source.open_source(tmp_path / "empty")
    save_file({"a": torch.zeros(1)}, tmp_path / "empty" / "x.safetensors")
    with pytest.raises(RbeError, match=r"for a bare file give .*x\.safetensors"):
        source.open_source(tmp_path / "empty")
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(RbeError, match="no tensors"):
        source.open_source(tmp_path / "none.safetensors")
    (folder / source.SINGLE).unlink()
    with pytest.raises(RbeError, match="is the download complete"):
        source.open_source(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RbeError, match=r"pytorch_model\.bin.*save the model as safetensors"):
        source.open_source(folder)


def test_a_quantized_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for method, message in (("gptq", r"quantized already \(gptq\)"), ("rbe", "compressed already")):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(RbeError, match=message):
            source.open_source(folder)


def test_damaged_shards_are_named(folder):
    sharded(folder)
    first, second = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / source.INDEX).read_text())
    second.rename(folder / "elsewhere")
    with pytest.raises(CorruptFile, match=r"1 of 2 shards missing \(model-00002"):
        source.open_source(folder)
    (folder / "elsewhere").rename(second)
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(CorruptFile, match=r"model-00001.*end at byte"):
        source.open_source(folder)
    first.write_bytes(whole[:20])
    with pytest.raises(CorruptFile, match=r"model-00001.*header should be"):
        source.open_source(folder)
    shutil.copy(second, first)
    with pytest.raises(CorruptFile, match="stored in two files"):
        source.open_source(folder)
    first.write_bytes(whole)
    for weight_map, message in (
        ({**index["weight_map"], "ghost": first.name}, "promises ghost"),
        ({"a": "../a.safetensors"}, "outside"),
        ({}, "no weight_map"),
    ):
        (folder / source.INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(CorruptFile, match=message):
            source.open_source(folder)
    (folder / source.INDEX).write_text("{")
    with pytest.raises(CorruptFile, match="not readable JSON"):
        source.open_source(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CorruptFile, match=r"config\.json"):
        source.open_source(folder)


def test_other_files_are_found_and_other_weights_left(folder):
    for name in ("pytorch_model.bin", "onnx/model.onnx", ".git/HEAD", ".gitattributes", "1_Pooling/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    others = {path.as_posix() for path in source.open_source(folder).others}
    assert "1_Pooling/config.json" in others and "tokenizer.json" in others
    assert not others & {"pytorch_model.bin", "onnx/model.onnx", ".git/HEAD", ".gitattributes", "config.json"}


def test_the_architecture_says_what_layers_are(gpt2, bert):
    found = source.roles(source.open_source(gpt2))
    assert found.modules["transformer.h.0.attn.c_attn"].transposed
    assert found.modules["transformer.wte"].kind == "embedding" and not found.remarks
    found = source.roles(source.open_source(bert))
    assert found.modules["encoder.layer.0.attention.self.query"].kind == "linear"
    assert found.modules["embeddings.position_embeddings"].kind == "embedding"


def rename(folder, change, drop=()):
    tensors = load_file(folder / source.SINGLE)
    save_file({change(k): v for k, v in tensors.items() if k not in drop}, folder / source.SINGLE, {"format": "pt"})


def test_names_with_another_prefix_are_understood(tmp_path, bert, gpt2):
    folder = shutil.copytree(bert, tmp_path / "bert")
    rename(folder, lambda name: f"bert.{name}")
    assert source.roles(source.open_source(folder)).modules["bert.encoder.layer.0.output.dense"].kind == "linear"
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    rename(folder, lambda name: name.removeprefix("transformer."))
    assert source.roles(source.open_source(folder)).modules["h.0.mlp.c_fc"].transposed


def test_a_tied_head_that_repeats_the_embedding_is_found_and_one_that_differs_is_not(tmp_path, gpt2):
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    tensors = load_file(folder / source.SINGLE)
    head = tensors["transformer.wte.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / source.SINGLE, {"format": "pt"})
    found = source.roles(source.open_source(folder))
    assert found.tied == {"lm_head.weight": "transformer.wte.weight"} and "lm_head" not in found.modules
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / source.SINGLE, {"format": "pt"})
    found = source.roles(source.open_source(folder))
    assert not found.tied and found.modules["lm_head"].kind == "linear"
    assert found.modules["transformer.wte"].kind == "embedding"


def test_masks_that_old_files_hold_are_ignored_and_biases_are_not(tmp_path, gpt2):
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    tensors = load_file(folder / source.SINGLE)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, folder / source.SINGLE, {"format": "pt"})
    assert source.roles(source.open_source(folder)).ignored == {"transformer.h.0.attn.bias"}


def test_an_unknown_architecture_falls_back_to_names_with_a_remark(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "quux", "architectures": ["Quux"]}))
    found = source.roles(source.open_source(folder))
    assert found.modules is None and "Quux could not be built" in found.remarks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named(tmp_path, dtype, value):
    weight = torch.zeros(5, 7, dtype=dtype)
    weight[3, 2] = value
    save_file({"ok.weight": torch.ones(4), "a.weight": weight}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match=rf"a\.weight\[3, 2\] is {value}"):
        source.check_values(source.open_source(tmp_path / "a.safetensors"), frozenset())


def test_a_float64_that_float32_cannot_hold_is_named(tmp_path):
    save_file({"a.weight": torch.full((2, 2), 1e300, dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match=r"a\.weight\[0, 0\] is 1e\+300"):
        source.check_values(source.open_source(tmp_path / "a.safetensors"), frozenset())


def test_a_mask_of_infinities_is_no_weight(tmp_path):
    save_file({"mask": torch.full((3, 3), float("-inf"))}, tmp_path / "a.safetensors")
    source.check_values(source.open_source(tmp_path / "a.safetensors"), frozenset())
    with pytest.raises(RbeError, match="mask"):
        source.check_values(source.open_source(tmp_path / "a.safetensors"), frozenset({"mask"}))


def test_the_fingerprint_sees_every_change(folder):
    first = source.open_source(folder).fingerprint()
    assert source.open_source(folder).fingerprint() == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "x": 1}))
    second = source.open_source(folder).fingerprint()
    tensors = load_file(folder / source.SINGLE)
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, folder / source.SINGLE, {"format": "pt"})
    assert len({first, second, source.open_source(folder).fingerprint()}) == 3
