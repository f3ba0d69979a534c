import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import rbe
from rbe import checkpoint, convert, shards
from rbe.errors import CorruptFile, RbeError
from rbe.source import INDEX

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A bare file of four tensors and the folder it was compressed to."""
    base = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(48, 40),
        "a.bias": torch.randn(48),
        "emb.weight": torch.randn(40, 32).half(),
        "steps": torch.tensor(7),
    }
    save_file(tensors, base / "tiny.safetensors", {"format": "pt"})
    convert.compress(base / "tiny.safetensors", base / "seeds", effort="fast", threads=1)
    return base / "tiny.safetensors", base / "seeds"


@pytest.fixture
def dst(pair, tmp_path):
    """A copy of the compressed folder that a test may damage."""
    return shutil.copytree(pair[1], tmp_path / "seeds")


def reseal(folder, change):
    """Change an index as somebody would who can compute checksums."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    index["metadata"]["rbe"].pop("checksum", None)
    index["metadata"]["rbe"]["checksum"] = shards.canonical_digest(index)
    (folder / INDEX).write_text(json.dumps(index))


def reconfigure(folder, change):
    """The same for the configuration."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    digest = shards.canonical_digest(config["quantization_config"])
    reseal(folder, lambda index: index["metadata"]["rbe"].update(quantization=digest))


def test_a_folder_has_the_agreed_layout(pair):
    _, dst = pair
    assert {file.name for file in dst.iterdir()} == {"README.md", "config.json", SHARD, INDEX}
    about = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "rbe" and about["format_version"] == checkpoint.FORMAT_VERSION
    assert set(about["modules"]) == {"a", "emb"}
    assert about["modules"]["emb"] == {
        "spec": about["modules"]["emb"]["spec"],
        "kind": "embedding",
        "row_scale": True,
        "transposed": False,
        "dtype": "F16",
        "tied": [],
    }
    stored = load_file(dst / SHARD)
    assert {name: str(tensor.dtype) for name, tensor in stored.items()} == {
        "a.seeds": "torch.int64",
        "a.scale": "torch.float32",
        "a.bias": "torch.float32",
        "emb.seeds": "torch.int64",
        "emb.scale": "torch.float32",
        "emb.row_scale": "torch.float16",
        "steps": "torch.int64",
    }
    metadata = shards.read_header(dst / SHARD)[1]
    assert metadata["format"] == "pt" and metadata["rbe.format_version"] == str(checkpoint.FORMAT_VERSION)
    assert json.loads(metadata["rbe.tensors"])["a"] == about["modules"]["a"]["spec"]
    index = json.loads((dst / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert set(index["weight_map"]) == set(stored)


def test_inspect_lists_everything_stored(pair):
    src, dst = pair
    rows = {row.name: row for row in checkpoint.inspect(dst)}
    assert set(rows) == {"a", "emb", "a.bias", "steps"}
    a = rows["a"]
    assert (a.kind, a.shape, a.format, a.bits, a.floor) == ("linear", (48, 40), "trellis 2 bit", 2.0, 0.0625)
    assert a.nbytes == 9 * 64 + 4 and a.rate == 8 * 580 / 1920 and 0.0625 < a.error < 0.1
    assert rows["emb"].kind == "embedding" and rows["emb"].nbytes == 6 * 64 + 4 + 80
    assert rows["a.bias"].error == 0.0 and rows["a.bias"].floor is None
    assert sum(row.nbytes for row in rows.values()) == sum(
        t.nbytes for t in checkpoint.open_tensors(dst).tensors.values()
    )
    weight = load_file(src)["a.weight"]
    decoded = checkpoint.load_matrices(dst)[0]["a"].decode()
    assert a.error == pytest.approx(float((decoded - weight).square().sum() / weight.square().sum()), rel=1e-5)


def test_matrices_and_the_rest_are_loaded(pair):
    src, dst = pair
    dense = load_file(src)
    matrices, rest = checkpoint.load_matrices(dst)
    assert set(matrices) == {"a", "emb"} and set(rest) == {"a.bias", "steps"}
    assert torch.equal(rest["a.bias"], dense["a.bias"]) and rest["steps"] == 7
    assert matrices["emb"].row_scale.dtype == torch.float16 and matrices["emb"].spec.rotation[0] == 0


def test_a_sound_folder_has_no_problems(pair):
    src, dst = pair
    found = checkpoint.verify(dst)
    assert found.ok and found.tensors == 7 and found.compared == 0
    assert checkpoint.verify(dst, src).compared == 4
    assert checkpoint.is_ours(dst) and not checkpoint.strangers(dst)


def test_every_single_flipped_bit_in_a_shard_is_found_by_verify_and_by_the_loader(dst):
    path = dst / SHARD
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    # A bit of every byte of the header, all bits of a word, then every 61st: all bytes are under the same checksum.
    places = [9 * byte % 8 + 8 * byte for byte in range(header)]
    places += [*range(8 * header, 8 * header + 64), *range(8 * header + 64, 8 * len(whole), 61)]
    for bit in places:
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        with pytest.raises(CorruptFile):
            checkpoint.check_files(dst)
        if bit % 97 == 0:
            assert not checkpoint.verify(dst).ok
            with pytest.raises(CorruptFile):
                checkpoint.load_matrices(dst)
        whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    checkpoint.check_files(dst)


def test_a_damaged_tensor_is_named(dst):
    stored = checkpoint.open_tensors(dst).tensors["emb.row_scale"]
    with stored.file.open("r+b") as file:
        file.seek(stored.start)
        file.write(bytes([1 ^ next(iter(stored.chunks()))[0]]))
    with pytest.raises(CorruptFile, match=rf"{SHARD} was changed after it was written \(in emb\.row_scale\)"):
        checkpoint.check_files(dst)
    assert "emb.row_scale" in checkpoint.verify(dst).problems[0]


def test_lost_and_cut_files_are_named(dst):
    whole = (dst / SHARD).read_bytes()
    (dst / SHARD).write_bytes(whole[:-3])
    with pytest.raises(CorruptFile, match=rf"has {len(whole) - 3} bytes, it was written with {len(whole)}"):
        checkpoint.open_tensors(dst)
    (dst / SHARD).unlink()
    with pytest.raises(CorruptFile, match=f"{SHARD} is missing"):
        checkpoint.open_tensors(dst)
    (dst / SHARD).write_bytes(whole)
    for name in ("config.json", INDEX):
        saved = (dst / name).read_bytes()
        (dst / name).unlink()
        with pytest.raises(CorruptFile, match=f"{name} is missing"):
            checkpoint.open_tensors(dst)
        (dst / name).write_bytes(saved)
    assert checkpoint.verify(dst).ok


def test_what_is_no_compressed_folder_is_refused(tmp_path, bert):
    with pytest.raises(RbeError, match="does not exist"):
        checkpoint.read_index(tmp_path / "nothing")
    with pytest.raises(RbeError, match="not a compressed model"):
        checkpoint.read_index(tmp_path)
    assert not checkpoint.is_ours(tmp_path) and not checkpoint.is_ours(bert)
    dense = shutil.copytree(bert, tmp_path / "bert")
    (dense / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    with pytest.raises(RbeError, match="not a compressed model"):
        checkpoint.read_index(dense)


def test_a_changed_index_is_found(dst):
    path = dst / INDEX
    index = json.loads(path.read_text())

    def changed(change):
        other = copy.deepcopy(index)
        change(other)
        path.write_text(json.dumps(other))
        with pytest.raises(CorruptFile, match="was changed after it was written"):
            checkpoint.read_index(dst)

    changed(lambda i: i["weight_map"].pop("steps"))
    changed(lambda i: i["metadata"].update(total_size=1))
    changed(lambda i: i["metadata"]["rbe"]["errors"].update(a=0.01))
    changed(lambda i: i["metadata"]["rbe"].pop("checksum"))
    changed(lambda i: i.update(more=1))
    path.write_text(json.dumps(index, indent=7))  # layout is no content
    checkpoint.read_index(dst)


def test_an_index_that_contradicts_the_shards_is_found_though_its_checksum_is_right(dst):
    saved = (dst / INDEX).read_bytes()
    for change, message in (
        (lambda i: i["weight_map"].pop("steps"), "has 7 tensors"),
        (lambda i: i["weight_map"].update(ghost=SHARD), "does not hold ghost"),
        (lambda i: i["metadata"]["rbe"]["tensors"]["steps"].__setitem__(0, "I32"), "another dtype or shape"),
        (lambda i: i["metadata"]["rbe"]["files"][SHARD].update(bytes=5), "written with 5"),
        (lambda i: i["metadata"]["rbe"]["files"][SHARD].update(sha256="0"), "in its header"),
        (lambda i: i["metadata"]["rbe"].pop("files"), "content it should"),
        (lambda i: i["metadata"]["rbe"].update(tensors=[]), "content it should"),
        (lambda i: i.pop("weight_map"), "content it should"),
    ):
        reseal(dst, change)
        with pytest.raises(CorruptFile, match=message):
            checkpoint.check_files(dst)
        (dst / INDEX).write_bytes(saved)


@pytest.mark.parametrize("name", ["{outside}", "../outside", "a/../../outside", "", ".", "a\0b", 3])
def test_an_index_that_names_files_outside_the_folder_overwrites_nothing(dst, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    name = name.format(outside=outside) if isinstance(name, str) else name
    intact = (dst / INDEX).read_text()

    def copied(index):
        index["metadata"]["rbe"]["source"]["bare"] = False
        index["metadata"]["rbe"]["copied"] = {str(name): shards.file_digest(outside)}

    for change in (copied, lambda index: index["metadata"]["rbe"]["source"].update(name=name)):
        (dst / INDEX).write_text(intact)
        reseal(dst, change)
        if name == 3 and change is copied:
            continue  # JSON makes text of every key
        with pytest.raises(CorruptFile, match="outside the folder"):
            convert.decompress(dst, tmp_path / "dense")
        assert outside.read_text() == "precious" and not (tmp_path / "dense").exists()


def test_a_changed_seed_configuration_is_found(dst):
    path = dst / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["a"]["spec"]["rotation"][0] ^= 1
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptFile, match="quantization_config was changed"):
        checkpoint.open_tensors(dst)
    path.write_text("{}")
    with pytest.raises(CorruptFile, match="no rbe quantization_config"):
        checkpoint.open_tensors(dst)


def test_another_setting_may_be_edited_and_verify_says_so(dst):
    path = dst / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "mine"}))
    checkpoint.check_files(dst)
    assert checkpoint.verify(dst).problems == (f"{path} was changed after it was written",)


def test_seeds_that_do_not_fit_their_specification_are_found(dst):
    saved = [(dst / name).read_bytes() for name in (INDEX, "config.json")]
    for change, error, message in (
        (lambda q: q["modules"]["a"]["spec"].update(shape=[64, 40]), CorruptFile, r"a\.seeds should be there as I64"),
        (lambda q: q["modules"]["a"].update(row_scale=True), CorruptFile, r"a\.row_scale should be there"),
        (lambda q: q["modules"]["a"].pop("spec"), CorruptFile, "content it should"),
        (lambda q: q.update(modules=[]), CorruptFile, "content it should"),
        (lambda q: q["modules"]["a"]["spec"].update(colour=1), RbeError, "no seed specification"),
        (lambda q: q["modules"]["a"]["spec"].update(format="quux"), RbeError, "'quux' is not known"),
    ):
        reconfigure(dst, change)
        with pytest.raises(error, match=message):
            checkpoint.open_tensors(dst)
        for name, content in zip((INDEX, "config.json"), saved, strict=True):
            (dst / name).write_bytes(content)


@pytest.mark.parametrize("where", ["index", "config"])
def test_a_version_from_the_future_says_what_to_do(dst, where):
    later = checkpoint.FORMAT_VERSION + 1
    if where == "index":  # the checksum is not looked at: a later version may compute another
        index = json.loads((dst / INDEX).read_text())
        index["metadata"]["rbe"]["format_version"] = later
        (dst / INDEX).write_text(json.dumps(index))
    else:
        reconfigure(dst, lambda q: q.update(format_version=later))
    with pytest.raises(RbeError, match=f"format version {later}.*install a later rbe") as caught:
        checkpoint.open_tensors(dst)
    assert not isinstance(caught.value, CorruptFile)
    with pytest.raises(RbeError, match="install a later rbe"):
        checkpoint.verify(dst)


def test_a_draft_of_the_format_is_refused(dst, monkeypatch):
    monkeypatch.setattr(checkpoint.folder, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
    with pytest.raises(RbeError, match="a draft whose weights this rbe"):
        checkpoint.open_tensors(dst)


@pytest.mark.parametrize("version", [-1, "0", None, True, 0.5])
def test_a_version_that_is_none_is_refused(dst, version):
    reseal(dst, lambda index: index["metadata"]["rbe"].update(format_version=version))
    with pytest.raises(CorruptFile, match="makes no sense"):
        checkpoint.open_tensors(dst)


def test_verify_compares_with_the_source(pair, dst, tmp_path):
    src, _ = pair
    dense = load_file(src)
    for name, change in (("a.weight", lambda t: t * 1.01), ("a.bias", lambda t: t + 1), ("steps", lambda t: t + 1)):
        save_file({**dense, name: change(dense[name])}, tmp_path / "other.safetensors", {"format": "pt"})
        problems = checkpoint.verify(dst, tmp_path / "other.safetensors").problems
        assert len(problems) == 1 and problems[0].startswith(name.removesuffix(".weight"))
    save_file({"a.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    assert len(checkpoint.verify(dst, tmp_path / "other.safetensors").problems) == 4
    with pytest.raises(RbeError, match="does not exist"):
        checkpoint.verify(dst, tmp_path / "nothing")


def test_the_fingerprint_is_stored_and_compared(dst):
    assert checkpoint.read_fingerprint(dst) is None
    checkpoint.write_fingerprint(dst, {"norm": 2.5})
    assert checkpoint.read_fingerprint(dst) == {"norm": 2.5}
    asked = []
    found = checkpoint.verify(dst, answers=lambda folder, stored: asked.append((folder, stored)))
    assert found.ok and asked == [(dst, {"norm": 2.5})]
    assert checkpoint.verify(dst, answers=lambda folder, stored: "it differs").problems == ("it differs",)
    checkpoint.write_fingerprint(dst, None)
    assert checkpoint.verify(dst, answers=lambda folder, stored: "it differs").ok


def test_copied_files_are_verified(tmp_path, bert):
    dst = tmp_path / "seeds"
    convert.compress(bert, dst, effort="fast", threads=1, fingerprint=lambda folder: {})
    (dst / "tokenizer.json").write_text("{}")
    assert checkpoint.verify(dst).problems == (f"{dst / 'tokenizer.json'} was changed after it was written",)
    (dst / "tokenizer.json").unlink()
    assert checkpoint.verify(dst).problems == (f"{dst / 'tokenizer.json'} is missing",)
    (dst / "mine.txt").write_text("x")
    assert checkpoint.strangers(dst) == ["mine.txt"]


def test_a_folder_saved_by_others_can_be_sealed(dst):
    whole = checkpoint.load_matrices(dst)[0]["a"].decode()
    (dst / INDEX).unlink()
    (dst / SHARD).rename(dst / "model.safetensors")
    checkpoint.seal(dst, errors={"a": 0.5})
    assert checkpoint.verify(dst).ok and (dst / SHARD).is_file()
    assert torch.equal(checkpoint.load_matrices(dst)[0]["a"].decode(), whole)
    assert {row.name: row.error for row in checkpoint.inspect(dst)} == {
        "a": 0.5,
        "emb": None,
        "a.bias": 0.0,
        "steps": 0.0,
    }
    (dst / "config.json").write_text("{}")
    with pytest.raises(RbeError, match="no rbe quantization_config"):
        checkpoint.seal(dst)


def test_shards_are_cut_by_size():
    tensors = [
        shards.outgoing(name, torch.zeros(n, dtype=torch.uint8))
        for name, n in (("a", 5), ("b", 5), ("c", 20), ("d", 1))
    ]
    assert [[t.name for t in part] for part in checkpoint.cut(tensors, 10)] == [["a", "b"], ["c"], ["d"]]
    assert [[t.name for t in part] for part in checkpoint.cut(tensors, 1)] == [["a"], ["b"], ["c"], ["d"]]


@pytest.fixture
def kept(tmp_path):
    """A compressed folder with single weights beside the seeds."""
    torch.manual_seed(0)
    weight = torch.randn(48, 40)
    save_file({"a.weight": weight}, tmp_path / "tiny.safetensors", {"format": "pt"})
    convert.compress(tmp_path / "tiny.safetensors", tmp_path / "seeds", effort="fast", threads=1, outliers=0.01)
    return tmp_path / "seeds"


def forge(folder, change):
    """Change tensors as somebody would who can compute checksums."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SHARD).items()}  # off the file's pages
    change(tensors)
    outgoing = [shards.outgoing(name, tensor) for name, tensor in tensors.items()]
    digest, sums = shards.write(folder / SHARD, outgoing, {"format": "pt"})

    def about(index):
        ours = index["metadata"]["rbe"]
        ours["files"][SHARD] = {"bytes": (folder / SHARD).stat().st_size, "sha256": digest}
        ours["tensors"] = {t.name: [t.dtype, list(t.shape), sums[t.name]] for t in outgoing}
        index["weight_map"] = dict.fromkeys(tensors, SHARD)

    reseal(folder, about)


def test_every_flipped_bit_of_single_weights_is_found(kept):
    path = kept / SHARD
    whole = bytearray(path.read_bytes())
    tensors = checkpoint.open_tensors(kept).tensors
    for stored in (tensors["a.outlier_index"], tensors["a.outlier_values"]):
        for bit in range(8 * stored.start, 8 * stored.stop, 5):
            whole[bit // 8] ^= 1 << bit % 8
            path.write_bytes(whole)
            with pytest.raises(CorruptFile, match=f"in {stored.name}"):
                rbe.load(kept)
            whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    assert checkpoint.verify(kept).ok


INDEX_NAME, VALUES_NAME = "a.outlier_index", "a.outlier_values"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[INDEX_NAME].__setitem__(-1, 48 * 40), "ascend and lie inside"),
        (lambda t: t[INDEX_NAME].__setitem__(0, -1), "ascend and lie inside"),
        (lambda t: t[INDEX_NAME].__setitem__(3, t[INDEX_NAME][4]), "ascend"),
        (lambda t: t.update({INDEX_NAME: t[INDEX_NAME].flip(0)}), "ascend"),
        (lambda t: t[VALUES_NAME].__setitem__(2, torch.nan), "NaN"),
        (lambda t: t[VALUES_NAME].__setitem__(2, torch.inf), "infinite"),
        (lambda t: t.update({INDEX_NAME: t[INDEX_NAME].long()}), "should be there as I32"),
        (lambda t: t.update({VALUES_NAME: t[VALUES_NAME].bfloat16()}), "should be there as F16"),
        (lambda t: t.update({VALUES_NAME: t[VALUES_NAME][1:].clone()}), "should be there as F16"),
        (lambda t: t.update({INDEX_NAME: t[INDEX_NAME][None].clone()}), "should be there as I32"),
        (lambda t: t.pop(INDEX_NAME), "should be there"),
        (lambda t: t.pop(VALUES_NAME), "should be there"),
    ],
)
def test_single_weights_that_are_none_are_refused_though_the_checksums_are_right(kept, tmp_path, change, message):
    forge(kept, change)
    for use in (rbe.load, lambda folder: convert.decompress(folder, tmp_path / "dense.safetensors")):
        with pytest.raises(CorruptFile, match=message):
            use(kept)
    assert message in str(checkpoint.verify(kept).problems)
    assert not (tmp_path / "dense.safetensors").exists()
