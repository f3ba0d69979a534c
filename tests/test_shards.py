import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rbe import shards
from rbe.errors import CorruptFile


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "count": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def write(path, tensors, metadata=None):
    return shards.write(path, [shards.outgoing(k, v) for k, v in tensors.items()], metadata or {"format": "pt"})


def test_the_safetensors_package_reads_what_is_written(tmp_path, tensors):
    write(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": "x"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_what_the_safetensors_package_writes_is_read(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    found, metadata = shards.read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    for copy in (True, False):
        assert all(torch.equal(found[k].read(copy), tensors[k]) for k in tensors)
        assert all(found[k].read(copy).shape == tensors[k].shape for k in tensors)
    assert b"".join(found["half"].chunks()) == shards.raw(tensors["half"])


def test_data_starts_on_a_cache_line(tmp_path, tensors):
    write(tmp_path / "a.safetensors", tensors)
    found, _ = shards.read_header(tmp_path / "a.safetensors")
    assert min(t.start for t in found.values()) % 64 == 0
    assert all(t.start % shards.SIZES[t.dtype] == 0 for t in found.values())


def test_golden_bytes(tmp_path):
    write(tmp_path / "a.safetensors", {"w": torch.tensor([1, 2], dtype=torch.int64)})
    assert (tmp_path / "a.safetensors").read_bytes() == (
        b"\x78\0\0\0\0\0\0\0"
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}' + b" " * 34 +
        b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"
    )  # fmt: skip


def test_a_read_copy_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.zeros(4)})
    tensor = shards.read_header(path)[0]["w"].read()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)
    assert torch.equal(tensor, torch.zeros(4))


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    header = json.dumps({"w": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    header += b" " * (3 - len(header) % 8 % 3)
    header += b" " * ((5 - len(header)) % 8)  # the data starts at 8 n + 5
    data = torch.tensor([1.5, -2.5], dtype=torch.float64)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + shards.raw(data))
    found = shards.read_header(tmp_path / "a.safetensors")[0]["w"]
    assert found.start % 8 == 5
    assert torch.equal(found.read(copy=False), data)


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry()}, b"\0" * 7, "end at byte"),
        ({"w": entry()}, b"\0" * 9, "end at byte"),
        ({"w": entry(shape=[3])}, b"\0" * 8, "12 bytes, but has 8"),
        ({"w": entry(dtype="F31")}, b"\0" * 8, "dtype 'F31'"),
        ({"w": entry(shape=[-2])}, b"\0" * 8, "shape"),
        ({"w": entry(shape=[2.0])}, b"\0" * 8, "shape"),
        ({"w": entry(shape=[True, 2])}, b"\0" * 8, "shape"),
        ({"w": entry(), "v": entry()}, b"\0" * 16, "starts at byte"),
        ({"w": entry(data_offsets=[8, 16])}, b"\0" * 16, "starts at byte"),
        ({"w": {"dtype": "F32"}}, b"\0" * 8, "does not make sense"),
        ({"w": 3}, b"", "does not make sense"),
        ({"__metadata__": {"a": 1}}, b"", "not text"),
        ([], b"", "does not make sense"),
        ({"w": entry(dtype=["F32"])}, b"\0" * 8, "does not make sense"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, message):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CorruptFile, match=message):
        shards.read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{", b"\x04\0\0\0\0\0\0\0\xff\xfe{}"]
)
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match="no intact safetensors"):
        shards.read_header(tmp_path / "a.safetensors")
    with pytest.raises(CorruptFile, match="missing"):
        shards.read_header(tmp_path / "b.safetensors")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    one = '"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f"{{{one},{one}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(CorruptFile, match="twice"):
        shards.read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}'])
def test_json_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"a\.json"):
        shards.read_json(tmp_path / "a.json")


@given(st.data())
def test_a_checksum_sees_name_dtype_shape_and_bytes(data):
    values = st.tuples(
        st.text(max_size=3), st.sampled_from(["F32", "I32"]), st.tuples(st.integers(0, 3)), st.binary(max_size=4)
    )
    one, other = data.draw(values), data.draw(values)
    same = shards.checksum(*one[:3], [one[3]]) == shards.checksum(*other[:3], [other[3]])
    assert same == (one == other)


def test_write_returns_the_checksums_of_what_is_on_disk(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    digest, sums = write(path, tensors)
    assert digest == shards.file_digest(path)
    for name, stored in shards.read_header(path)[0].items():
        assert sums[name] == shards.checksum(name, stored.dtype, stored.shape, stored.chunks())


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    shards.write_atomic(path, b"old")
    monkeypatch.setattr(
        shards.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        shards.write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_cut_while_it_is_copied_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.zeros(100)})
    stored = shards.read_header(path)[0]["w"]
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CorruptFile, match="ends inside w"):
        list(stored.chunks())
