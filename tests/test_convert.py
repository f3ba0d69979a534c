import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from rbe import checkpoint, convert, metrics, search, shards
from rbe.convert import place
from rbe.errors import CorruptFile, RbeError
from rbe.source import INDEX, SINGLE


def compress(src, dst, **options):
    """Fast, on one thread, with a constant in place of the model's answer."""
    return convert.compress(
        src, dst, **{"effort": "fast", "threads": 1, "fingerprint": lambda folder: {"is": 1}, **options}
    )


def content(folder):
    """Every file of a folder, by name."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def bare(tmp_path):
    """A bare file with matrices of every kind of shape, and the tensors in it."""
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(48, 40),
        "a.bias": torch.randn(48),
        "b.weight": torch.randn(33, 65),
        "tok_emb.weight": torch.randn(50, 32),
        "zero.weight": torch.zeros(32, 32),
        "row.weight": torch.randn(1, 100),
        "column.weight": torch.randn(100, 1),
        "nothing.weight": torch.randn(0, 16),
        "steps": torch.tensor(3),
    }
    save_file(tensors, tmp_path / "tiny.safetensors", {"format": "pt", "from": "test"})
    return tmp_path / "tiny.safetensors", tensors


def outputs(model, ids):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_transformers_folder_goes_there_and_back(tmp_path, name, request):
    from transformers import AutoModel, AutoModelForCausalLM

    import rbe.hf  # noqa: F401

    src = request.getfixturevalue(name)
    done = convert.compress(src, tmp_path / "seeds", bits=4, effort="fast", threads=1)
    assert done.fingerprint["values"] and not done.remarks
    assert checkpoint.read_fingerprint(tmp_path / "seeds") == done.fingerprint
    assert checkpoint.verify(tmp_path / "seeds", src).ok
    convert.decompress(tmp_path / "seeds", tmp_path / "dense")

    kind = AutoModel if name == "bert" else AutoModelForCausalLM
    ids = torch.arange(20).reshape(2, 10)
    first = outputs(kind.from_pretrained(src).eval(), ids)
    seeds = outputs(kind.from_pretrained(tmp_path / "seeds").eval(), ids)
    dense = outputs(kind.from_pretrained(tmp_path / "dense").eval(), ids)
    assert metrics.relative_squared_error(seeds, dense) < 1e-9
    assert metrics.relative_squared_error(dense, first) < 0.1

    before, after = load_file(src / SINGLE), load_file(tmp_path / "dense" / SINGLE)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    config = json.loads((src / "config.json").read_text())
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == config
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_bare_file_goes_there_and_back(bare, tmp_path):
    src, tensors = bare
    done = compress(src, tmp_path / "seeds", fingerprint=None)
    assert done.fingerprint is None
    assert [one.name for one in done.encoded] == ["a.weight", "b.weight", "tok_emb.weight", "zero.weight"]
    matrices, rest = checkpoint.load_matrices(tmp_path / "seeds")
    assert set(rest) == {"a.bias", "row.weight", "column.weight", "nothing.weight", "steps"}
    assert all(torch.equal(rest[name], tensors[name]) for name in rest)
    assert matrices["zero"].scale == 0 and not matrices["zero"].decode().any()
    for out in (tmp_path / "back.safetensors", tmp_path / "back"):
        convert.decompress(tmp_path / "seeds", out)
        back = load_file(out if out.is_file() else out / "tiny.safetensors")
        assert back.keys() == tensors.keys()
        assert torch.equal(back["b.weight"], matrices["b"].decode())
        assert all(back[name].dtype == tensors[name].dtype and back[name].shape == tensors[name].shape for name in back)
    assert shards.read_header(tmp_path / "back.safetensors")[1] == {"format": "pt", "from": "test"}


def test_the_outcome_says_what_a_report_needs(bare, tmp_path):
    src, tensors = bare
    done = compress(src, tmp_path / "seeds", bits=3, embeddings_bits=4)
    by_name = {one.name: one for one in done.encoded}
    matrices, _ = checkpoint.load_matrices(tmp_path / "seeds")
    for name in ("a", "b", "tok_emb"):
        one = by_name[f"{name}.weight"]
        assert one.error == pytest.approx(
            metrics.relative_squared_error(matrices[name].decode(), tensors[f"{name}.weight"])
        )
        assert one.nbytes == matrices[name].nbytes and one.spec == matrices[name].spec and one.seconds > 0
        assert one.floor == (2**-8 if name == "tok_emb" else 2**-6)
    assert done.weights == sum(t.numel() for t in tensors.values()) and done.fp32_bytes == 2 * done.fp16_bytes
    assert done.nbytes == sum(f.stat().st_size for f in done.path.glob("*.safetensors"))
    assert done.ratio == done.fp32_bytes / done.nbytes
    assert done.peak_rss is None or done.peak_rss > 1 << 20
    assert json.loads(json.dumps(done.to_json()))["encoded"][0]["name"] == "a.weight"
    rows = {row.name: row.error for row in checkpoint.inspect(done.path)}
    assert rows["a"] == by_name["a.weight"].error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_widths_are_encoded_and_restored(tmp_path, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    save_file({"a.weight": weight, "a.bias": torch.ones(64).to(dtype)}, tmp_path / "a.safetensors")
    done = compress(tmp_path / "a.safetensors", tmp_path / "seeds", bits=4)
    assert done.encoded[0].error < 0.006
    convert.decompress(tmp_path / "seeds", tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")
    assert back["a.weight"].dtype == dtype and back["a.bias"].dtype == dtype
    assert metrics.relative_squared_error(back["a.weight"], weight) == pytest.approx(done.encoded[0].error, rel=0.05)
    convert.decompress(tmp_path / "seeds", tmp_path / "c.safetensors", dtype=torch.float32)
    assert load_file(tmp_path / "c.safetensors")["a.weight"].dtype == torch.float32


def test_the_same_settings_give_the_same_bytes_however_the_work_is_spread(bare, tmp_path):
    import joblib

    src, _ = bare
    compress(src, tmp_path / "one" / "seeds")
    compress(src, tmp_path / "two" / "seeds", workers=2, threads=None)
    with joblib.parallel_config("sequential"):
        compress(src, tmp_path / "three" / "seeds", workers=2, threads=2)
    one, two, three = (content(tmp_path / name / "seeds") for name in ("one", "two", "three"))
    assert one == two == three
    compress(src, tmp_path / "four" / "seeds", seed=1)
    assert (
        content(tmp_path / "four" / "seeds")["model-00001-of-00001.safetensors"]
        != one["model-00001-of-00001.safetensors"]
    )


def test_processes_can_do_the_work_too(bare, tmp_path):
    import joblib

    src, _ = bare
    compress(src, tmp_path / "one" / "seeds")
    with joblib.parallel_config("loky"):
        compress(src, tmp_path / "two" / "seeds", workers=2)
    assert content(tmp_path / "one" / "seeds") == content(tmp_path / "two" / "seeds")


def test_shards_are_cut_and_hold_the_same(bare, tmp_path):
    src, tensors = bare
    compress(src, tmp_path / "whole")
    compress(src, tmp_path / "cut", max_shard_size="0.5KB")
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 3
    one, other = (checkpoint.load_matrices(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(torch.equal(one[name].seeds, other[name].seeds) for name in one)
    convert.decompress(tmp_path / "cut", tmp_path / "back")
    assert load_file(tmp_path / "back" / "tiny.safetensors").keys() == tensors.keys()


def test_a_dense_folder_comes_back_in_shards(bert, tmp_path):
    compress(bert, tmp_path / "seeds")
    convert.decompress(tmp_path / "seeds", tmp_path / "dense", max_shard_size=50_000)
    index = json.loads((tmp_path / "dense" / INDEX).read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        found.update(load_file(tmp_path / "dense" / file))
    assert found.keys() == load_file(bert / SINGLE).keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def test_a_head_tied_in_the_file_is_stored_once_and_comes_back(gpt2, tmp_path):
    src = shutil.copytree(gpt2, tmp_path / "gpt2")
    tensors = load_file(src / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, src / SINGLE, {"format": "pt"})
    compress(src, tmp_path / "seeds")
    assert not any(name.startswith("lm_head") for name in checkpoint.open_tensors(tmp_path / "seeds").tensors)
    assert checkpoint.read_config(tmp_path / "seeds")["quantization_config"]["modules"]["transformer.wte"]["tied"] == [
        "lm_head"
    ]
    convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    back = load_file(tmp_path / "dense" / SINGLE)
    assert torch.equal(back["lm_head.weight"], back["transformer.wte.weight"])


def test_a_dry_run_writes_nothing_and_tells_everything(bare, tmp_path):
    src, _ = bare
    before = content(tmp_path)
    planned = compress(src, tmp_path / "deep" / "seeds", dry_run=True)
    assert content(tmp_path) == before and not (tmp_path / "deep").exists()
    assert planned.dry_run and planned.seconds > 0 and planned.needed_bytes > planned.nbytes
    assert [e.name for e in planned.plan.seeded] == ["a.weight", "b.weight", "tok_emb.weight", "zero.weight"]
    done = compress(src, tmp_path / "deep" / "seeds")
    assert 0 < done.nbytes - planned.nbytes < 4096  # the header of one file
    assert [(e.name, e.nbytes) for e in done.plan] == [(e.name, e.nbytes) for e in planned.plan]


def test_progress_reaches_the_end_and_never_goes_back(bare, tmp_path):
    src, _ = bare
    events = []
    compress(src, tmp_path / "seeds", progress=events.append)
    assert [e for k, e in enumerate(e.stage for e in events) if k == 0 or events[k - 1].stage != e] == [
        "prepare",
        "encode",
        "write",
    ]
    encode = [e for e in events if e.stage == "encode"]
    assert [e.done for e in encode] == sorted(e.done for e in encode) and encode[-1].done == encode[-1].total
    assert all(e.rate > 0 and e.left is not None for e in encode[1:])


# what must be refused, with nothing changed


@pytest.fixture
def unchanged(tmp_path):
    """Fails the test if anything under tmp_path is other than when `unchanged()` was called."""
    saved = {}
    yield lambda: saved.update(content(tmp_path))
    assert content(tmp_path) == saved
    assert not list(tmp_path.rglob(".*"))


def test_a_target_that_is_not_ours_is_never_touched(bare, bert, tmp_path, unchanged):
    src, _ = bare
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    shutil.copytree(bert, tmp_path / "model")
    unchanged()
    for name in ("notes", "file", "model"):
        with pytest.raises(RbeError, match=r"exists and was not written by rbe; nothing was changed"):
            compress(src, tmp_path / name)
    with pytest.raises(RbeError, match="no folder that you may write to"):
        compress(src, tmp_path / "file" / "seeds")


def test_source_and_target_must_not_lie_in_each_other(bare, bert, tmp_path, unchanged):
    src, _ = bare
    shutil.copytree(bert, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    unchanged()
    for origin, target in (
        (tmp_path / "model", tmp_path / "model"),
        (tmp_path / "model", tmp_path / "model" / "seeds"),
        (tmp_path / "model", tmp_path / "link"),
        (src, src),
        (src, tmp_path),
        (tmp_path / "model", tmp_path),
    ):
        with pytest.raises(RbeError, match="lie in each other"):
            compress(origin, target)


def test_our_own_folder_is_replaced_unless_it_holds_something_else(bare, tmp_path):
    src, _ = bare
    dst = tmp_path / "seeds"
    dst.mkdir()  # an empty folder is free
    compress(src, dst)
    first = content(dst)
    compress(src, dst, bits=4)
    assert content(dst) != first and checkpoint.verify(dst, src).ok
    (dst / "notes.txt").write_text("precious")
    before = content(tmp_path)
    with pytest.raises(RbeError, match=r"holds other files too \(notes\.txt\)"):
        compress(src, dst)
    assert content(tmp_path) == before


def test_a_target_that_appears_during_the_work_is_not_touched(bare, tmp_path):
    src, _ = bare

    def interfere(folder):
        (tmp_path / "seeds").mkdir()
        (tmp_path / "seeds" / "diary.txt").write_text("precious")
        return {"is": 1}

    with pytest.raises(RbeError, match="was not written by rbe"):
        compress(src, tmp_path / "seeds", fingerprint=interfere)
    assert content(tmp_path / "seeds") == {"diary.txt": b"precious"}
    shutil.rmtree(tmp_path / "seeds")
    assert compress(src, tmp_path / "seeds").resumed == 4


def test_a_number_that_is_not_finite_is_named_before_the_work(tmp_path, unchanged):
    weight = torch.zeros(32, 32)
    weight[4, 5] = float("nan")
    save_file({"good.weight": torch.ones(32, 32), "a.weight": weight}, tmp_path / "a.safetensors")
    unchanged()
    with pytest.raises(RbeError, match=r"a\.weight\[4, 5\] is nan"):
        compress(tmp_path / "a.safetensors", tmp_path / "seeds")


def test_settings_that_cannot_work_are_refused(bare, tmp_path, unchanged):
    src, _ = bare
    unchanged()
    for options, message in (
        ({"bits": 5}, r"choose one of 0\.5, 1"),
        ({"bits": 0}, "choose one of"),
        ({"embeddings_bits": 9}, "choose one of"),
        ({"effort": "heroic"}, "choose one of fast, balanced, best"),
        ({"workers": 0}, "one at least"),
        ({"threads": 0}, "one at least"),
        ({"max_shard_size": "tiny"}, "is no size"),
        ({"max_shard_size": -1}, "is no size"),
        ({"include": ["nope*"]}, "fits no tensor"),
        ({"include": ["a", "b", "tok_emb", "zero"], "exclude": ["*"]}, "no matrix that can become seeds"),
    ):
        with pytest.raises(RbeError, match=message):
            compress(src, tmp_path / "seeds", **options)


def test_a_model_without_matrices_is_refused(tmp_path):
    save_file({"a.bias": torch.ones(8), "a.steps": torch.tensor(1)}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match="it has no matrices"):
        compress(tmp_path / "a.safetensors", tmp_path / "seeds")
    save_file({"a.weight": torch.ones(1, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match="too thin"):
        compress(tmp_path / "a.safetensors", tmp_path / "seeds")


def test_names_that_would_clash_are_refused(tmp_path):
    save_file({"a.weight": torch.ones(32, 32), "a.scale": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match=r"already has a tensor a\.scale"):
        compress(tmp_path / "a.safetensors", tmp_path / "seeds")


def test_too_little_space_is_noticed_before_the_work(bare, tmp_path, unchanged, monkeypatch):
    src, _ = bare
    usage = namedtuple("usage", "total used free")
    compress(src, tmp_path / "ready")
    unchanged()
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(0, 0, 1 << 19))
    with pytest.raises(RbeError, match=r"needs [\d,]+ bytes while it is written, and 524,288 are free"):
        compress(src, tmp_path / "seeds")
    with pytest.raises(RbeError, match="are free"):
        convert.decompress(tmp_path / "ready", tmp_path / "dense")


def test_a_disk_that_fills_up_keeps_the_work_and_shows_no_result(bare, tmp_path, monkeypatch):
    src, _ = bare
    compress(src, tmp_path / "other" / "seeds")
    put, room = shards.put, 0

    def tight(file, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            file.write(data[: max(0, room + len(data))])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, data)

    monkeypatch.setattr(shards, "put", tight)
    resumed = []
    for room in (0, 100, 1500, 4000, 6000, 12000):  # noqa: B007  tight() counts it down
        with pytest.raises(RbeError, match="the disk is full"):
            compress(src, tmp_path / "seeds")
        assert not (tmp_path / "seeds").exists()
        journal = tmp_path / ".seeds.rbe-partial" / "journal.jsonl"
        resumed.append(len(journal.read_text().splitlines()) - 1 if journal.exists() else -1)
        assert not (tmp_path / ".seeds.rbe-partial" / "out").exists()
    assert resumed == sorted(resumed) and resumed[-1] == 4
    room = 1 << 30
    assert compress(src, tmp_path / "seeds").resumed == 4
    assert content(tmp_path / "seeds") == content(tmp_path / "other" / "seeds")
    room = 3000
    with pytest.raises(RbeError, match=r"the disk is full.*nothing was left behind"):
        convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    assert not (tmp_path / "dense").exists() and not list(tmp_path.glob(".*"))


def test_a_second_run_on_the_same_target_is_refused(bare, tmp_path):
    src, _ = bare

    def another(folder):
        with pytest.raises(RbeError, match="is in use"):
            compress(src, tmp_path / "seeds")
        return {"is": 1}

    compress(src, tmp_path / "seeds", fingerprint=another)


def test_a_source_that_changes_during_the_work_is_noticed(bare, tmp_path, monkeypatch):
    src, _ = bare
    encode = search.encode

    def slow(*args, **options):
        os.utime(src, ns=(1, 1))
        return encode(*args, **options)

    monkeypatch.setattr(search, "encode", slow)
    with pytest.raises(RbeError, match="was changed while it was read"):
        compress(src, tmp_path / "seeds")
    assert not (tmp_path / "seeds").exists()


def test_decompress_refuses_what_it_must(bare, tmp_path):
    src, _ = bare
    compress(src, tmp_path / "seeds")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    for out in (tmp_path / "full", src):
        with pytest.raises(RbeError, match="exists; nothing was changed"):
            convert.decompress(tmp_path / "seeds", out)
    for out in (tmp_path / "seeds", tmp_path / "seeds" / "dense", tmp_path):
        with pytest.raises(RbeError, match="lie in each other"):
            convert.decompress(tmp_path / "seeds", out)
    with pytest.raises(RbeError, match="does not exist"):
        convert.decompress(tmp_path / "nothing", tmp_path / "dense")
    shard = next((tmp_path / "seeds").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptFile):
        convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    assert not (tmp_path / "dense").exists() and not list(tmp_path.glob(".*"))


def test_a_model_that_cannot_be_asked_is_written_with_a_remark(bert, tmp_path, monkeypatch):
    import rbe.hf

    def refuse(folder):
        raise RbeError("it wants images")

    monkeypatch.setattr(rbe.hf, "fingerprint", refuse)
    done = convert.compress(bert, tmp_path / "seeds", effort="fast", threads=1)
    assert done.fingerprint is None and "it wants images" in done.remarks[0]
    assert checkpoint.verify(tmp_path / "seeds").ok


def test_an_unknown_architecture_is_compressed_by_names(bert, tmp_path):
    src = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "model_type": "quux", "architectures": ["Quux"]}))
    done = compress(src, tmp_path / "seeds")
    assert "Quux could not be built" in done.remarks[0]
    assert {e.kind for e in done.plan.seeded} == {"linear", "embedding"}


def test_the_card_and_the_source_card_are_both_there(bert, tmp_path):
    src = shutil.copytree(bert, tmp_path / "bert")
    (src / "README.md").write_text("the source's own")
    (src / "1_Pooling").mkdir()
    (src / "1_Pooling" / "config.json").write_text("{}")
    compress(src, tmp_path / "seeds")
    card = (tmp_path / "seeds" / "README.md").read_text()
    assert "import rbe.hf" in card and "BertModel.from_pretrained" in card
    assert (tmp_path / "seeds" / "README.source.md").read_text() == "the source's own"
    assert (tmp_path / "seeds" / "1_Pooling" / "config.json").exists()
    convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    assert (tmp_path / "dense" / "README.md").read_text() == "the source's own"
    assert not (tmp_path / "dense" / "README.source.md").exists()


MEMORY = """
import resource, sys, torch
from rbe import convert
from rbe import search
from rbe.matrix import SeedMatrix
def encode(weight, **options):
    zeros = torch.zeros(weight.numel() // 256, 8, dtype=torch.int64)
    return SeedMatrix.from_seeds(zeros, tuple(weight.clone().shape), "trellis", window=12)
search.encode = encode  # the memory of the encoder is another matter
convert.compress(sys.argv[1], sys.argv[2] + "0", include=["m0"], effort="fast", threads=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.compress(sys.argv[1], sys.argv[2], effort="fast", threads=1)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts resident pages as Linux does")
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    """Six matrices take no more than one does, apart from the results and the pages of the mapped file."""
    torch.manual_seed(0)
    side = 1024
    save_file({f"m{k}.weight": torch.randn(side, side) for k in range(6)}, tmp_path / "a.safetensors")
    run = [sys.executable, "-c", MEMORY, tmp_path / "a.safetensors", tmp_path / "seeds"]
    # Freed blocks go back to the system at once: how the allocator fragments is another matter, and changes by chance.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True, env=env).stdout)
    assert grown < 4 * 4 * side * side
