"""Bare files in every format: what holds for a trellis holds for the packed formats, kernels and recurrent weights."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rbe
from rbe import RbeError, checkpoint, convert, metrics, search, shards
from rbe.formats import packed128
from rbe.source import INDEX

FORMS: dict[str, dict[str, Any]] = {
    "trellis": {"bits": 2},
    "radial": {"format": "packed128"},
    "faithful": {"format": "packed128", "mode": "faithful", "block": 8, "stages": 2},
    "packed64": {"format": "packed64", "block": 4},
    "precision 64": {"format": "packed64", "block": 8, "precision": 64, "stages": 2},
    "whole": {"format": "packed64", "block": None},
    "whole 128": {"format": "packed128", "block": None, "mode": "faithful"},
    "outer128": {"format": "outer128", "block": 8},
    "outliers": {"format": "packed128", "outliers": 0.01},
}
SHARD = "model-00001-of-00001.safetensors"


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "fc.weight": torch.randn(40, 50).bfloat16(),
        "fc.bias": torch.randn(40),
        "conv.weight": torch.randn(24, 8, 3, 3),
        "length.weight": torch.randn(32, 16, 3),
        "lstm.weight_ih_l0": torch.randn(64, 24),
        "lstm.weight_hh_l0_reverse": torch.randn(64, 16),
        "lstm.bias_ih_l0": torch.randn(64),
        "tok_emb.weight": torch.randn(50, 32).half(),
        "zero.weight": torch.zeros(32, 32),
        "flat.weight": torch.full((32, 32), 0.5),
    }


def compress(src: Path, dst: Path, **options: Any) -> convert.Conversion:
    return convert.compress(src, dst, **{"effort": "fast", "threads": 1, **options})


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "tiny.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture(scope="module", params=list(FORMS))
def case(request: pytest.FixtureRequest, src: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(settings, the compressed folder)."""
    folder = tmp_path_factory.mktemp("form") / "seeds"
    compress(src, folder, **FORMS[request.param])
    return FORMS[request.param], folder


def test_the_dry_run_knows_every_byte(case: tuple[Any, Path], src: Path, tmp_path: Path) -> None:
    form, folder = case
    planned = compress(src, tmp_path / "none", dry_run=True, **form)
    rows = checkpoint.inspect(folder)
    assert planned.nbytes == sum(row.nbytes for row in rows) and planned.seconds > 0
    by_name = {entry.module if entry.spec else entry.name: entry for entry in planned.plan}
    assert all(by_name[row.name].nbytes == row.nbytes and by_name[row.name].kind == row.kind for row in rows)
    assert {row.name: row.kind for row in rows if row.kind != "keep"} == {
        "fc": "linear", "conv": "conv", "length": "conv", "lstm.weight_ih_l0": "linear",
        "lstm.weight_hh_l0_reverse": "linear", "tok_emb": "embedding", "zero": "linear", "flat": "linear",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_the_seeds_are(case: tuple[Any, Path]) -> None:
    form, folder = case
    dense = tensors()
    for row in checkpoint.inspect(folder):
        if row.spec is None:
            continue
        assert row.spec.format == form.get("format", "trellis") and row.spec.block == form.get("block", 16)
        assert row.spec.stages == form.get("stages", 1) and row.spec.precision == form.get("precision", 32)
        assert row.spec.mode == form.get("mode", "radial" if row.spec.format == "packed128" else None)
        assert row.format.startswith(row.spec.format) and (row.spec.mode or "") in row.format
        assert row.error is not None and 0 <= row.error <= 1
        weight = dense[row.name if row.name in dense else f"{row.name}.weight"].float().reshape(row.shape)
        matrix = checkpoint.load_matrices(folder)[0][row.name]
        assert row.error == pytest.approx(metrics.relative_squared_error(matrix.decode(), weight), abs=1e-6)


def test_there_and_back(case: tuple[Any, Path], src: Path, tmp_path: Path) -> None:
    _, folder = case
    convert.decompress(folder, tmp_path / "back.safetensors")
    back, dense = load_file(tmp_path / "back.safetensors"), tensors()
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {n: (t.shape, t.dtype) for n, t in dense.items()}
    loaded = rbe.load(folder)
    assert set(loaded) == set(dense)
    for name, value in loaded.items():
        if isinstance(value, rbe.SeedMatrix):
            x = torch.randn(2, value.shape[1])
            y = x @ value.decode().T
            assert torch.equal(value.decode().reshape(dense[name].shape).to(dense[name].dtype), back[name])
            assert (value.matmul(x) - y).norm() <= 1e-4 * y.norm()
        else:
            assert torch.equal(value, dense[name])
    assert not loaded["zero.weight"].decode().any()
    assert torch.equal(loaded["tok_emb.weight"].rows(torch.tensor([7])), loaded["tok_emb.weight"].decode()[[7]])


def test_verify_finds_every_kind_of_damage(case: tuple[Any, Path], src: Path, tmp_path: Path) -> None:
    _, folder = case
    found = checkpoint.verify(folder, src)
    assert found.ok and found.compared == 10
    dst = shutil.copytree(folder, tmp_path / "seeds")
    whole = (dst / SHARD).read_bytes()
    header, _ = shards.read_header(dst / SHARD)
    for tensor in header.values():
        for at in {tensor.start, tensor.stop - 1}:
            (dst / SHARD).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            assert not checkpoint.verify(dst).ok, tensor.name
            with pytest.raises(RbeError, match="was changed"):
                rbe.load(dst)


def reseal(folder: Path, name: str, tensor: Tensor) -> None:
    """Change a tensor as somebody would who can compute checksums."""
    state = {n: t.read() for n, t in shards.read_header(folder / SHARD)[0].items()}
    metadata = shards.read_header(folder / SHARD)[1]
    outgoing = [shards.outgoing(n, tensor if n == name else t) for n, t in state.items()]
    digest, sums = shards.write(folder / SHARD, outgoing, metadata)
    index = json.loads((folder / INDEX).read_text())
    about = index["metadata"]["rbe"]
    about["files"][SHARD]["sha256"] = digest
    about["tensors"][name][2] = sums[name]
    about.pop("checksum")
    about["checksum"] = shards.canonical_digest(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("field", "value"), [("radius", 1.0), ("radius", -0.5), ("radius", math.nan), ("angle", math.inf)]
)
def test_a_seed_that_is_no_point_of_the_disk_is_named(src: Path, tmp_path: Path, field: str, value: float) -> None:
    compress(src, tmp_path / "seeds", format="packed128", include=["fc"])
    seeds = checkpoint.load_matrices(tmp_path / "seeds")[0]["fc"].seeds
    bits = int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF
    shift, keep = (32, 0xFFFFFFFF) if field == "radius" else (0, -1 << 32)
    word = (int(seeds[2, 1]) & keep) | (bits << shift)
    changed = seeds.clone()
    changed[2, 1] = word - (1 << 64) if word >= 1 << 63 else word
    reseal(tmp_path / "seeds", "fc.seeds", changed)
    wrong = checkpoint.verify(tmp_path / "seeds").problems
    assert len(wrong) == 1 and f"fc: packed128: {field} is" in wrong[0]
    with pytest.raises(rbe.CorruptFile, match=f"fc: packed128: {field}"):
        rbe.load(tmp_path / "seeds")
    with pytest.raises(RbeError, match=field):
        packed128.generate(changed, checkpoint.inspect(tmp_path / "seeds")[0].spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["order", "outside", "nan"])
def test_outliers_that_make_no_sense_are_refused(src: Path, tmp_path: Path, change: str) -> None:
    compress(src, tmp_path / "seeds", format="packed64", block=4, outliers=0.01, include=["fc"])
    few = checkpoint.load_matrices(tmp_path / "seeds")[0]["fc"].outliers
    assert few is not None and len(few) == 20
    name, tensor = "fc.outlier_index", few.index.clone()
    if change == "order":
        tensor = tensor.flip(0)
    elif change == "outside":
        tensor[-1] = 40 * 50
    else:
        name, tensor = "fc.outlier_values", torch.full_like(few.values, math.nan)
    reseal(tmp_path / "seeds", name, tensor)
    with pytest.raises(rbe.CorruptFile, match="fc: outliers"):
        rbe.load(tmp_path / "seeds")


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("form", [FORMS["faithful"], FORMS["packed64"], FORMS["outliers"]])
def test_an_interrupted_run_ends_with_the_same_bytes(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    compress(src, tmp_path / "a", **form)
    real, left = search.encode, 3

    def dies(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(search, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(src, tmp_path / "b", **form)
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(search, "encode", real)
    assert compress(src, tmp_path / "b", threads=2, **form).resumed == 3
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "packed128", "bits": 2}, "bits: 2 bits .* 16x16 with 1 seed.* is 0.5 bits a weight"),
        ({"format": "packed64", "block": None, "bits": 1}, "follows from the size of each matrix"),
        ({"format": "packed128", "embeddings_bits": 2}, "embeddings_bits: 2 bits cannot be asked"),
        ({"format": "packed128", "rates": {"fc": 3}}, "rate of 'fc': 3 bits cannot be asked"),
        ({"format": "packed32"}, "packed32.*packed128"),
        ({"format": "packed64", "mode": "radial"}, "mode 'radial' is not offered"),
        ({"format": "packed128", "precision": 64}, "precision 64"),
        ({"format": "packed128", "block": 0}, "block 0"),
        ({"format": "packed128", "stages": 0}, "stages 0"),
        ({"block": 8}, "block"),
        ({"stages": 2}, "stage"),
        ({"outliers": 0.9}, "no share"),
    ],
)
def test_settings_that_cannot_be_are_refused(src: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RbeError, match=says):
        compress(src, tmp_path / "seeds", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_the_blocks_own_is_accepted(src: Path, tmp_path: Path) -> None:
    done = compress(src, tmp_path / "a", format="packed128", block=8, bits=2, embeddings_bits=0)
    assert {one.spec.bits for one in done.encoded} == {2.0}
    assert "tok_emb.weight" not in {one.name for one in done.encoded}
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert (settings["format"], settings["block"], settings["bits"]) == ("packed128", 8, 2.0)
