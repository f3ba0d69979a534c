"""Models of streams in folders: saved, shown, checked, loaded into dense and into stream models, and made dense."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rbe
from rbe import checkpoint, shards
from rbe.checkpoint.folder import sealed
from rbe.cli import work
from rbe.convert import decompress
from rbe.errors import CorruptFile, RbeError
from rbe.formats import stream
from rbe.nn import Stream, StreamConv2d, StreamEmbedding, StreamLinear, StreamLSTM, count
from rbe.source import INDEX


class Everything(nn.Module):
    """One layer of each kind, a table under two names, a norm and a dense layer."""

    def __init__(self, streams: bool = False) -> None:
        super().__init__()
        self.conv: nn.Module = StreamConv2d(1, 4, 3) if streams else nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear: nn.Module = StreamLinear(16, 5, cells=4) if streams else nn.Linear(16, 5)
        self.table: nn.Module = StreamEmbedding(7, 6) if streams else nn.Embedding(7, 6)
        self.tied = self.table
        kind: Callable[..., nn.Module] = StreamLSTM if streams else nn.LSTM
        self.lstm = kind(6, 5, batch_first=True)
        self.out = nn.Linear(5, 2)

    def forward(self, image: Tensor, index: Tensor) -> Tensor:
        x = self.linear(self.norm(self.conv(image)).flatten(1))
        y, _ = self.lstm(self.table(index))
        out: Tensor = self.out(x + y[:, -1]) + self.tied(index).sum()
        return out


def made() -> Everything:
    torch.manual_seed(0)
    return Everything(streams=True).eval()


X = (torch.arange(32.0).view(2, 1, 4, 4).sin(), torch.tensor([[1, 2, 6], [0, 3, 1]]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rbe.save(made(), tmp_path / "model")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_a_model_comes_back(tmp_path: Path, frozen: bool, meta: bool, streams: bool) -> None:
    model = made()
    wanted = model(*X)
    for module in model.modules():
        if isinstance(module, Stream) and frozen:
            module.freeze()
    rbe.save(model, tmp_path / "model")
    assert any(isinstance(m, Stream) and m.trainable for m in model.modules()) != frozen  # left as it was
    with torch.device("meta" if meta else "cpu"):
        given = Everything(streams)
    again = rbe.load(tmp_path / "model", model=given)
    assert isinstance(again.linear, StreamLinear)
    assert again.tied is again.table
    assert not again.training
    torch.testing.assert_close(again(*X), wanted)


def test_bytes_are_counted_whole(folder: Path) -> None:
    model = made()
    held = work.holding(folder)
    assert held.parts["seeds"] == sum(len(m.pack()) for m in model.modules() if isinstance(m, Stream))
    assert held.parts["scales"] == 4 * 5
    assert held.stored - held.parts["headers"] == count(model).whole_bytes
    # A counter of batches is stored, but is no weight.
    assert held.weights == count(model).weights + 1
    rows = {row.name: row for row in checkpoint.inspect(folder)}
    assert (rows["linear"].kind, rows["linear"].shape, rows["linear"].format) == ("linear", (5, 16), "stream")
    assert (rows["linear"].weights, rows["lstm.hh_l0"].kind, rows["out.weight"].kind) == (85, "recurrent", "keep")


def test_the_commands_show_and_check_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work.inspect(folder, False, False)
    assert "stream" in capsys.readouterr().out
    work.inspect(folder, True, True)
    line = json.loads(capsys.readouterr().out)
    assert line["bytes"] == work.holding(folder).stored
    assert {"conv", "lstm.ih_l0", "table"} <= {one["name"] for one in line["tensors"]}
    work.verify(folder, None, True)
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_it_becomes_dense(folder: Path, tmp_path: Path) -> None:
    decompress(folder, tmp_path / "dense")
    dense = Everything().eval()
    state = load_file(tmp_path / "dense" / "model.safetensors")
    missing = dense.load_state_dict(state, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["tied.weight"], [])
    torch.testing.assert_close(dense(*X), made()(*X))
    found = checkpoint.verify(folder, tmp_path / "dense")  # only what is no stream can be compared
    assert (found.ok, found.compared) == (True, 7)


def test_every_flipped_bit_of_a_seed_is_found(folder: Path) -> None:
    opened = checkpoint.open_tensors(folder)
    seed = opened.tensors["linear.seed"]
    data = bytearray(seed.file.read_bytes())
    start = data.index(bytes(seed.read().tolist()))
    for bit in range(8 * seed.nbytes):
        data[start + bit // 8] ^= 1 << bit % 8
        seed.file.write_bytes(data)
        with pytest.raises(CorruptFile, match=r"linear\.seed"):
            rbe.load(folder, model=Everything())
        assert not checkpoint.verify(folder).ok
        data[start + bit // 8] ^= 1 << bit % 8
    seed.file.write_bytes(data)
    assert checkpoint.verify(folder).ok


def reseal(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change what is said of a stream, with every checksum made anew."""
    config, index = json.loads((folder / "config.json").read_text()), json.loads((folder / INDEX).read_text())
    about = config["quantization_config"]
    change(about["streams"]["linear"])
    index["metadata"]["rbe"]["quantization"] = shards.canonical_digest(about)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps(sealed(index)))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("version", stream.VERSION + 1, RbeError, "of version"),
        ("cells", 0, CorruptFile, "makes no sense"),
        ("cells", 99, RbeError, "groups of 99"),
        ("shape", [5, -16], CorruptFile, "makes no sense"),
        ("shape", [5], RbeError, "shape"),
        ("shape", [5, 15], CorruptFile, "no .* matrix"),
        ("bias", 1, CorruptFile, "makes no sense"),
        ("bias", False, CorruptFile, "makes no sense"),
        ("sides", [4, 4], CorruptFile, "no .* matrix"),
        ("tensor", None, CorruptFile, "makes no sense"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(
    folder: Path, key: str, value: object, error: type[Exception], message: str
) -> None:
    reseal(folder, lambda entry: entry.update({key: value}))
    with pytest.raises(error, match=message):
        rbe.load(folder, model=Everything())


def test_folders_of_before_the_format_was_settled_are_read(folder: Path) -> None:
    before = rbe.load(folder, model=Everything())
    reseal(folder, lambda entry: entry.update(version=0))
    after = rbe.load(folder, model=Everything())
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )


def test_a_seed_of_another_matrix_is_refused(folder: Path) -> None:
    # As good as empty: no seed of 85 bytes and more can be of so few weights.
    reseal(folder, lambda entry: entry.update(shape=[1, 1], sides=[1, 1], cells=1))
    with pytest.raises(CorruptFile, match="full after"):
        rbe.load(folder, model=Everything())


@pytest.mark.parametrize(
    ("place", "layer", "message"),
    [
        ("linear", nn.Linear(16, 6), r"\(6, 16\).*in the given model"),
        ("linear", nn.Linear(16, 5, bias=False), "in the given model"),
        ("linear", StreamLinear(16, 5, cells=2), "in the given model"),
        ("linear", nn.Identity(), "a Identity there"),
        ("conv", nn.Conv2d(1, 4, 3, dilation=2), "a Conv2d there"),
        ("lstm", nn.LSTM(6, 4, batch_first=True), "in the given model"),
        ("lstm", nn.GRU(6, 5, batch_first=True), "no such layer"),
        ("norm", nn.Identity(), "same tensors"),
    ],
)
def test_a_model_of_another_shape_is_refused_and_left_alone(
    folder: Path, place: str, layer: nn.Module, message: str
) -> None:
    given = Everything()
    setattr(given, place, layer)
    with pytest.raises(RbeError, match=message):
        rbe.load(folder, model=given)
    assert not any(isinstance(m, Stream) and m is not layer for m in given.modules())


def test_a_trained_run_is_saved(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder)
    model = nn.Sequential(StreamLinear(8, 6, open_shape=(3, 8)), nn.ReLU(), StreamLinear(6, 2, open_shape=(2, 3)))
    model[0].slim = True  # type: ignore[assignment]
    wanted = model(torch.eye(8))
    rbe.save(model, folder)
    again = rbe.load(folder, model=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    torch.testing.assert_close(again(torch.eye(8)), wanted)


def test_transformers_models_keep_streams_elsewhere(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(
        vocab_size=7, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(shape)
    model.transformer.wte = StreamEmbedding(7, 8)
    with pytest.raises(RbeError, match=r"transformer\.wte holds a stream.*state_dict"):
        rbe.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
