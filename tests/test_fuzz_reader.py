"""Whatever happens to a file: a clear error, or exactly what was written. Never a crash, never a silent change."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import rbe
from rbe import checkpoint, convert, shards, source
from rbe.errors import RbeError
from rbe.source import INDEX

SHARD = "model-00001-of-00001.safetensors"
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["trellis", "outer128", "stream"])
def folder(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(32, 32), "emb.weight": torch.randn(32, 32), "a.bias": torch.randn(5)}
    save_file(tensors, base / "tiny.safetensors", {"format": "pt"})
    if request.param == "trellis":
        convert.compress(base / "tiny.safetensors", base / "seeds", effort="fast", threads=1)
    elif request.param == "outer128":
        rbe.save(nn.Sequential(rbe.nn.Linear(32, 40, format="outer128"), nn.Linear(40, 2)), base / "seeds")
    else:
        rbe.save(nn.Sequential(rbe.nn.StreamConv2d(3, 4, 3), rbe.nn.StreamLinear(30, 20)), base / "seeds")
    return base / "seeds"


@st.composite
def damage(draw):
    """A change of some bytes: flipped, cut, put in, repeated, or all replaced."""
    kind = draw(st.sampled_from(["flip", "byte", "cut", "insert", "drop", "garbage", "digits"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    some = draw(st.binary(min_size=1, max_size=12))

    def apply(content):
        at = int(where * len(content))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ 1 << some[0] % 8]) + content[at + 1 :]
        if kind == "byte":
            return content[:at] + some + content[at + len(some) :]
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + some + content[at:]
        if kind == "drop":
            return content[:at] + content[at + len(some) :]
        if kind == "digits":  # numbers and structure of JSON, where a change can still be parsed
            return content[:at] + bytes(b'0123456789-.e[]{},:"ntf'[byte % 23] for byte in some[:2]) + content[at + 2 :]
        return some * 20

    return apply


def read(path):
    matrices, rest = checkpoint.load_matrices(path)
    tensors = {f"{name}.{key}": t for name, m in matrices.items() for key, t in m.to_tensors().items()}
    return {**tensors, **rest}, {name: matrix.spec for name, matrix in matrices.items()}


@RELAXED
@given(name=st.sampled_from([SHARD, INDEX, "config.json"]), change=damage())
def test_a_damaged_folder_gives_an_error_or_the_same_tensors(folder, name, change):
    tensors, specs = read(folder)
    copy = folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(change((folder / name).read_bytes()))
    same = (copy / name).read_bytes() == (folder / name).read_bytes()
    try:
        found, described = read(copy)
    except RbeError as wrong:
        assert not same
        assert str(wrong)
    else:
        assert same or name != SHARD
        assert described == specs and found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    try:
        sound = checkpoint.verify(copy).ok
    except RbeError:
        sound = False
    assert sound or not same
    assert not sound or same or name == INDEX  # only the layout of the index may differ


@RELAXED
@given(change=damage())
def test_a_damaged_dense_file_gives_an_error_or_tensors(folder, change):
    path = folder.parent / "dense.safetensors"
    path.write_bytes(change((folder.parent / "tiny.safetensors").read_bytes()))
    try:
        found = source.open_source(path)
    except RbeError:
        return
    for stored in found.tensors.values():
        if shards.torch_dtype(stored.dtype) is not None:
            assert tuple(stored.read().shape) == stored.shape


@RELAXED
@given(content=st.binary(max_size=200))
def test_garbage_is_no_file_of_ours(folder, content):
    path = folder.parent / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(RbeError):
        source.open_source(path)
